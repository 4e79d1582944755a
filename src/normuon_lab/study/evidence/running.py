"""Does the missing runs of the evidence, cell by cell: tuning, then the runs behind claims.

Every arm runs the full length on every claim seed. Then lengths are added, one rung of the ladder
of complete schedules at a time, until the crossing of each target lies between two neighbouring
lengths: downwards while an arm is at or below the target, upwards while it is above. Targets are
the final losses of an arm's baselines at the full length, and, between Muon and NorMuon, the
other's; of the means over seeds, and of every seed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from normuon_lab.errors import InterruptedRunsError, require
from normuon_lab.machine import default_num_workers, describe_machine, utc_now
from normuon_lab.study.evidence.protocol import (
    CLAIM_SEEDS,
    INHERITED_FROM,
    MAX_TUNING_TRIALS,
    SENSITIVITY,
    TUNING_SEEDS,
    Cell,
    baselines_of,
    schedule_steps,
)
from normuon_lab.study.evidence.runs_store import SWEEP_FILE, StoredRun, read_runs, write_run
from normuon_lab.study.search.searching import run_search
from normuon_lab.study.search.space import AXES, Setting
from normuon_lab.study.search.sweep import SweepRequest, read_tuned_arms
from normuon_lab.train.arms.registry import MAIN_ARMS
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import load_task

LOWEST_RUNG = -8
HIGHEST_RUNG = 3

RungLosses = Mapping[str, Mapping[int, float]]
"""By arm and rung, the final loss of one seed or the mean of all; infinite where a run diverged."""

PROBED_SEED = CLAIM_SEEDS[0]
"""One seed is enough to see the shape of an update, and its numbers are many."""


def tune_cell(
    cell: Cell, arms: Sequence[str], *, results: Path, storage: Path, console: Console, command: str
) -> None:
    """Tune the arms of a cell, the main ones before those that take over their settings."""
    experiment = cell.experiment
    # Where runs stop at an accuracy, the evaluations are what finds it.
    if cell.has_ladder:
        experiment = final_losses_alone(experiment)
    main = tuple(arm for arm in arms if arm in MAIN_ARMS)
    others = tuple(arm for arm in arms if arm not in MAIN_ARMS)
    for group, axes in ((main, tuple(AXES)), (others, ("learning_rate",))):
        if not group:
            continue
        fixed: dict[str, Mapping[str, float | None]] = {}
        if group is others:
            settings = tuned_settings(results, cell)
            for arm in others:
                parent = INHERITED_FROM[arm]
                require(parent in settings, f"tune {parent} in {cell.name} before {arm}")
                fixed[arm] = settings[parent].to_json()
        request = SweepRequest(
            name=cell.name,
            experiment=experiment,
            arms=group,
            axes=axes,
            seeds=TUNING_SEEDS,
            min_trials=min(cell.tuning_trials(arm) for arm in group),
            max_trials=MAX_TUNING_TRIALS,
            storage=storage,
            out=results / cell.name / SWEEP_FILE,
            fixed=fixed,
            starts={arm: tuple(cell.starts[arm][name] for name in axes) for arm in group},
        )
        run_search(request, console, command=command)


def final_losses_alone(experiment: Experiment) -> Experiment:
    """Without evaluations before the end, which take a seventh of a small run and change
    nothing."""
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
        known = {(record.arm, record.steps, record.seed) for record in records}
        specs = [
            settings[arm].spec(arm, seed, steps=steps)
            for arm, steps in ((arm, schedule_steps(full, rung)) for arm, rung in wanted)
            for seed in CLAIM_SEEDS
            if (arm, steps, seed) not in known
        ]
        do_runs(cell, specs, "claim", folder=results, console=console, probed_seed=PROBED_SEED)


def sensitivity_cell(cell: Cell, *, results: Path, console: Console) -> None:
    """Vary one hyperparameter of NorMuon at a time, at its tuned setting and full length."""
    settings = tuned_settings(results, cell)
    require("normuon" in settings, f"tune normuon in {cell.name} before its sensitivity")
    done = {
        (run.varied, run.record.seed)
        for run in read_runs(results, cell.name, purpose="sensitivity")
    }
    steps = cell.experiment.training.steps
    varied = {
        settings["normuon"].spec("normuon", seed, steps=steps, normuon=(change,)): change
        for change in ((name, value) for name in cell.varied for value in SENSITIVITY[name])
        for seed in CLAIM_SEEDS
        if (change, seed) not in done
    }
    do_runs(cell, list(varied), "sensitivity", folder=results, console=console, varied=varied)


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


def missing_rungs(losses: RungLosses, arms: Sequence[str]) -> list[tuple[str, int]]:
    """Arm and rung of the complete schedules to run next; empty when all targets are bracketed.

    `losses` has all claim seeds of a rung or none.

    Example:
        >>> missing_rungs({}, ["adamw", "normuon"])
        [('adamw', 0), ('normuon', 0)]
        >>> missing_rungs({"adamw": {0: 2.0}, "normuon": {0: 1.8}}, ["adamw", "normuon"])
        [('normuon', -1)]
        >>> missing_rungs({"adamw": {0: 2.0}, "normuon": {0: 1.8, -1: 2.1}}, ["adamw", "normuon"])
        []
    """
    full = missing_full(losses, arms)
    if full:
        return full
    wanted = []
    for arm in arms:
        for target in _targets(losses, arm):
            rung = _next_rung(losses[arm], target)
            if rung is not None and (arm, rung) not in wanted:
                wanted.append((arm, rung))
    return wanted


def missing_full(losses: RungLosses, arms: Sequence[str]) -> list[tuple[str, int]]:
    """The arms without the full length, each with its rung, 0."""
    return [(arm, 0) for arm in arms if 0 not in losses.get(arm, {})]


def _targets(losses: RungLosses, arm: str) -> list[float]:
    """The losses whose crossing an arm's schedules must bracket."""
    # Muon's own way to NorMuon's loss is Muon-rescale.
    baselines = (*baselines_of(arm), *(("normuon",) if arm == "muon" else ()))
    return [losses[name][0] for name in baselines if 0 in losses.get(name, {})]


