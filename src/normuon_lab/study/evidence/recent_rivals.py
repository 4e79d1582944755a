"""Runs of the rivals of 2026: a small tuning of the learning rate, then seeds paired with Muon's.

They have a smaller budget than the arms of the protocol's cells, and a folder of their own under
``results``, laid out alike: a JSON file for every run, those of the tuning included.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from normuon_lab.errors import InterruptedRunsError, require
from normuon_lab.machine import default_num_workers, describe_machine, utc_now
from normuon_lab.study.evidence.protocol import (
    MAX_TUNING_TRIALS,
    RECENT_PARENT,
    RECENT_SEEDS,
    RECENT_STARTS,
    RECENT_TRIALS,
    RECENT_TUNING_SEEDS,
    Cell,
)
from normuon_lab.study.evidence.runs_store import SWEEP_FILE, StoredRun, read_runs, write_run
from normuon_lab.study.search.lattice import best_place, next_round
from normuon_lab.study.search.space import AXES, Place, Setting
from normuon_lab.study.search.sweep import read_tuned_arms
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import load_task

FOLDER = "recent-rivals"

RATES = AXES["learning_rate"]


def tune_rivals(cell: Cell, arms: Sequence[str], *, results: Path, console: Console) -> None:
    """Tune the learning rate of each arm, all else as tuned for Muon; finished runs are kept."""
    starts: dict[str, Place] = {arm: (RECENT_STARTS[arm],) for arm in arms}
    while True:
        known = tuning_losses(results, cell)
        wanted = next_round(
            {arm: known.get(arm, {}) for arm in arms},
            starts,
            min_trials=RECENT_TRIALS,
            max_trials=MAX_TUNING_TRIALS,
        )
        if not wanted:
            return
        specs = [
            _spec(cell, arm, seed, RATES.value(place[0]), results=results)
            for seed in RECENT_TUNING_SEEDS
            for arm, places in wanted.items()
            for place in places
        ]
        done = {(run.arm, run.seed, run.learning_rate) for run in _records(results, cell, "tuning")}
        missing = [spec for spec in specs if (spec.arm, spec.seed, spec.learning_rate) not in done]
        _run(cell, missing, "tuning", results=results, console=console)


def compare_rivals(cell: Cell, arms: Sequence[str], *, results: Path, console: Console) -> None:
    """Train each arm at its best rate on the seeds that are compared, one seed after another."""
    known = tuning_losses(results, cell)
    for arm in arms:
        require(bool(known.get(arm)), f"tune {arm} in {cell.name} before its claim runs")
    done = {(run.arm, run.seed) for run in _records(results, cell, "claim")}
    specs = [
        _spec(cell, arm, seed, RATES.value(best_place(known[arm])[0]), results=results)
        for seed in RECENT_SEEDS
        for arm in arms
        if (arm, seed) not in done
    ]
    _run(cell, specs, "claim", results=results, console=console)


def tuning_losses(results: Path, cell: Cell) -> dict[str, dict[Place, float]]:
    """By arm and place on the axis of rates, the mean final loss of the tuning seeds.

    Infinite where a run diverged. Places are in the order of a search, and those without all seeds
    are left out.
    """
    found: dict[str, dict[Place, dict[int, float]]] = {}
    for run in _records(results, cell, "tuning"):
        place = (round(2 * math.log(run.learning_rate / RATES.base, RATES.ratio)) / 2,)
        loss = math.inf if run.final_loss is None else run.final_loss
        found.setdefault(run.arm, {}).setdefault(place, {})[run.seed] = loss
    return {arm: _means(arm, by_place) for arm, by_place in found.items()}


def _means(arm: str, by_place: Mapping[Place, Mapping[int, float]]) -> dict[Place, float]:
    # Nearest to the start first: of equal places the search keeps the one it tried first.
    places = sorted(by_place, key=lambda place: (abs(place[0] - RECENT_STARTS[arm]), place))
    return {
        place: math.fsum(by_place[place].values()) / len(RECENT_TUNING_SEEDS)
        for place in places
        if set(by_place[place]) == set(RECENT_TUNING_SEEDS)
    }


def compared_runs(results: Path, cell: Cell) -> dict[str, list[RunRecord]]:
    """By arm, the runs that are compared, in order of seeds."""
    found: dict[str, list[RunRecord]] = {}
    for run in sorted(_records(results, cell, "claim"), key=lambda run: run.seed):
        found.setdefault(run.arm, []).append(run)
    return found


def _records(results: Path, cell: Cell, purpose: str) -> list[RunRecord]:
    return [run.record for run in read_runs(results / FOLDER, cell.name, purpose=purpose)]


def _spec(cell: Cell, arm: str, seed: int, learning_rate: float, *, results: Path) -> RunSpec:
    tuned = read_tuned_arms(results / cell.name / SWEEP_FILE)
    require(RECENT_PARENT in tuned, f"tune {RECENT_PARENT} in {cell.name} before {arm}")
    setting = Setting(**tuned[RECENT_PARENT]["best"])
    return RunSpec(
        arm=arm,
        seed=seed,
        learning_rate=learning_rate,
        options=setting.options(),
        steps=cell.experiment.training.steps,
    )


def _run(
    cell: Cell, specs: Sequence[RunSpec], purpose: str, *, results: Path, console: Console
) -> None:
    if not specs:
        return
    from normuon_lab.train.runs.execution import execute
    from normuon_lab.train.runs.workers import Job

    experiment = _evaluated_at_the_end(cell.experiment)
    task = load_task(experiment)
    provenance = {
        "experiment": experiment.to_json(),
        "corpus": task.to_json(),
        "machine": describe_machine(num_workers=default_num_workers(len(specs))),
    }

    def keep(spec: RunSpec, record: RunRecord) -> None:
        run = StoredRun(cell=cell.name, purpose=purpose, record=record)
        write_run(results / FOLDER, run, {**provenance, "created": utc_now()})

    jobs = [Job(spec) for spec in specs]
    try:
        execute(jobs, experiment, task, console=console, on_finished=keep)
    except KeyboardInterrupt:
        raise InterruptedRunsError(
            f"interrupted: finished runs are kept in {results / FOLDER}", can_resume=False
        ) from None


def _evaluated_at_the_end(experiment: Experiment) -> Experiment:
    """Final losses alone are compared, and evaluations take a seventh of a small run."""
    training = dataclasses.replace(experiment.training, num_evals=1)
    return dataclasses.replace(experiment, training=training)
