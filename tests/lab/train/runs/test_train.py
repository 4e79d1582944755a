"""One run: the same start for every arm, bit-for-bit repeats, and a probe that only looks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from normuon_lab.train.arms import builders
from normuon_lab.train.arms.builders import split_parameters
from normuon_lab.train.arms.ema_nesterov import EmaNesterov
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.train.matrix_figures import describe_matrix, update_of
from normuon_lab.train.model import build_model
from normuon_lab.train.runs import train as train_module
from normuon_lab.train.runs.config import Experiment, ModelConfig, RunSpec, TrainConfig
from normuon_lab.train.runs.corpus import Corpus
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.train import train_run

LEARNING_RATE = 0.004


def run(
    corpus: Corpus,
    experiment: Experiment,
    arm: str = "normuon",
    *,
    seed: int = 0,
    probe_updates: bool = False,
) -> RunRecord:
    spec = RunSpec(arm=arm, seed=seed, learning_rate=LEARNING_RATE)
    return train_run(spec, experiment, corpus, probe_updates=probe_updates)


def spread(values: list[float]) -> float:
    return max(values) / min(values)


@pytest.mark.parametrize("arm", list(ARMS))
def test_a_repeat_is_bitwise_equal(corpus: Corpus, experiment: Experiment, arm: str) -> None:
    first, second = run(corpus, experiment, arm), run(corpus, experiment, arm)
    assert first.train_losses == second.train_losses
    assert first.eval_losses == second.eval_losses
    assert run(corpus, experiment, arm, seed=1).eval_losses != first.eval_losses


def test_every_arm_starts_from_the_same_weights_and_sees_the_same_batches(
    corpus: Corpus, experiment: Experiment
) -> None:
    records = [run(corpus, experiment, arm) for arm in ARMS]
    assert len({record.eval_losses[0] for record in records}) == 1
    # The first batch's loss comes before the first step.
    assert len({record.train_losses[0] for record in records}) == 1
    # With float32 weights a Kahan sum changes nothing.
    last = {record.arm: record.eval_losses[-1] for record in records}
    assert last.pop("normuon-kahan") == last["normuon"]
    assert len(set(last.values())) == len(last)


def test_every_arm_lowers_the_loss(corpus: Corpus, experiment: Experiment) -> None:
    longer = dataclasses.replace(
        experiment, training=dataclasses.replace(experiment.training, steps=30)
    )
    for arm in ARMS:
        record = run(corpus, longer, arm)
        assert record.final_loss is not None
        assert record.final_loss < record.eval_losses[0] - 0.3, arm


def test_a_kahan_sum_keeps_the_small_steps_that_bfloat16_weights_lose(
    corpus: Corpus, experiment: Experiment
) -> None:
    def falls_by(weights: str, arm: str) -> float:
        small = dataclasses.replace(
            experiment,
            weights=weights,
            training=dataclasses.replace(experiment.training, steps=40, schedule="constant"),
        )
        spec = RunSpec(arm=arm, seed=0, learning_rate=1e-5)
        record = train_run(spec, small, corpus)
        return record.eval_losses[0] - record.eval_losses[-1]

    wanted = falls_by("float32", "normuon")
    assert falls_by("bfloat16", "normuon-kahan") == pytest.approx(wanted, rel=0.1)
    assert falls_by("bfloat16", "normuon") < 0.7 * wanted


def test_measuring_updates_changes_nothing(corpus: Corpus, experiment: Experiment) -> None:
    for arm in ARMS:
        plain = run(corpus, experiment, arm)
        probed = run(corpus, experiment, arm, probe_updates=True)
        assert probed.eval_losses == plain.eval_losses
        assert not plain.updates
        # Three stages of four kinds of matrix in the one layer.
        assert len(probed.updates) == 12


def test_the_update_is_what_the_step_adds_without_decay() -> None:
    # float32 weights near 1 and lr 0.01: rounding of 6e-8 over 0.01 is 6e-6.
    torch.manual_seed(0)
    before, direction = torch.randn(5, 3), torch.randn(5, 3)
    lr, decay = 0.01, 0.1
    after = before * (1 - lr * decay) - lr * direction
    found = update_of(before, after, {"lr": lr, "weight_decay": decay}) / lr
    torch.testing.assert_close(found, direction.double(), atol=5e-5, rtol=0)


def test_normuon_moves_all_rows_alike_and_muon_flattens_the_spectrum(
    corpus: Corpus, experiment: Experiment
) -> None:
    def up_projection(arm: str) -> dict[str, list[float]]:
        updates = run(corpus, experiment, arm, probe_updates=True).updates
        return next(u for u in updates if "up_proj" in u["matrix"])

    adamw, muon, normuon = (up_projection(arm) for arm in ("adamw", "muon", "normuon"))
    assert spread(normuon["row_norms"]) < spread(muon["row_norms"])
    assert spread(muon["singular_values"]) < spread(adamw["singular_values"])


def test_described_matrix_by_hand() -> None:
    described = describe_matrix(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    assert described["shape"] == [3, 2]
    assert described["singular_values"] == [3.0, 2.0]
    assert described["row_norms"] == [3.0, 2.0, 0.0]
    assert described["frobenius_norm"] == pytest.approx(13**0.5, rel=1e-5)


def test_the_momentum_is_measured_where_it_is_orthogonalised(
    corpus: Corpus, experiment: Experiment
) -> None:
    def updates(arm: str) -> list[dict[str, Any]]:
        return run(corpus, experiment, arm, probe_updates=True).updates

    assert all("momentum" not in update for update in updates("adamw"))
    for arm in ("muon", "normuon"):
        for update in updates(arm):
            momentum = update["momentum"]
            assert momentum["shape"] == update["shape"]
            # What the update flattens is still steep here.
            assert spread(momentum["singular_values"]) > 3 * spread(update["singular_values"])


def test_conv1d_updates_have_their_neurons_as_rows(corpus: Corpus, experiment: Experiment) -> None:
    gpt2 = dataclasses.replace(
        experiment, model=dataclasses.replace(experiment.model, family="gpt2")
    )
    updates = run(corpus, gpt2, "normuon", probe_updates=True).updates
    shapes = {update["matrix"].split("h.0.")[1]: update["shape"] for update in updates}
    # transformers stores [in, out]; neurons are outputs.
    assert shapes["mlp.c_fc.weight"] == [32, 16]
    assert shapes["attn.c_attn.weight"] == [48, 16]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_initial_weights_depend_on_the_seed_alone(family: str) -> None:
    small = ModelConfig(family=family, num_layers=1, width=16, num_heads=2, mlp_width=32)
    config = small.to_transformers()
    torch.manual_seed(99)
    state = torch.random.get_rng_state()
    first = build_model(config, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    second = build_model(config, seed=0)
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    other = build_model(config, seed=1)
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


@pytest.mark.parametrize("arm", list(ARMS))
def test_every_parameter_has_one_optimizer_and_decay_is_on_hidden_matrices_only(arm: str) -> None:
    config = ModelConfig(num_layers=2, width=16, num_heads=2, mlp_width=32)
    model = build_model(config.to_transformers(), seed=0)
    hidden = {id(parameter) for _, parameter in split_parameters(model)[0]}
    seen: dict[int, float] = {}
    for optimizer in ARMS[arm].build(model, LEARNING_RATE):
        if isinstance(optimizer, EmaNesterov):
            continue  # It follows the steps of the others and trains nothing by itself.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in seen
                # What one step takes off; the two alone depend on how an arm counts its rate.
                seen[id(parameter)] = group["lr"] * group["weight_decay"]
    decay = 0.1 * LEARNING_RATE
    assert seen == pytest.approx({id(p): decay * (id(p) in hidden) for p in model.parameters()})
    # q, k, v, o, gate, up, down in each of two layers; embeddings and head are not among them.
    assert len(hidden) == 14


def test_a_run_that_diverges_stops_and_says_so(
    corpus: Corpus, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    original = train_module.next_token_loss

    def breaks(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += model.training and torch.is_grad_enabled()
        loss = original(model, inputs, targets)
        return loss * float("nan") if calls > 3 else loss

    monkeypatch.setattr(train_module, "next_token_loss", breaks)
    record = run(corpus, experiment)
    assert record.diverged
    assert len(record.train_losses) == 3
    assert all(loss == loss for loss in record.eval_losses)


def test_the_learning_rate_of_every_group_follows_the_schedule(
    corpus: Corpus, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[float]] = []

    class Recorder(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            seen.append({group["lr"] for group in self.param_groups})

    def build(model: nn.Module, lr: float, options: object) -> list[torch.optim.Optimizer]:
        parameters = list(model.parameters())
        return [Recorder([{"params": parameters[:1]}, {"params": parameters[1:]}], lr=lr)]

    monkeypatch.setattr(builders, "build_adamw", build)
    ten = dataclasses.replace(
        experiment,
        training=TrainConfig(steps=4, warmup_fraction=0.5, batch_size=4, eval_tokens=256),
    )
    run(corpus, ten, "adamw")
    assert [sorted(rates) for rates in seen] == [
        [pytest.approx(LEARNING_RATE * factor)] for factor in (0.5, 1.0, 1.0, 0.5)
    ]
