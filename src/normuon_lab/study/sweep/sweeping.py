"""Does a sweep: `search.py` says what to try, `study.py` keeps it, and an export is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from normuon_lab.atomic_files import prove_file, read_json, write_json
from normuon_lab.config_difference import first_difference
from normuon_lab.errors import InputError, InterruptedRunsError, require
from normuon_lab.machine import default_num_workers, describe_machine, utc_now
from normuon_lab.study.sweep.export import KIND, SCHEMA_VERSION
from normuon_lab.study.sweep.search import Losses, best_place, is_interior, next_round
from normuon_lab.study.sweep.space import AXES, Place, Setting, in_order, setting_at
from normuon_lab.study.sweep.study import Studies, Trial
from normuon_lab.train.arms.registry import check_arms
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord, objective, objective_name
from normuon_lab.train.runs.tasks import Task, load_task

RunMany = Callable[[Sequence[RunSpec]], Mapping[RunSpec, RunRecord]]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest:
    """What to sweep, and where to keep it.

    Attributes:
        name: of the sweep, in the database and in its export.
        axes: hyperparameters to tune, of `space.AXES`.
        fixed: by arm, the values of the axes that are not tuned.
        starts: by arm, the place where its search begins; the axes' own where an arm has none.
        storage: the SQLite file.
        out: the export, rewritten after every round.
    """

    name: str
    experiment: Experiment
    arms: tuple[str, ...]
    axes: tuple[str, ...]
    seeds: tuple[int, ...]
    min_trials: int
    max_trials: int
    storage: Path
    out: Path
    fixed: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    starts: Mapping[str, Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_arms(self.arms)
        require(in_order(self.axes) == self.axes, "the axes come in the order of a search")
        require(len(self.seeds) > 0, "a sweep needs at least one seed")
        require(
            1 <= self.min_trials <= self.max_trials,
            f"--trials {self.min_trials} must be between 1 and --max-trials {self.max_trials}",
        )

    def start(self, arm: str) -> Place:
        """Where the search of an arm begins."""
        return self.starts.get(arm) or tuple(float(AXES[name].start) for name in self.axes)

    def setting(self, arm: str, place: Place) -> Setting:
        """The hyperparameters of an arm at a place."""
        return setting_at(self.axes, place, self.fixed.get(arm, {}))

    def spec(self, arm: str, place: Place, seed: int) -> RunSpec:
        """The run of an arm at a place."""
        setting = self.setting(arm, place)
        return RunSpec(
            arm=arm,
            seed=seed,
            learning_rate=setting.learning_rate,
            options=setting.options(),
        )


def sweep(
    request: SweepRequest, studies: Studies, *, run_many: RunMany, save: Callable[[], None]
) -> None:
    """Round by round, try what every arm wants next, until none wants more.

    Args:
        request: what to sweep.
        studies: what was tried; grows.
        run_many: does the runs.
        save: called after every round.
    """
    starts = {arm: request.start(arm) for arm in request.arms}
    while True:
        wanted = next_round(
            {arm: losses_of(studies.trials(arm)) for arm in request.arms},
            starts,
            min_trials=request.min_trials,
            max_trials=request.max_trials,
        )
        if not wanted:
            return
        records = run_many(
            [
                request.spec(arm, place, seed)
                for seed in request.seeds
                for arm, places in wanted.items()
                for place in places
            ]
        )
        for arm, places in wanted.items():
            studies.add(arm, [_trial(request, arm, place, records) for place in places])
        save()


def _trial(
    request: SweepRequest, arm: str, place: Place, records: Mapping[RunSpec, RunRecord]
) -> Trial:
    return Trial(
        place=place,
        setting=request.setting(arm, place),
        objectives={
            seed: objective(records[request.spec(arm, place, seed)], request.experiment.training)
            for seed in request.seeds
        },
    )


def losses_of(trials: Sequence[Trial]) -> Losses:
    """The mean final losses of trials by place."""
    return {trial.place: trial.mean for trial in trials}


def run_sweep(request: SweepRequest, console: Console, *, command: str) -> dict[str, Any]:
    """Do what is missing of a sweep; resumes from its database or, without one, from its export.

    Args:
        request: what to sweep.
        console: where to show progress.
        command: the command line, for the record.

    Returns:
        The export.

    Raises:
        InputError: the request cannot be served, or the export is of another configuration.
        RunsFailedError: a run failed; finished rounds are kept.
        InterruptedRunsError: Ctrl-C came; finished rounds are kept.
    """
    prove_file(request.out, f"--out {request.out}")
    prove_file(request.storage, f"--storage {request.storage}")
    task = load_task(request.experiment)
    contents = _opened(request, task)
    contents["command"] = command
    studies = Studies(request.storage, request.name)
    for arm in request.arms:
        known = contents["arms"].get(arm, {}).get("trials", [])
        studies.fill(arm, [Trial.from_json(values) for values in known])
    contents["machine"] = describe_machine(
        num_workers=default_num_workers(len(request.arms) * len(request.seeds))
    )
    from normuon_lab.train.runs.execution import execute_specs

    def save() -> None:
        for arm in request.arms:
            contents["arms"][arm] = arm_to_json(request.axes, studies.trials(arm))
        write_json(request.out, contents)

    def run_many(specs: Sequence[RunSpec]) -> dict[RunSpec, RunRecord]:
        return execute_specs(specs, request.experiment, task, console=console)

    try:
        sweep(request, studies, run_many=run_many, save=save)
    except KeyboardInterrupt:
        raise InterruptedRunsError(
            f"interrupted: finished rounds are kept in {request.storage}", can_resume=False
        ) from None
    save()
    return contents


def arm_to_json(axes: tuple[str, ...], trials: Sequence[Trial]) -> dict[str, Any]:
    """What the export says of one arm; without trials, only that there are none."""
    if not trials:
        return {"axes": list(axes), "trials": []}
    losses = losses_of(trials)
    best = next(trial for trial in trials if trial.place == best_place(losses))
    return {
        "axes": list(axes),
        "best": best.setting.to_json(),
        "is_interior": is_interior(losses),
        "mean_objective": best.to_json()["mean_objective"],
        "trials": [{"number": i, **trial.to_json()} for i, trial in enumerate(trials)],
    }


def _opened(request: SweepRequest, task: Task) -> dict[str, Any]:
    """The export to go on with, or a new one."""
    new = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "cell": request.name,
        "objective": objective_name(request.experiment.training),
        "created": utc_now(),
        "seeds": list(request.seeds),
        "config": request.experiment.to_json(),
        "corpus": task.to_json(),
        "arms": {},
    }
    if not request.out.exists():
        return new
    old = read_json(request.out, kind=KIND, schema_version=SCHEMA_VERSION)
    compared = ("seeds", "config", "corpus")
    difference = first_difference(
        {key: old[key] for key in compared}, {key: new[key] for key in compared}
    )
    if difference is not None:
        name, before, after = difference
        raise InputError(
            f"{request.out} was made with {name} = {before}, not {after}; give another --out"
        )
    return old
