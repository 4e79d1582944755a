"""The paper's four runs: every figure of its table, and parameters counted on the meta device."""

from __future__ import annotations

import math

import pytest

from normuon_lab.errors import InputError
from normuon_lab.plan.model_matrices import model_shapes
from normuon_lab.plan.presets import preset_config
from normuon_lab.train.pretrain.command import PRETRAIN_PRESETS, pretrain_preset

# arXiv 2510.05491, its table of experiments: depth, parameters in billions, peak learning rate
# (4e-4 at depth 16, scaled by 1 / sqrt(depth)).
PAPER_LLAMA = {
    "llama-1.1b": (16, 1.1, 4e-4),
    "llama-5.4b": (28, 5.4, 4e-4 * math.sqrt(16) / math.sqrt(28)),
}


@pytest.mark.parametrize("name", PAPER_LLAMA)
def test_the_llama_runs_are_the_papers(name: str) -> None:
    depth, billions, lr = PAPER_LLAMA[name]
    config = pretrain_preset(name)
    model = preset_config(config.model.model)
    assert model.num_hidden_layers == depth
    assert model.hidden_size == 128 * depth
    assert model.num_attention_heads == depth
    assert model.num_key_value_heads == depth // 4
    assert model.intermediate_size == 4 * 128 * depth
    assert round(model_shapes(config.model.model).num_parameters / 1e9, 1) == billions

    assert config.batch.sequence_length == 4096
    assert model.max_position_embeddings >= 4096
    assert config.batch.tokens_per_step == 2 * 2**20
    # Whole steps: half a batch is 1M tokens.
    assert config.tokens == pytest.approx(50e9, abs=2**20)
    warmup_tokens = config.schedule.warmup_steps * config.batch.tokens_per_step
    assert warmup_tokens == pytest.approx(1e9, abs=2**20)
    assert config.schedule.schedule == "linear"
    assert config.data.source == ("hub:cerebras/SlimPajama-627B",)

    assert config.optimizer.lr == pytest.approx(lr)
    assert config.optimizer.adam_lr is None  # One rate serves both halves.
    assert config.optimizer.betas == (0.9, 0.95)


# Depth, width, heads, millions of parameters, steps, billions of tokens, betas of Adam.
PAPER_GPT2 = {
    "gpt2-124m": (12, 768, 12, 124, 6200, 3.2, (0.9, 0.95)),
    "gpt2-350m": (24, 1024, 16, 355, 7500, 4.0, (0.8, 0.95)),
}


@pytest.mark.parametrize("name", PAPER_GPT2)
def test_the_gpt2_runs_are_the_papers(name: str) -> None:
    depth, width, heads, millions, steps, billion_tokens, betas = PAPER_GPT2[name]
    config = pretrain_preset(name)
    model = preset_config(config.model.model)
    assert (model.n_layer, model.n_embd, model.n_head) == (depth, width, heads)
    assert round(model_shapes(config.model.model).num_parameters / 1e6) == millions
    assert config.batch.batch_size == 512
    assert config.batch.sequence_length == 1024
    assert config.batch.steps == steps
    # 6,200 and 7,500 steps of 524,288 tokens are 3.25 and 3.93 billion; the paper rounds.
    assert config.tokens / 1e9 == pytest.approx(billion_tokens, abs=0.075)
    assert config.schedule.schedule == "wsd"
    assert config.optimizer.betas == betas
    assert "fineweb" in config.data.source[0]


def test_the_gpt2_runs_have_the_papers_learning_rates() -> None:
    small = pretrain_preset("gpt2-124m").optimizer
    assert (small.lr, small.adam_lr) == (3.6e-4, 3.6e-3)
    medium = pretrain_preset("gpt2-350m").optimizer
    assert (medium.lr, medium.embedding_lr, medium.head_lr) == (7.5e-4, 0.3, 3e-3)


@pytest.mark.parametrize("name", [*PAPER_LLAMA, *PAPER_GPT2])
def test_every_paper_run_has_the_papers_betas_and_decay(name: str) -> None:
    optimizer = pretrain_preset(name).optimizer
    assert optimizer.momentum == 0.95
    assert optimizer.beta2 == 0.95
    assert optimizer.weight_decay == 0.1


@pytest.mark.parametrize("name", PRETRAIN_PRESETS)
def test_every_preset_names_itself_and_fits_its_model(name: str) -> None:
    config = pretrain_preset(name)
    assert config.preset == name
    model = preset_config(config.model.model)
    assert model.max_position_embeddings >= config.batch.sequence_length
    assert config.batch.batch_size % config.batch.micro_batch_size == 0


def test_an_unknown_preset_is_named_with_those_that_are_known() -> None:
    with pytest.raises(
        InputError, match=r"unknown preset gpt5; known are llama-tiny, .*llama-5.4b"
    ):
        pretrain_preset("gpt5")
