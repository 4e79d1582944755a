"""What is tuned, and a search of it, round by round: its trials and its file.

A request decides what is tried next and what the file says.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from normuon_lab.atomic_files import prove_file, write_json
from normuon_lab.command_line import recorded_command
from normuon_lab.errors import InterruptedRunsError, require
from normuon_lab.machine import default_num_workers, describe_machine
from normuon_lab.train.arms.options import HIDDEN_WEIGHT_DECAY, ArmOptions
from normuon_lab.train.arms.registry import check_arms
from normuon_lab.train.runs.config import FIRST_TUNING_SEED, Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord, objective
from normuon_lab.train.runs.tasks import Task, load_task


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One hyperparameter: its values are ``base * ratio^k``, k an integer or, refined, a half.

    Attributes:
        base: the value at k = 0.
        ratio: between neighbouring values.
        start: the k where a search begins by default.
        untuned: the value where it is not tuned; None: the learning rate's.
    """

    base: float
    ratio: float
    start: int
    untuned: float | None = None

    def value(self, k: float) -> float:
        """The value at place k, to twelve digits, so that equal places give equal numbers.

        Example:
            >>> AXES["learning_rate"].value(3)
            0.008
        """
        return float(f"{self.base * self.ratio**k:.12g}")


AXES = {
    "learning_rate": Axis(base=0.001, ratio=2.0, start=3),
    "adam_lr": Axis(base=0.001, ratio=2.0, start=3),
    "weight_decay": Axis(base=0.1, ratio=10**0.5, start=0, untuned=HIDDEN_WEIGHT_DECAY),
}
"""By their names in `RunSpec` and `ArmOptions`, in the order in which a search looks at them: the
most sensitive first."""

Place = tuple[float, ...]
"""Where a search has put a setting: one k per axis of a sweep, the learning rate of a grid."""

Setting = Mapping[str, float | None]
"""The hyperparameters of a trial, of `AXES`: the peak learning rate of hidden matrices, that of
everything else (None: the same), and the weight decay of hidden matrices. What is not there has the
default of `ArmOptions`."""


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """The named axes in the order in which a search looks at them."""
    for name in names:
        require(name in AXES, f"--axes {name}: choose from {', '.join(AXES)}")
        require(list(names).count(name) == 1, f"--axes names {name} twice")
    require("learning_rate" in names, "--axes: a sweep tunes learning_rate, at least")
    return tuple(name for name in AXES if name in names)


def setting_at(names: tuple[str, ...], place: Place, fixed: Setting) -> Setting:
    """The hyperparameters at a place; those that no axis names are `fixed`'s, or the defaults.

    Example:
        >>> setting_at(("learning_rate",), (1.0,), {"adam_lr": 0.008})
        {'learning_rate': 0.002, 'adam_lr': 0.008, 'weight_decay': 0.1}
    """
    tuned = dict(zip(names, place, strict=True))
    return {
        name: axis.value(tuned[name]) if name in tuned else fixed.get(name, axis.untuned)
        for name, axis in AXES.items()
    }


