"""A sweep asks, runs, keeps and exports; what is kept is not run again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from normuon_lab.errors import InputError
from normuon_lab.study.search.searching import RunMany, do_rounds
from normuon_lab.study.search.sweep import Studies, SweepRequest
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from tests.lab.conftest import run_command

AXES = ("learning_rate", "adam_lr", "weight_decay")


def valley(spec: RunSpec) -> float:
    """Best at a learning rate of 0.004, AdamW's 0.016 and a decay of 1, times the seed's noise."""
    assert spec.options.adam_lr is not None
    distances = (
        math.log2(spec.learning_rate / 0.004),
        math.log2(spec.options.adam_lr / 0.016),
        math.log10(spec.options.weight_decay / 1.0),
    )
    return 2.0 + sum(distance**2 for distance in distances) + spec.seed / 1e6


def request_for(folder: Path, **changes: object) -> SweepRequest:
    values: dict[str, object] = {
        "name": "valley",
        "experiment": Experiment(),
        "arms": ("adamw", "normuon"),
        "axes": AXES,
        "seeds": (1000, 1001),
        "min_trials": 16,
        "max_trials": 40,
        "storage": folder / "sweep.db",
        "out": folder / "sweep.json",
        **changes,
    }
    return SweepRequest(**values)  # type: ignore[arg-type]


def sweep(
    request: SweepRequest, *, run_many: RunMany, save: Callable[[], None] = lambda: None
) -> dict[str, dict[str, Any]]:
    """The arms of the export, of all that the database keeps."""
    tried = request.tried_before({"arms": {}})
    do_rounds(request, tried, run_many=run_many, save=save)
    kept = Studies(request.storage, request.name)
    assert {arm: kept.trials(arm) for arm in request.arms} == tried
    return {arm: request.arm_to_json(tried[arm]) for arm in request.arms}


def runner(loss_of: Callable[[RunSpec], float | None], seen: list[RunSpec]) -> RunMany:
    def run_many(specs: Sequence[RunSpec]) -> dict[RunSpec, RunRecord]:
        seen.extend(specs)
        return {
            spec: RunRecord(
                arm=spec.arm,
                seed=spec.seed,
                learning_rate=spec.learning_rate,
                num_parameters=1,
                final_loss=loss_of(spec),
            )
            for spec in specs
        }

    return run_many


def test_the_bottom_of_a_valley_is_found_on_every_seed_with_equal_budgets(tmp_path: Path) -> None:
    request, seen, saves = request_for(tmp_path), [], []
    found = sweep(request, run_many=runner(valley, seen), save=lambda: saves.append(1))
    assert len({len(arm["trials"]) for arm in found.values()}) == 1
    for arm in found.values():
        assert arm["best"] == {"learning_rate": 0.004, "adam_lr": 0.016, "weight_decay": 1.0}
        assert arm["is_interior"]
        assert arm["mean_objective"] == pytest.approx(2.0 + 1000.5 / 1e6)
        assert all(set(trial["objectives"]) == {"1000", "1001"} for trial in arm["trials"])
    assert len(seen) == len(set(seen)) == 2 * 2 * len(found["adamw"]["trials"])
    assert len(saves) > 3


def test_a_sweep_that_was_interrupted_runs_only_what_is_missing(tmp_path: Path) -> None:
    whole: list[RunSpec] = []
    request = request_for(tmp_path / "whole")
    sweep(request, run_many=runner(valley, whole))
    request, seen, rounds = request_for(tmp_path / "cut"), [], 0

    def interrupt() -> None:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(request, run_many=runner(valley, seen), save=interrupt)
    assert 0 < len(seen) < len(whole)
    sweep(request, run_many=runner(valley, seen))
    assert sorted(seen, key=repr) == sorted(whole, key=repr)


def test_diverged_settings_lose_and_are_kept(tmp_path: Path) -> None:
    def loss_of(spec: RunSpec) -> float | None:
        return None if spec.learning_rate > 0.008 else valley(spec)

    request = request_for(tmp_path, arms=("adamw",))
    found = sweep(request, run_many=runner(loss_of, []))["adamw"]
    diverged = [trial for trial in found["trials"] if trial["mean_objective"] is None]
    assert diverged == [trial for trial in found["trials"] if trial["learning_rate"] > 0.008]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["best"]["learning_rate"] == 0.004


def test_axes_that_are_not_tuned_are_fixed(tmp_path: Path) -> None:
    seen: list[RunSpec] = []
    request = request_for(
        tmp_path,
        arms=("adamw",),
        axes=("learning_rate",),
        min_trials=3,
        fixed={"adamw": {"learning_rate": 9.0, "adam_lr": 0.016, "weight_decay": 0.3}},
    )
    sweep(request, run_many=runner(valley, seen))
    assert {(spec.options.adam_lr, spec.options.weight_decay) for spec in seen} == {(0.016, 0.3)}
    assert 0.004 in {spec.learning_rate for spec in seen}


def test_the_axes_of_a_request_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--axes beta: choose from learning_rate, "):
        request_for(tmp_path, axes=("learning_rate", "beta"))
    with pytest.raises(InputError, match="tunes learning_rate"):
        request_for(tmp_path, axes=("weight_decay",))


def test_the_command_resumes_from_its_database_and_from_its_export(
    tmp_path: Path, tiny_options: list[str]
) -> None:
    storage, out = tmp_path / "sweep.db", tmp_path / "sweep.json"
    words = ["sweep", *tiny_options, "--arms", "adamw", "--axes", "learning_rate", "--seeds", "1"]
    words += ["--storage", str(storage), "--out", str(out), "--max-trials"]

    first = run_command(*words, "2", "--trials", "2")
    # One start and two neighbours; so few trials cannot be interior, which is said.
    trials = json.loads(out.read_text())["arms"]["adamw"]["trials"]
    assert (first.code, len(trials)) in {(0, 3), (1, 3)}, first.stderr

    storage.unlink()
    again = run_command(*words, "3", "--trials", "3")
    assert again.stdout.count("validation loss") == 1, "the table's title alone: nothing was run"
    assert json.loads(out.read_text())["arms"]["adamw"]["trials"] == trials

    more = run_command(*words, "4", "--trials", "4")
    assert more.stdout.count("adamw seed 1000") == 1
    assert json.loads(out.read_text())["arms"]["adamw"]["trials"][:3] == trials

    other = run_command(*words, "4", "--trials", "4", "--width", "32")
    assert other.code == 2
    assert "was made with --width 16, not 32" in other.stderr
