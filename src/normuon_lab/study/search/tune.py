"""`normuon tune`: its search, its file, and reading the learning rates of such a file.

First every arm gets the same grid. Then, round by round, every arm gets one more rate, so that the
budgets stay equal: an arm whose best rate is at an end of what it tried gets one beyond that end;
any other gets the geometric mean of its best rate and a neighbour. It ends once every arm's best
rate is interior and at least a given number of rounds were made.

The file shipped with the package, tuned.json, holds the rates of the default comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import read_json
from normuon_lab.config_difference import first_difference
from normuon_lab.errors import InputError, require
from normuon_lab.machine import utc_now
from normuon_lab.study.search.searching import SearchRequest, Tried
from normuon_lab.study.search.space import Place, Setting, Trial
from normuon_lab.train.runs.config import Experiment, flag_of
from normuon_lab.train.runs.tasks import Task

KIND = "normuon tune"
SCHEMA_VERSION = 1

Losses = Mapping[float, float]
"""The mean final loss by learning rate; infinite where a run diverged."""

EXTENSION_FACTOR = 2.0
# Finer steps than this are lost in the noise between seeds.
_FINEST_RATIO = 2.0**0.25


def check_grid(rates: tuple[float, ...]) -> None:
    """Raise `InputError` unless `rates` are three or more positive numbers, each once."""
    require(len(rates) >= 3, "--lrs needs at least three learning rates")
    require(
        all(math.isfinite(rate) and rate > 0.0 for rate in rates),
        "--lrs must be positive numbers",
    )
    require(len(set(rates)) == len(rates), "--lrs names a learning rate twice")


def best_rate(losses: Losses) -> float:
    """The rate of the lowest loss; the lower rate of two that are equal."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def is_interior(losses: Losses) -> bool:
    """Whether the best rate has a tried rate on both sides.

    >>> is_interior({1.0: 3.0, 2.0: 2.0, 4.0: 2.5})
    True
    >>> is_interior({1.0: 3.0, 2.0: 2.0})
    False
    """
    return min(losses) < best_rate(losses) < max(losses)


def next_rate(losses: Losses) -> float:
    """The one rate to try next for an arm.

    >>> next_rate({1.0: 3.0, 2.0: 2.0})
    4.0
    >>> round(next_rate({1.0: 3.0, 2.0: 2.0, 4.0: 2.5}), 3)  # towards the better neighbour
    2.828
    """
    best = best_rate(losses)
    below = [rate for rate in losses if rate < best]
    above = [rate for rate in losses if rate > best]
    if not below:
        return best / EXTENSION_FACTOR
    if not above:
        return best * EXTENSION_FACTOR
    neighbours = sorted((max(below), min(above)), key=lambda rate: losses[rate])
    for neighbour in neighbours:
        if max(neighbour / best, best / neighbour) > _FINEST_RATIO * 1.01:
            return math.sqrt(best * neighbour)
    # Both neighbours are as near as the noise: one more rate at an end costs the same budget and
    # can only widen what was searched.
    return max(losses) * EXTENSION_FACTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest(SearchRequest):
    """The learning rate alone, first on a grid; a place is a rate.

    Attributes:
        rates: the first grid.
        min_rounds: rounds after the grid, one more rate per arm each.
        max_rounds: the rounds after which a search stops without an interior best rate.
    """

    rates: tuple[float, ...]
    min_rounds: int
    max_rounds: int

    def __post_init__(self) -> None:
        SearchRequest.__post_init__(self)
        check_grid(self.rates)
        require(
            0 <= self.min_rounds <= self.max_rounds,
            f"--rounds {self.min_rounds} must be between 0 and --max-rounds {self.max_rounds}",
        )

    def next_round(self, tried: Tried) -> dict[str, list[Place]]:
        losses = {arm: _losses(trials) for arm, trials in tried.items()}
        num_tried = min(map(len, losses.values()))
        if num_tried == 0:
            return {arm: [(rate,) for rate in self.rates] for arm in self.arms}
        rounds_made = num_tried - len(self.rates)
        is_enough = rounds_made >= self.min_rounds and all(map(is_interior, losses.values()))
        if is_enough or rounds_made >= self.max_rounds:
            return {}
        return {arm: [(next_rate(losses[arm]),)] for arm in self.arms}

    def setting(self, arm: str, place: Place) -> Setting:
        return Setting(learning_rate=place[0])

    def contents(self, task: Task) -> dict[str, Any]:
        require(not self.out.exists(), f"--out {self.out} exists already: give another file")
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "seeds": list(self.seeds),
            "config": self.experiment.to_json(),
            "arms": {},
            "corpus": task.to_json(),
            "created": utc_now(),
        }

    def arm_to_json(self, trials: Sequence[Trial]) -> dict[str, Any]:
        losses = _losses(trials)
        chosen = best_rate(losses)
        return {
            "learning_rate": chosen,
            "mean_final_loss": _finite(losses[chosen]),
            "is_interior": is_interior(losses),
            "trials": [
                {
                    "learning_rate": trial.setting.learning_rate,
                    "mean_final_loss": _finite(trial.mean),
                    "final_losses": {str(seed): trial.objectives[seed] for seed in self.seeds},
                }
                for trial in sorted(trials, key=lambda trial: trial.setting.learning_rate)
            ],
        }


def _losses(trials: Sequence[Trial]) -> dict[float, float]:
    return {trial.setting.learning_rate: trial.mean for trial in trials}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class TunedRates:
    """The contents of a tuning file."""

    source: str
    values: Mapping[str, Any]

    @property
    def seeds(self) -> list[int]:
        """The seeds the rates were tuned on."""
        return list(self.values["seeds"])

    @classmethod
    def load(cls, path: str | None = None) -> TunedRates:
        """Read `path`, or the file shipped with the package."""
        if path is None:
            with resources.as_file(resources.files(__package__) / "tuned.json") as shipped:
                require(shipped.exists(), "no tuned rates are shipped: give --lr ARM=VALUE")
                return cls("shipped tuned.json", _read(shipped))
        require(Path(path).is_file(), f"--tuned: no such file: {path}")
        return cls(path, _read(Path(path)))

    def learning_rate(self, arm: str) -> float:
        """The chosen rate of `arm`."""
        if arm not in self.values["arms"]:
            raise InputError(
                f"{self.source} has no learning rate for {arm}: give --lr {arm}=VALUE, "
                f"or tune it with `normuon tune --arms {arm}`"
            )
        found = self.values["arms"][arm]
        require(
            found["mean_final_loss"] is not None,
            f"{self.source}: every learning rate of {arm} diverged; tune again with lower --lrs",
        )
        return float(found["learning_rate"])

    def summary(self, arm: str, experiment: Experiment, corpus_digest: str) -> str:
        """One sentence: how the rate of `arm` was chosen, and whether for this experiment."""
        chosen = self.values["arms"][arm]
        rates = [trial["learning_rate"] for trial in chosen["trials"]]
        text = (
            f"tuned: {len(rates)} rates from {min(rates):.3g} to {max(rates):.3g}, "
            f"seeds {', '.join(map(str, self.seeds))}, "
            f"mean final loss {chosen['mean_final_loss']:.4f} ({self.source})"
        )
        difference = first_difference(self.values["config"], experiment.to_json())
        if difference is not None:
            name, before, after = difference
            text += f"; tuned for another configuration ({flag_of(name)} {before}, here {after})"
        elif self.values["corpus"]["sha256"] != corpus_digest:
            # The standard library of another Python, say.
            text += "; tuned on another version of the text"
        return text


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)
