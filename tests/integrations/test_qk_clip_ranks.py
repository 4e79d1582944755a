"""QK-clip under FSDP2, tensor parallelism and both: the weights of one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from normuon import NorMuon, param_groups
from tests.distributed.conftest import ranks  # noqa: F401
from tests.distributed.parity import whole

TAU = 0.3
LAYOUTS = {"ddp": (2, 1), "fsdp2": (2, 1), "fsdp2_uneven": (3, 1), "tp": (1, 2), "fsdp2_tp": (2, 2)}
"""Ranks that share the data, and ranks that share the heads."""


def small_model(name: str) -> nn.Module:
    from tests.integrations.test_qk_clip import build, deepseek, gpt2, gpt_neox, qwen2_gqa

    makers = {"qwen2": qwen2_gqa, "gpt_neox": gpt_neox, "gpt2": gpt2, "deepseek": deepseek}
    return build(makers[name]).double()


def layers_of(model: nn.Module):
    base = model.base_model
    return base.layers if hasattr(base, "layers") else base.h


def inputs_of(step: int) -> tuple[Tensor, Tensor]:
    """Six sequences, and their padding: a sixth of the batch has other logits than the rest."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(32, (6, 7), generator=generator)
    mask = torch.ones_like(tokens)
    mask[1, 4:] = mask[4, 5:] = 0
    return tokens, mask


def parallelized(model: nn.Module, mesh) -> nn.Module:
    """By heads: each rank of the mesh computes some heads of queries and of keys."""
    if hasattr(layers_of(model)[0], "self_attn"):
        plan = {
            **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
            "self_attn.o_proj": RowwiseParallel(),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(),
        }
    else:
        plan = {
            "attention.query_key_value": ColwiseParallel(),
            "attention.dense": RowwiseParallel(),
            "mlp.dense_h_to_4h": ColwiseParallel(),
            "mlp.dense_4h_to_h": RowwiseParallel(),
        }
    for layer in layers_of(model):
        parallelize_module(layer, mesh, plan)
    return model


def trained(model: nn.Module, data_rank: int, num_data_ranks: int, steps: int = 3):
    """Weights after some clipped steps, and the largest logits at each; gradients of the batch."""
    from normuon.integrations.qk_clip import QKClip

    clip = QKClip(model, tau=TAU)
    seen = []
    # A key's bias has no gradient but rounding: Adam must not divide that by its own size.
    optimizer = NorMuon(param_groups(model), lr=1e-2, adamw_eps=1e-3)
    optimizer.register_step_post_hook(lambda *_: clip.step())
    for step in range(steps):
        tokens, mask = (part.chunk(num_data_ranks)[data_rank] for part in inputs_of(step))
        logits = model(input_ids=tokens, attention_mask=mask).logits
        (logits.float().square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(torch.stack(list(clip.max_logits.values())))
    weights = {n.removeprefix("module."): whole(p).clone() for n, p in model.named_parameters()}
    return weights, torch.stack(seen)


def on_ranks(rank: int, world_size: int, *, name: str, layout: str):
    data, heads = LAYOUTS[layout]
    model = small_model(name)
    mesh = init_device_mesh("cpu", (data, heads), mesh_dim_names=("data", "heads"))
    if heads > 1:
        parallelized(model, mesh["heads"])
    if layout.startswith("fsdp2"):
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh["data"])
        fully_shard(model, mesh=mesh["data"])
    if layout == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    weights, logits = trained(model, mesh.get_local_rank("data"), data)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert bool(sharded) == (layout != "ddp")
    return weights, logits


def expected(name: str):
    return trained(small_model(name), 0, 1)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("qwen2", layout) for layout in LAYOUTS),
        ("gpt_neox", "tp"),
        ("gpt2", "fsdp2_uneven"),
        ("deepseek", "fsdp2"),
    ],
)
def test_every_layout_has_the_weights_of_one_process(name, layout, ranks):  # noqa: F811
    data, heads = LAYOUTS[layout]
    weights, logits = expected(name)
    assert (logits[0] > TAU).any(dim=-1).all(), "every layer is clipped"
    for found, found_logits in ranks.run(on_ranks, data * heads, name=name, layout=layout):
        # float64, but for transformers' norms and the logits themselves, which are float32.
        torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-5)
        assert found.keys() == weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def scaled_on_ranks(rank: int, world_size: int, *, name: str, layout: str):
    """One step from the same logits on every layout: the multiplication alone."""
    from normuon.integrations.qk_clip import QKClip

    data, heads = LAYOUTS[layout]
    model = small_model(name)
    mesh = init_device_mesh("cpu", (data, heads), mesh_dim_names=("data", "heads"))
    if heads > 1:
        parallelized(model, mesh["heads"])
    if layout.startswith("fsdp2"):
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh["data"])
    clip = QKClip(model, tau=TAU)
    record_(clip, some_rank=(rank, world_size))
    clip.step()
    return {name: whole(param).clone() for name, param in model.named_parameters()}


def record_(clip, some_rank: tuple[int, int]) -> None:
    """Heads in turn are seen by ranks in turn, as their batches would show them."""
    rank, world_size = some_rank
    for attention in clip._attentions:
        for head in range(attention.num_heads):
            if head % world_size == rank or world_size == 1:
                clip._record(attention, torch.tensor([0.2 + 0.3 * head]), head)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("qwen2", layout) for layout in LAYOUTS if layout != "ddp"),
        ("gpt_neox", "fsdp2_tp"),
        ("gpt2", "fsdp2_uneven"),
        ("deepseek", "fsdp2_uneven"),
    ],
)
def test_equal_logits_give_equal_weights_bit_by_bit(name, layout, ranks):  # noqa: F811
    from normuon.integrations.qk_clip import QKClip

    data, heads = LAYOUTS[layout]
    model = small_model(name)
    clip = QKClip(model, tau=TAU)
    record_(clip, some_rank=(0, 1))
    clip.step()
    for found in ranks.run(scaled_on_ranks, data * heads, name=name, layout=layout):
        for key, param in model.named_parameters():
            assert torch.equal(found[key], param), key


def refusals(rank: int, world_size: int) -> list[str]:
    """GPT-2's fused projection cut in two has no whole heads; ranks that watch other modules."""
    from normuon.integrations.qk_clip import QKClip

    messages = []
    model = small_model("qwen2")
    clip = QKClip(model, tau=1.0 + rank)
    record_(clip, some_rank=(0, 1))
    try:
        clip.step()
    except ValueError as error:
        messages.append(str(error))
    mesh = init_device_mesh("cpu", (world_size,))
    local = small_model("qwen2")
    parallelized(local, mesh)
    for layer in layers_of(local):
        for child in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            for kind in ("weight", "bias"):
                part = nn.Parameter(getattr(child, kind).detach().to_local().clone())
                setattr(child, kind, part)
    try:
        QKClip(local)
    except ValueError as error:
        messages.append(str(error))
    dist.barrier()
    return messages


def test_ranks_that_disagree_and_heads_in_plain_tensors_are_refused_everywhere(ranks):  # noqa: F811
    for different, plain in ranks.run(refusals, 2):
        assert different.startswith("rank 0 and rank 1 built different QK-clips: 'tau=1.0 ")
        assert plain == (
            "model.layers.0.self_attn.q_proj.weight makes 2 heads and the model has 4: where ranks "
            "share the heads, their weights have to be DTensors (parallelize_module)"
        )
