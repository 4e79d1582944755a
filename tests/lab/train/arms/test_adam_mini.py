"""Adam-mini against its paper's formula, one plain float64 loop per kind of block."""

from __future__ import annotations

import pytest
import torch

from normuon_lab.train.arms.options import ArmOptions
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.train.model import build_model
from normuon_lab.train.runs.config import ModelConfig

WIDTH, HEADS, LR, DECAY, BETA1, BETA2 = 16, 2, 0.02, 0.1, 0.9, 0.8
OPTIONS = ArmOptions(adam_lr=0.005, head_lr=0.01, weight_decay=DECAY, betas=(BETA1, BETA2))


def built(family):
    model = build_model(
        ModelConfig(
            family=family, num_layers=1, width=WIDTH, num_heads=HEADS, mlp_width=24, vocab_size=256
        ).to_transformers(),
        seed=0,
    )
    return model, ARMS["adam-mini"].build(model, LR, OPTIONS)[0]


def adam_mini(start, grads, *, block, lr, decay):
    """The weights after steps with `grads`, with one second moment per `block` entries."""
    weights = start.double().reshape(-1, block)
    m, v = torch.zeros_like(weights), torch.zeros(len(weights), 1).double()
    for t, grad in enumerate(grads, start=1):
        g = grad.double().reshape(-1, block)
        m = BETA1 * m + (1 - BETA1) * g
        v = BETA2 * v + (1 - BETA2) * (g * g).mean(1, keepdim=True)
        m_hat, v_hat = m / (1 - BETA1**t), v / (1 - BETA2**t)
        weights = weights - lr * decay * weights - lr * m_hat / (v_hat.sqrt() + 1e-8)
    return weights.reshape(start.shape)


LAYER = "model.layers.0."
BLOCKS = {
    "llama": {
        LAYER + "self_attn.q_proj.weight": (WIDTH // HEADS * WIDTH, LR, DECAY),  # A head.
        LAYER + "self_attn.k_proj.weight": (WIDTH // HEADS * WIDTH, LR, DECAY),
        LAYER + "self_attn.v_proj.weight": (WIDTH, LR, DECAY),  # A neuron.
        LAYER + "self_attn.o_proj.weight": (WIDTH, LR, DECAY),
        LAYER + "mlp.up_proj.weight": (WIDTH, LR, DECAY),
        LAYER + "mlp.down_proj.weight": (24, LR, DECAY),
        LAYER + "input_layernorm.weight": (WIDTH, 0.005, 0.0),  # The whole vector.
        "model.embed_tokens.weight": (WIDTH, 0.005, 0.0),  # A token.
        "lm_head.weight": (WIDTH, 0.01, 0.0),
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn.weight": (WIDTH * 3 * WIDTH, LR, DECAY),  # The whole Conv1D.
        "transformer.h.0.mlp.c_proj.weight": (24 * WIDTH, LR, DECAY),
        "transformer.h.0.mlp.c_fc.bias": (24, 0.005, 0.0),
        "transformer.wte.weight": (WIDTH, 0.005, 0.0),
        "transformer.wpe.weight": (WIDTH, 0.005, 0.0),
        "lm_head.weight": (WIDTH, 0.01, 0.0),
    },
}


@pytest.mark.parametrize("family", BLOCKS)
def test_every_kind_of_block_moves_by_the_formula(family):
    model, optimizer = built(family)
    parameters = dict(model.named_parameters())
    starts = {name: parameters[name].detach().clone() for name in BLOCKS[family]}
    grads = {name: [] for name in BLOCKS[family]}
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        for name, parameter in parameters.items():
            # Rows of many sizes, so that a block too large or too small is seen.
            rows = torch.logspace(-2, 0, parameter.shape[0]).reshape(
                -1, *[1] * (parameter.ndim - 1)
            )
            parameter.grad = rows * torch.randn(parameter.shape, generator=generator)
            if name in grads:
                grads[name].append(parameter.grad.clone())
        optimizer.step()
    for name, (block, lr, decay) in BLOCKS[family].items():
        expected = adam_mini(starts[name], grads[name], block=block, lr=lr, decay=decay)
        # float32 weights around 1, four steps: a few roundings of 6e-8.
        torch.testing.assert_close(
            parameters[name].detach().double(), expected, rtol=0, atol=1e-6, msg=name
        )


def test_a_block_keeps_one_second_moment():
    """What the optimizer is for: Adam's second moments, but for one in each block, are gone."""
    model, optimizer = built("llama")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kept = {
        group["name"]: optimizer.state[group["params"][0]]["v_mean"].numel()
        for group in optimizer.param_groups
    }
    assert kept["model.layers.0.self_attn.q_proj.weight"] == HEADS
    assert kept["model.layers.0.self_attn.v_proj.weight"] == WIDTH
    assert kept["model.layers.0.mlp.up_proj.weight"] == 24
    assert kept["model.embed_tokens.weight"] == 256
    assert kept["model.norm.weight"] == 1
    assert not any("v" in optimizer.state[p] for p in model.parameters())
