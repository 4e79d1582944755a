"""What a run would take: counted on the meta device, and the arithmetic by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from normuon_lab.cli import main
from normuon_lab.errors import InputError
from normuon_lab.train.model import build_model, flops_per_token, transformers_config
from normuon_lab.train.pretrain.command import pretrain_preset
from normuon_lab.train.pretrain.config import Hardware, MetricsConfig, ParallelConfig
from normuon_lab.train.pretrain.dry_run import dry_run


def test_the_1b_run_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--preset", "llama-1.1b", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Width 2048, MLP 8192, 512 for keys and values, 32,000 tokens, two norms a layer and one more.
    hidden = 16 * (2 * 2048**2 + 2 * 512 * 2048 + 3 * 8192 * 2048)
    assert found["hidden_matrix_parameters"] == hidden
    assert found["parameters"] == hidden + 2 * 32_000 * 2048 + 33 * 2048
    assert found["steps"] * found["tokens_per_step"] == found["tokens"]
    # 6 FLOPs for all but the embedding that is looked up; attention 12 x layers x width x length.
    weights = 6 * (found["parameters"] - 32_000 * 2048)
    assert found["flops_per_token"]["weights"] == weights
    assert found["flops_per_token"]["attention"] == 12 * 16 * 2048 * 4096
    assert found["flops"] == found["flops_per_token"]["total"] * found["tokens"]


def test_the_optimizers_state_per_hidden_weight_of_the_1b_run() -> None:
    """The paper's: AdamW two numbers per weight, Muon one, NorMuon one and a little."""
    found = dry_run(pretrain_preset("llama-1.1b"), Hardware())
    ratios = found["state_elements_per_hidden_weight"]
    assert ratios["adamw"] == 2.0
    assert ratios["muon"] == 1.0
    assert 1.0 < ratios["normuon"] <= 1.001
    # One number per row: q, o, k, v, gate, up and down of 16 layers.
    rows = 16 * (2048 + 2048 + 2 * 512 + 2 * 8192 + 2048)
    assert found["state_elements"]["normuon"] == found["hidden_matrix_parameters"] + rows


def test_split_heads_are_planned_one_by_one_at_the_same_state() -> None:
    config = pretrain_preset("llama-1.1b")
    split = replace(config, optimizer=replace(config.optimizer, split_heads=True, equilibrate=True))
    whole, by_head = (dry_run(one, Hardware()) for one in (config, split))
    # 16 layers: q and k and v become 16, 4 and 4 heads; o, gate, up and down stay.
    assert whole["plan"]["num_orthogonalisations"] == 16 * 7
    assert by_head["plan"]["num_orthogonalisations"] == 16 * (16 + 4 + 4 + 4)
    assert by_head["state_elements"] == whole["state_elements"]


def test_memory_and_time_scale_with_ranks() -> None:
    config = pretrain_preset("llama-1.1b")
    eight, sixteen = (dry_run(config, Hardware(num_ranks=n)) for n in (8, 16))
    assert eight["mesh"]["world_size"] == 8
    memory = eight["memory_per_rank"]
    # Float32 weights over 8 ranks; every size divides.
    assert memory["weights_bytes"] == memory["gradients_bytes"] == eight["parameters"] * 4 // 8
    assert memory["total_bytes"] == sum(memory.values()) - memory["total_bytes"]
    assert sixteen["memory_per_rank"]["weights_bytes"] * 2 == memory["weights_bytes"]
    seconds = eight["expected"]
    model = eight["flops_per_token"]["total"] * 2**21 / (8 * 989e12 * 0.4)
    assert seconds["model_seconds_per_step"] == pytest.approx(model)
    assert seconds["step_seconds"] == pytest.approx(model + eight["plan"]["predicted_step_seconds"])
    assert seconds["total_seconds"] == pytest.approx(seconds["step_seconds"] * eight["steps"])
    assert seconds["model_seconds_per_step"] == pytest.approx(
        2 * sixteen["expected"]["model_seconds_per_step"]
    )


def test_a_given_mesh_and_device_are_used() -> None:
    config = replace(
        pretrain_preset("llama-tiny"),
        parallel=ParallelConfig(dp_replicate=2, dp_shard=2, tp=2),
        metrics=MetricsConfig(device_tflops=1.0),
    )
    found = dry_run(config, Hardware(num_ranks=3, mfu=0.5))
    assert found["mesh"] == {"dp_replicate": 2, "dp_shard": 2, "tp": 2, "world_size": 8}
    assert found["micro_batch_size"] == 4
    step = found["flops_per_token"]["total"] * found["tokens_per_step"] / (8 * 0.5e12)
    assert found["expected"]["model_seconds_per_step"] == pytest.approx(step)
    with pytest.raises(InputError, match="does not divide the 3 ranks"):
        dry_run(replace(config, parallel=ParallelConfig(tp=2)), Hardware(num_ranks=3))


def test_the_text_shows_the_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", "--num-ranks", "2"]) == 0
    shown = capsys.readouterr().out
    for word in ("125,248", "409,600", "1.0000", "NorMuon's plan: 14 orthogonalisations", "days"):
        assert word in shown
    assert main(["train", "--json"]) == 2


def test_a_tied_embedding_counts_as_the_head() -> None:
    model = build_model(transformers_config("gpt2-124m"), device="meta")
    found = flops_per_token(model, sequence_length=1024)
    assert found.weights == 6 * 124_439_808
    assert found.attention == 12 * 12 * 768 * 1024
    assert isinstance(model, nn.Module)
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())