def _next_rung(by_rung: Mapping[int, float], target: float) -> int | None:
    """The neighbour to run next; None when the crossing is bracketed, or too far away to look."""
    if not math.isfinite(target):
        return None
    reached = [rung for rung, loss in by_rung.items() if loss <= target]
    if not reached:
        rung = max(by_rung) + 1
        return rung if rung <= HIGHEST_RUNG else None
    # Contiguous from the full length: the nearest rung below the lowest that reached the target.
    rung = min(reached) - 1
    return rung if rung not in by_rung and rung >= LOWEST_RUNG else None


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


def do_runs(
    cell: Cell,
    specs: Sequence[RunSpec],
    purpose: str,
    *,
    folder: Path,
    console: Console,
    experiment: Experiment | None = None,
    varied: Mapping[RunSpec, tuple[str, Any]] | None = None,
    probed_seed: int | None = None,
) -> None:
    """Do runs and keep each below `folder` as soon as it is finished.

    Args:
        cell: whose runs these are.
        specs: the runs.
        purpose: see `StoredRun`.
        folder: the results' folder, or one that is laid out alike.
        console: where to show progress.
        experiment: the cell's unless given.
        varied: by run, the hyperparameter that it varies and its value.
        probed_seed: whose runs of the full length measure their update matrices.
    """
    if not specs:
        return
    from normuon_lab.train.runs.execution import execute
    from normuon_lab.train.runs.workers import Job

    experiment = experiment or cell.experiment
    task = load_task(experiment)
    provenance = {
        "experiment": experiment.to_json(),
        "corpus": task.to_json(),
        "machine": describe_machine(num_workers=default_num_workers(len(specs))),
    }

    def keep(spec: RunSpec, record: RunRecord) -> None:
        change = varied[spec] if varied else None
        run = StoredRun(cell=cell.name, purpose=purpose, record=record, varied=change)
        write_run(folder, run, {**provenance, "created": utc_now()})

    full = cell.experiment.training.steps
    jobs = [
        Job(spec, probe_updates=spec.seed == probed_seed and spec.steps == full) for spec in specs
    ]
    try:
        execute(jobs, experiment, task, console=console, on_finished=keep)
    except KeyboardInterrupt:
        raise InterruptedRunsError(
            f"interrupted: finished runs are kept in {folder / cell.name}", can_resume=False
        ) from None
