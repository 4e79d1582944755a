"""Does what is missing of the evidence, cell by cell: tuning, then the runs that claims rest on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from normuon_lab.errors import InterruptedRunsError, require
from normuon_lab.machine import default_num_workers, describe_machine, utc_now
from normuon_lab.study.evidence.claims import HIGHEST_RUNG, LOWEST_RUNG, missing_full, missing_rungs
from normuon_lab.study.evidence.protocol import (
    CLAIM_SEEDS,
    INHERITED_FROM,
    MAX_TUNING_TRIALS,
    SENSITIVITY,
    TUNING_SEEDS,
    Cell,
    schedule_steps,
)
from normuon_lab.study.evidence.runs_store import SWEEP_FILE, StoredRun, read_runs, write_run
from normuon_lab.study.sweep.export import read_tuned_arms
from normuon_lab.study.sweep.space import AXES, Setting
from normuon_lab.study.sweep.sweeping import SweepRequest, run_sweep
from normuon_lab.train.arms.registry import MAIN_ARMS
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import load_task

PROBED_SEED = CLAIM_SEEDS[0]
"""One seed is enough to see the shape of an update, and its numbers are many."""


def tune_cell(
    cell: Cell, arms: Sequence[str], *, results: Path, storage: Path, console: Console, command: str
) -> None:
    """Tune the arms of a cell, the main ones before those that take over their settings."""
    main = tuple(arm for arm in arms if arm in MAIN_ARMS)
    others = tuple(arm for arm in arms if arm not in MAIN_ARMS)
    for group, axes in ((main, tuple(AXES)), (others, ("learning_rate",))):
        if not group:
            continue
        settings = tuned_settings(results, cell) if group is others else {}
        for arm in group if group is others else ():
            parent = INHERITED_FROM[arm]
            require(parent in settings, f"tune {parent} in {cell.name} before {arm}")
        request = SweepRequest(
            name=cell.name,
            experiment=_evaluated_at_the_end(cell.experiment),
            arms=group,
            axes=axes,
            seeds=TUNING_SEEDS,
            min_trials=min(cell.tuning_trials(arm) for arm in group),
            max_trials=MAX_TUNING_TRIALS,
            storage=storage,
            out=results / cell.name / SWEEP_FILE,
            fixed={arm: settings[INHERITED_FROM[arm]].to_json() for arm in group}
            if group is others
            else {},
            starts={arm: tuple(cell.starts[arm][name] for name in axes) for arm in group},
        )
        run_sweep(request, console, command=command)


def _evaluated_at_the_end(experiment: Experiment) -> Experiment:
    """Tuning looks at final losses alone, and evaluations take a seventh of a small run.

    Where runs stop at an accuracy, the evaluations are what finds it.
    """
    if experiment.training.stop_at_accuracy is not None:
        return experiment
    training = dataclasses.replace(experiment.training, num_evals=1)
    return dataclasses.replace(experiment, training=training)


def tuned_settings(results: Path, cell: Cell) -> dict[str, Setting]:
    """The best setting of every arm that was tuned."""
    tuned = read_tuned_arms(results / cell.name / SWEEP_FILE)
    return {name: Setting(**arm["best"]) for name, arm in tuned.items()}


def claim_cell(cell: Cell, arms: Sequence[str], *, results: Path, console: Console) -> None:
    """Run the complete schedules that the claims on these arms need, rung after rung."""
    settings = tuned_settings(results, cell)
    for arm in arms:
        require(arm in settings, f"tune {arm} in {cell.name} before its claim runs")
    full = cell.experiment.training.steps
    while True:
        records = [run.record for run in read_runs(results, cell.name)]
        wanted = _missing(_losses_by_rung(records, full), arms, has_ladder=cell.has_ladder)
        if not wanted:
            return
        specs = [
            _spec(arm, seed, settings[arm], schedule_steps(full, rung))
            for arm, rung in wanted
            for seed in CLAIM_SEEDS
        ]
        known = {(record.arm, record.steps, record.seed) for record in records}
        missing = [spec for spec in specs if (spec.arm, spec.steps, spec.seed) not in known]
        _run(cell, missing, results=results, console=console)


def sensitivity_cell(cell: Cell, *, results: Path, console: Console) -> None:
    """Vary one hyperparameter of NorMuon at a time, at its tuned setting and full length."""
    settings = tuned_settings(results, cell)
    require("normuon" in settings, f"tune normuon in {cell.name} before its sensitivity")
    done = {
        (run.varied, run.record.seed)
        for run in read_runs(results, cell.name, purpose="sensitivity")
    }
    varied: dict[RunSpec, tuple[str, Any]] = {}
    for parameter, values in SENSITIVITY.items():
        for value in values:
            for seed in CLAIM_SEEDS:
                if ((parameter, value), seed) not in done:
                    spec = _spec(
                        "normuon",
                        seed,
                        settings["normuon"],
                        cell.experiment.training.steps,
                        normuon=((parameter, value),),
                    )
                    varied[spec] = (parameter, value)
    _run(cell, list(varied), results=results, console=console, varied=varied)


def _spec(
    arm: str,
    seed: int,
    setting: Setting,
    steps: int,
    *,
    normuon: tuple[tuple[str, Any], ...] = (),
) -> RunSpec:
    return RunSpec(
        arm=arm,
        seed=seed,
        learning_rate=setting.learning_rate,
        options=setting.options(normuon=normuon),
        steps=steps,
    )


def _missing(
    losses: Mapping[tuple[str, int], Mapping[int, float]], arms: Sequence[str], *, has_ladder: bool
) -> list[tuple[str, int]]:
    """Arm and rung still to run, so that the means and every single seed have their crossings."""
    views: list[dict[str, dict[int, float]]] = [{} for _ in range(1 + len(CLAIM_SEEDS))]
    for (arm, rung), by_seed in losses.items():
        if len(by_seed) == len(CLAIM_SEEDS):
            mean = math.fsum(by_seed.values()) / len(by_seed)
            values = [mean, *(by_seed[seed] for seed in CLAIM_SEEDS)]
            for view, value in zip(views, values, strict=True):
                view.setdefault(arm, {})[rung] = value
    if not has_ladder:
        return missing_full(views[0], arms)
    return sorted({wanted for view in views for wanted in missing_rungs(view, arms)})


def _losses_by_rung(
    records: Sequence[RunRecord], full: int
) -> dict[tuple[str, int], dict[int, float]]:
    """Final losses by arm and rung, and by seed; infinite where a run diverged."""
    rung_of = {schedule_steps(full, rung): rung for rung in range(LOWEST_RUNG, HIGHEST_RUNG + 1)}
    losses: dict[tuple[str, int], dict[int, float]] = {}
    for record in records:
        if record.steps in rung_of and record.seed in CLAIM_SEEDS:
            loss = math.inf if record.final_loss is None else record.final_loss
            losses.setdefault((record.arm, rung_of[record.steps]), {})[record.seed] = loss
    return losses


def _run(
    cell: Cell,
    specs: Sequence[RunSpec],
    *,
    results: Path,
    console: Console,
    varied: Mapping[RunSpec, tuple[str, Any]] | None = None,
) -> None:
    if not specs:
        return
    from normuon_lab.train.runs.execution import execute
    from normuon_lab.train.runs.workers import Job

    task = load_task(cell.experiment)
    provenance = {
        "experiment": cell.experiment.to_json(),
        "corpus": task.to_json(),
        "machine": describe_machine(num_workers=default_num_workers(len(specs))),
    }

    def keep(spec: RunSpec, record: RunRecord) -> None:
        run = StoredRun(
            cell=cell.name,
            purpose="claim" if varied is None else "sensitivity",
            record=record,
            varied=None if varied is None else varied[spec],
        )
        write_run(results, run, {**provenance, "created": utc_now()})

    full = cell.experiment.training.steps
    jobs = [
        Job(spec, probe_updates=not varied and spec.seed == PROBED_SEED and spec.steps == full)
        for spec in specs
    ]
    try:
        execute(jobs, cell.experiment, task, console=console, on_finished=keep)
    except KeyboardInterrupt:
        raise InterruptedRunsError(
            f"interrupted: finished runs are kept in {results / cell.name}", can_resume=False
        ) from None
