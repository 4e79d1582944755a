"""Does the missing runs of the evidence, cell by cell, and repeats published ones.

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
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from normuon_lab.errors import InterruptedRunsError, require
from normuon_lab.machine import default_num_workers, describe_machine, utc_now
from normuon_lab.study.evidence import protocol
from normuon_lab.study.evidence.protocol import Cell, baselines_of, schedule_steps
from normuon_lab.study.evidence.runs import SWEEP_FILE, StoredRun, path_of, read_runs, write_run
from normuon_lab.study.search.searching import AXES, Setting, run_search, spec_of
from normuon_lab.study.search.sweep import SweepRequest, read_tuned_arms
from normuon_lab.train.arms.options import ArmOptions
from normuon_lab.train.arms.registry import MAIN_ARMS
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import load_task

LOWEST_RUNG = -8
HIGHEST_RUNG = 3

RungLosses = Mapping[str, Mapping[int, float]]
"""By arm and rung, the final loss of one seed or the mean of all; infinite where a run diverged."""

PROBED_SEED = protocol.CLAIM_SEEDS[0]
"""One seed is enough to see the shape of an update, and its numbers are many."""


def tune_cell(
    cell: Cell, arms: Sequence[str], *, results: Path, storage: Path, console: Console
) -> None:
    """Tune the arms of a cell, the main ones before those that take over their settings."""
    experiment = cell.experiment
    # Where runs stop at an accuracy, the evaluations are what finds it.
    if cell.target_accuracy is None:
        experiment = final_losses_alone(experiment)
    main = tuple(arm for arm in arms if arm in MAIN_ARMS)
    others = tuple(arm for arm in arms if arm not in MAIN_ARMS)
    for group, axes in ((main, tuple(AXES)), (others, ("learning_rate",))):
        if not group:
            continue
        fixed: dict[str, Setting] = {}
        for arm in others if group is others else ():
            fixed[arm] = tuned_setting(results, cell, protocol.INHERITED_FROM[arm], before=arm)
        request = SweepRequest(
            name=cell.name,
            experiment=experiment,
            arms=group,
            axes=axes,
            seeds=protocol.TUNING_SEEDS,
            min_trials=min(cell.tuning_trials(arm) for arm in group),
            max_trials=protocol.MAX_TUNING_TRIALS,
            storage=storage,
            out=results / cell.name / SWEEP_FILE,
            fixed=fixed,
            starts={arm: tuple(cell.starts[arm][name] for name in axes) for arm in group},
        )
        run_search(request, console)


def final_losses_alone(experiment: Experiment) -> Experiment:
    """Without evaluations before the end, which take a seventh of a small run and change
    nothing."""
    training = dataclasses.replace(experiment.training, num_evals=1)
    return dataclasses.replace(experiment, training=training)


def tuned_setting(results: Path, cell: Cell, arm: str, *, before: str) -> Setting:
    """The best setting of an arm."""
    tuned = read_tuned_arms(results / cell.name / SWEEP_FILE)
    require(arm in tuned, f"tune {arm} in {cell.name} before {before}")
    best: Setting = tuned[arm]["best"]
    return best


def claim_cell(cell: Cell, arms: Sequence[str], *, results: Path, console: Console) -> None:
    """Run the complete schedules that the claims on these arms need, rung after rung."""
    settings = {arm: tuned_setting(results, cell, arm, before="its claim runs") for arm in arms}
    while wanted := _missing(cell, arms, results=results):
        specs = [
            spec_of(arm, seed, settings[arm], steps=schedule_steps(cell.full_steps, rung))
            for arm, rung in wanted
            for seed in protocol.CLAIM_SEEDS
        ]
        do_runs(cell, specs, "claim", folder=results, console=console, probed_seed=PROBED_SEED)


def sensitivity_cell(cell: Cell, *, results: Path, console: Console) -> None:
    """Vary one hyperparameter of NorMuon at a time, at its tuned setting and full length."""
    setting = tuned_setting(results, cell, "normuon", before="its sensitivity")
    specs = [
        spec_of("normuon", seed, setting, steps=cell.full_steps, normuon=((name, value),))
        for name in cell.varied
        for value in protocol.SENSITIVITY[name]
        for seed in protocol.CLAIM_SEEDS
    ]
    do_runs(cell, specs, "sensitivity", folder=results, console=console)


def _missing(cell: Cell, arms: Sequence[str], *, results: Path) -> list[tuple[str, int]]:
    """Arm and rung still to run, so that the means and every single seed have their crossings."""
    rungs = range(LOWEST_RUNG, HIGHEST_RUNG + 1)
    rung_of = {schedule_steps(cell.full_steps, rung): rung for rung in rungs}
    losses: dict[tuple[str, int], dict[int, float]] = {}
    for record in (run.record for run in read_runs(results, cell.name)):
        if record.steps in rung_of and record.seed in protocol.CLAIM_SEEDS:
            loss = math.inf if record.final_loss is None else record.final_loss
            losses.setdefault((record.arm, rung_of[record.steps]), {})[record.seed] = loss
    views: list[dict[str, dict[int, float]]] = [{} for _ in range(1 + len(protocol.CLAIM_SEEDS))]
    for (arm, rung), by_seed in losses.items():
        if len(by_seed) == len(protocol.CLAIM_SEEDS):
            mean = math.fsum(by_seed.values()) / len(by_seed)
            values = [mean, *(by_seed[seed] for seed in protocol.CLAIM_SEEDS)]
            for view, value in zip(views, values, strict=True):
                view.setdefault(arm, {})[rung] = value
    if cell.target_accuracy is not None:
        return _missing_full(views[0], arms)
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
    if full := _missing_full(losses, arms):
        return full
    wanted = []
    for arm in arms:
        # Muon's own way to NorMuon's loss is Muon-rescale.
        baselines = (*baselines_of(arm), *(("normuon",) if arm == "muon" else ()))
        targets = [losses[name][0] for name in baselines if 0 in losses.get(name, {})]
        for rung in (_next_rung(losses[arm], target) for target in targets):
            if rung is not None and (arm, rung) not in wanted:
                wanted.append((arm, rung))
    return wanted


def _missing_full(losses: RungLosses, arms: Sequence[str]) -> list[tuple[str, int]]:
    return [(arm, 0) for arm in arms if 0 not in losses.get(arm, {})]


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


def do_runs(
    cell: Cell,
    specs: Sequence[RunSpec],
    purpose: str,
    *,
    folder: Path,
    console: Console,
    experiment: Experiment | None = None,
    probed_seed: int | None = None,
) -> None:
    """Do the runs that are not kept yet, and keep each as soon as it is finished.

    Args:
        cell: whose runs these are.
        specs: the runs; one that varies a hyperparameter of NorMuon's varies no other.
        purpose: see `StoredRun`.
        folder: the results' folder, or one that is laid out alike.
        console: where to show progress.
        experiment: the cell's unless given.
        probed_seed: whose runs of the full length measure their update matrices.
    """
    varied = {spec: next(iter(spec.options.normuon), None) for spec in specs}
    kept = {run.path for run in read_runs(folder, cell.name, purpose=purpose)}
    missing = [
        spec for spec in specs if path_of(cell.name, purpose, spec, varied[spec]) not in kept
    ]
    if not missing:
        return
    from normuon_lab.train.runs.workers import Job, execute

    experiment = experiment or cell.experiment
    task = load_task(experiment)
    provenance = {
        "experiment": experiment.to_json(),
        "corpus": task.to_json(),
        "machine": describe_machine(num_workers=default_num_workers(len(missing))),
    }

    def keep(spec: RunSpec, record: RunRecord) -> None:
        run = StoredRun(cell=cell.name, purpose=purpose, record=record, varied=varied[spec])
        write_run(folder, run, {**provenance, "created": utc_now()})

    jobs = [
        Job(spec, probe_updates=(spec.seed, spec.steps) == (probed_seed, cell.full_steps))
        for spec in missing
    ]
    try:
        execute(jobs, experiment, task, console=console, on_finished=keep)
    except KeyboardInterrupt:
        raise InterruptedRunsError(
            f"interrupted: finished runs are kept in {folder / cell.name}", can_resume=False
        ) from None


TOLERANCE = 0.02
"""Nats per token. Runs repeat bit by bit on one machine; another's kernels round differently, and
training spreads that: seeds of one arm differ by about 0.02."""


@dataclass(frozen=True, slots=True)
class Repeat:
    """A published run and its repetition."""

    published: RunRecord
    repeated: RunRecord

    @property
    def difference(self) -> float:
        """Repeated minus published final loss; infinite where only one of them diverged."""
        if self.published.diverged and self.repeated.diverged:
            return 0.0
        if self.published.final_loss is None or self.repeated.final_loss is None:
            return math.inf
        return self.repeated.final_loss - self.published.final_loss

    @property
    def verdict(self) -> str:
        """``"equal"``, ``"within tolerance"`` or ``"differs"``."""
        if self.difference == 0.0:
            return "equal"
        return "within tolerance" if abs(self.difference) <= TOLERANCE else "differs"


def repeat_runs(
    cell: Cell, *, seeds: Sequence[int], results: Path, console: Console
) -> list[Repeat]:
    """Repeat the main arms' full-length runs of a cell on some of the claim seeds."""
    published = {
        RunSpec(
            arm=run.record.arm,
            seed=run.record.seed,
            learning_rate=run.record.learning_rate,
            options=ArmOptions.from_json(run.record.options),
            steps=run.record.steps,
        ): run
        for run in read_runs(results, cell.name)
        if run.record.arm in MAIN_ARMS
        and run.record.seed in seeds
        and run.record.steps == cell.full_steps
    }
    require(bool(published), f"{results} holds no full-length runs of {cell.name} on those seeds")
    corpus = load_task(cell.experiment)
    for run in published.values():
        require(
            run.corpus_digest == corpus.digest,
            f"{run.path} was made from another text (SHA-256 {run.corpus_digest[:12]}..., not "
            f"{corpus.digest[:12]}...): the standard library of another Python, say",
        )
    from normuon_lab.train.runs.workers import execute_specs

    repeated = execute_specs(list(published), cell.experiment, corpus, console=console)
    return [Repeat(run.record, repeated[spec]) for spec, run in published.items()]


def table_of(repeats: Sequence[Repeat]) -> Table:
    """Published and repeated losses side by side."""
    table = Table(title="Final validation loss, nats per token")
    for title in ("run", "published", "repeated", "difference", ""):
        table.add_column(title, justify="left" if title in ("run", "") else "right")
    for repeat in repeats:
        record = repeat.published
        table.add_row(
            f"{record.arm} seed {record.seed}",
            *(_loss(run.final_loss) for run in (record, repeat.repeated)),
            f"{repeat.difference:+.2e}",
            repeat.verdict,
        )
    return table


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.6f}"