def spec_of(
    arm: str,
    seed: int,
    setting: Setting,
    *,
    steps: int | None = None,
    normuon: tuple[tuple[str, Any], ...] = (),
) -> RunSpec:
    """A run with the hyperparameters of a trial; `normuon` is `ArmOptions`'."""
    others: dict[str, Any] = dict(setting)
    rate = others.pop("learning_rate")
    options = ArmOptions(**others, normuon=normuon)
    return RunSpec(arm=arm, seed=seed, learning_rate=rate, options=options, steps=steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting, tried with every tuning seed.

    Attributes:
        place: its place in the search.
        objectives: by seed; None for a run that diverged.
    """

    place: Place
    setting: Setting
    objectives: Mapping[int, float | None]

    @property
    def mean(self) -> float:
        """Mean over the seeds; infinite where a run diverged.

        Example:
            >>> Trial(place=(), setting={}, objectives={1: 2.0, 2: None}).mean
            inf
        """
        values = [value for value in self.objectives.values() if value is not None]
        if len(values) < len(self.objectives):
            return math.inf
        return math.fsum(values) / len(values)

    @property
    def finite_mean(self) -> float | None:
        """The mean, as files have it: None where a run diverged."""
        return self.mean if math.isfinite(self.mean) else None

    def to_json(self) -> dict[str, Any]:
        """Plain values, as exported."""
        return {
            "place": list(self.place),
            **self.setting,
            "mean_objective": self.finite_mean,
            "objectives": {str(seed): value for seed, value in self.objectives.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Trial:
        """The inverse of `to_json`."""
        return cls(
            place=tuple(values["place"]),
            setting={name: values[name] for name in AXES},
            objectives={int(seed): value for seed, value in values["objectives"].items()},
        )


Tried = Mapping[str, Sequence[Trial]]
"""By arm, in the order in which trials were made."""

RunMany = Callable[[Sequence[RunSpec]], Mapping[RunSpec, RunRecord]]


def tuning_seeds(number: int) -> tuple[int, ...]:
    """So many seeds that no claim uses."""
    require(number >= 1, f"--seeds must be at least 1, got {number}")
    require(
        number <= FIRST_TUNING_SEED, f"--seeds must be at most {FIRST_TUNING_SEED}, got {number}"
    )
    return tuple(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + number))


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest(ABC):
    """What to search, and the file of the results.

    Attributes:
        seeds: each setting is tried with all of them.
        out: the file, rewritten after every round.
    """

    experiment: Experiment
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    out: Path

    def __post_init__(self) -> None:
        check_arms(self.arms)
        require(len(self.seeds) > 0, "a search needs at least one seed")

    @abstractmethod
    def next_round(self, tried: Tried) -> dict[str, list[Place]]:
        """The places that each arm tries next; empty at the end."""

    @abstractmethod
    def setting(self, arm: str, place: Place) -> Setting:
        """The hyperparameters of an arm at a place."""

    @abstractmethod
    def contents(self, task: Task) -> dict[str, Any]:
        """The file's contents besides its arms, from the file that is continued or for a new one.

        Raises:
            InputError: there is a file that cannot be continued.
        """

    @abstractmethod
    def arm_to_json(self, trials: Sequence[Trial]) -> dict[str, Any]:
        """What the file says of one arm."""

    def tried_before(self, contents: Mapping[str, Any]) -> dict[str, list[Trial]]:
        """The trials of earlier calls, by arm; none unless a search keeps them."""
        return {arm: [] for arm in self.arms}

    def keep(self, arm: str, trials: Sequence[Trial]) -> None:  # noqa: B027
        """Keep new trials also outside the file, if asked."""


def do_rounds(
    request: SearchRequest,
    tried: dict[str, list[Trial]],
    *,
    run_many: RunMany,
    save: Callable[[], None],
) -> None:
    """Try each arm's next places, round by round, until no arm has any; `tried` grows."""
    while wanted := request.next_round(tried):
        specs = {
            (seed, arm, place): spec_of(arm, seed, request.setting(arm, place))
            for seed in request.seeds
            for arm, places in wanted.items()
            for place in places
        }
        records = run_many(list(specs.values()))
        for arm, places in wanted.items():
            new = [
                Trial(
                    place=place,
                    setting=request.setting(arm, place),
                    objectives={
                        seed: objective(
                            records[specs[seed, arm, place]], request.experiment.training
                        )
                        for seed in request.seeds
                    },
                )
                for place in places
            ]
            request.keep(arm, new)
            tried[arm].extend(new)
        save()


def run_search(
    request: SearchRequest,
    console: Console,
    *,
    show: Callable[[Mapping[str, Any], Console], None] | None = None,
) -> dict[str, Any]:
    """Do the missing runs of a search, write its file and return the contents.

    `show` prints the contents after every round.

    Raises:
        InputError: the request cannot be served; nothing was written.
        RunsFailedError: a run failed; finished rounds are kept.
        InterruptedRunsError: Ctrl-C came; finished rounds are kept.
    """
    prove_file(request.out, f"--out {request.out}")
    task = load_task(request.experiment)
    contents = request.contents(task)
    tried = request.tried_before(contents)
    num_first = sum(map(len, request.next_round(tried).values()))
    contents["command"] = recorded_command()
    contents["machine"] = describe_machine(
        num_workers=default_num_workers(max(1, num_first) * len(request.seeds))
    )
    # Not before the request is known to be good: an error should not wait for torch.
    from normuon_lab.train.runs.workers import execute_specs

    def write() -> None:
        for arm in request.arms:
            contents["arms"][arm] = request.arm_to_json(tried[arm])
        write_json(request.out, contents)

    def save() -> None:
        write()
        if show is not None:
            show(contents, console)

    def run_many(specs: Sequence[RunSpec]) -> dict[RunSpec, RunRecord]:
        return execute_specs(specs, request.experiment, task, console=console)

    try:
        do_rounds(request, tried, run_many=run_many, save=save)
    except KeyboardInterrupt:
        kept = f"finished rounds are kept in {request.out}"
        raise InterruptedRunsError(
            f"interrupted: {kept if request.out.exists() else 'nothing was finished'}",
            can_resume=False,
        ) from None
    write()
    return contents
