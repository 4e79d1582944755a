"""The evidence of a tiny cell, really trained: tuned, claimed, varied, and resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from normuon_lab.errors import InputError
from normuon_lab.study.evidence import protocol, running
from normuon_lab.study.evidence.protocol import ARITHMETIC_STARTS, Cell
from normuon_lab.study.evidence.running import repeat_runs
from normuon_lab.study.evidence.runs import read_runs
from normuon_lab.train.runs.config import (
    Experiment,
    ModelConfig,
    ModularAddition,
    RunSpec,
    TrainConfig,
)

ARMS = ("adamw", "muon", "normuon", "rmnp")


@pytest.fixture
def trained(trained_here: list[RunSpec], monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """Trains in this process, and remembers what; workers have tests of their own."""
    monkeypatch.setattr(protocol, "TUNING_SEEDS", (1000,))
    monkeypatch.setattr(protocol, "CLAIM_SEEDS", (0, 1))
    monkeypatch.setattr(protocol, "MAX_TUNING_TRIALS", 3)
    monkeypatch.setattr(protocol, "SENSITIVITY", VARIED)
    return trained_here


VARIED = {"beta2": (0.5,), "momentum_dtype": ("int8",)}


class TinyCell(Cell):
    def tuning_trials(self, arm: str) -> int:
        return 2


def test_a_cell_is_tuned_claimed_and_varied_and_nothing_is_run_twice(
    tmp_path: Path, experiment: Experiment, trained: list[RunSpec]
) -> None:
    cell = TinyCell(
        name="tiny", task="words", size="tiny", experiment=experiment, varied=tuple(VARIED)
    )
    console, results = Console(quiet=True), tmp_path / "results"

    def tune() -> None:
        running.tune_cell(
            cell,
            ARMS,
            results=results,
            storage=tmp_path / "runs" / "evidence.db",
            console=console,
        )

    tune()
    contents = json.loads((results / "tiny" / "sweep.json").read_text())
    assert list(contents["arms"]) == list(ARMS)
    muon, rmnp = contents["arms"]["muon"], contents["arms"]["rmnp"]
    assert rmnp["axes"] == ["learning_rate"]
    for name in ("adam_lr", "weight_decay"):
        assert {trial[name] for trial in rmnp["trials"]} == {muon["best"][name]}
    tuned = len(trained)
    tune()
    assert len(trained) == tuned, "a second tuning runs nothing"

    running.claim_cell(cell, ARMS, results=results, console=console)
    runs = [run.record for run in read_runs(results, "tiny")]
    full = experiment.training.steps
    for arm in ARMS:
        best = contents["arms"][arm]["best"]
        of_arm = [run for run in runs if run.arm == arm]
        assert {run.seed for run in of_arm if run.steps == full} == {0, 1}
        assert {run.learning_rate for run in of_arm} == {best["learning_rate"]}
        assert {run.options["adam_lr"] for run in of_arm} == {best["adam_lr"]}
        assert all(len(run.train_losses) == run.steps for run in of_arm)
    assert [run.arm for run in runs if run.updates] == sorted(ARMS)
    assert all(run.seed == 0 and run.steps == full for run in runs if run.updates)

    removed = results / "tiny" / "runs" / f"muon-n{full}-s1.json"
    removed.unlink()
    before = len(trained)
    running.claim_cell(cell, ARMS, results=results, console=console)
    assert [(spec.arm, spec.seed, spec.steps) for spec in trained[before:]] == [("muon", 1, full)]

    running.sensitivity_cell(cell, results=results, console=console)
    before = len(trained)
    running.sensitivity_cell(cell, results=results, console=console)
    assert len(trained) == before
    varied = read_runs(results, "tiny", purpose="sensitivity")
    assert {run.varied for run in varied} == {("beta2", 0.5), ("momentum_dtype", "int8")}
    assert all(run.record.options["normuon"] == dict([run.varied]) for run in varied if run.varied)


def test_published_runs_repeat_bit_by_bit_and_a_changed_one_is_told(
    tmp_path: Path, experiment: Experiment, trained: list[RunSpec]
) -> None:
    cell = TinyCell(name="tiny", task="words", size="tiny", experiment=experiment)
    console, arms = Console(quiet=True), ("adamw", "normuon")
    running.tune_cell(
        cell,
        arms,
        results=tmp_path,
        storage=tmp_path / "evidence.db",
        console=console,
    )
    running.claim_cell(cell, arms, results=tmp_path, console=console)
    repeats = repeat_runs(cell, seeds=(0,), results=tmp_path, console=console)
    assert [repeat.published.arm for repeat in repeats] == ["adamw", "normuon"]
    assert [repeat.verdict for repeat in repeats] == ["equal", "equal"]

    path = tmp_path / "tiny" / "runs" / f"normuon-n{experiment.training.steps}-s0.json"
    stored = json.loads(path.read_text())
    stored["run"]["final_loss"] += 1e-3
    path.write_text(json.dumps(stored))
    repeats = repeat_runs(cell, seeds=(0,), results=tmp_path, console=console)
    assert [repeat.verdict for repeat in repeats] == ["equal", "within tolerance"]
    stored["run"]["final_loss"] += 1.0
    path.write_text(json.dumps(stored))
    repeats = repeat_runs(cell, seeds=(0,), results=tmp_path, console=console)
    assert [repeat.verdict for repeat in repeats] == ["equal", "differs"]

    stored["corpus"]["sha256"] = "another"
    path.write_text(json.dumps(stored))
    with pytest.raises(InputError, match="was made from another text"):
        repeat_runs(cell, seeds=(0,), results=tmp_path, console=console)
    with pytest.raises(InputError, match="no full-length runs of tiny"):
        repeat_runs(cell, seeds=(7,), results=tmp_path, console=console)


def test_arithmetic_is_tuned_by_the_steps_it_takes_and_claimed_at_one_length(
    tmp_path: Path, trained: list[RunSpec]
) -> None:
    experiment = Experiment(
        model=ModelConfig(
            num_layers=1, width=16, num_heads=2, mlp_width=32, sequence_length=3, vocab_size=6
        ),
        training=TrainConfig(
            steps=10, batch_size=8, num_evals=5, eval_tokens=30, stop_at_accuracy=0.2
        ),
        data=ModularAddition(modulus=5, train_share=0.5),
    )
    cell = TinyCell(
        name="arithmetic", task="sums", size="tiny", experiment=experiment, starts=ARITHMETIC_STARTS
    )
    console, arms = Console(quiet=True), ("adamw", "normuon")
    running.tune_cell(
        cell,
        arms,
        results=tmp_path,
        storage=tmp_path / "evidence.db",
        console=console,
    )
    first = next(spec for spec in trained if spec.arm == "normuon")
    assert (first.learning_rate, first.options.weight_decay) == (0.004, 0.316227766017)
    contents = json.loads((tmp_path / "arithmetic" / "sweep.json").read_text())
    for arm in contents["arms"].values():
        assert all(0.0 <= t["mean_objective"] <= 15.0 for t in arm["trials"]), "steps, not nats"
    running.claim_cell(cell, arms, results=tmp_path, console=console)
    runs = [run.record for run in read_runs(tmp_path, "arithmetic")]
    assert {(run.arm, run.seed, run.steps) for run in runs} == {
        (arm, seed, 10) for arm in arms for seed in (0, 1)
    }
    assert all(run.eval_accuracies for run in runs)


def test_nothing_is_claimed_of_an_arm_that_was_not_tuned(
    tmp_path: Path, experiment: Experiment
) -> None:
    cell = Cell(name="tiny", task="words", size="tiny", experiment=experiment)
    with pytest.raises(InputError, match="tune adamw in tiny before its claim runs"):
        running.claim_cell(cell, ("adamw",), results=tmp_path, console=Console(quiet=True))
