"""What `normuon tune` tries, the file it writes, and reading the learning rates of such a file.

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
from normuon_lab.study.search.grid import best_rate, check_grid, is_done, is_interior, next_rate
from normuon_lab.study.search.searching import SearchRequest, Tried
from normuon_lab.study.search.space import Place, Setting, Trial
from normuon_lab.train.runs.config import Experiment, flag_of
from normuon_lab.train.runs.tasks import Task

KIND = "normuon tune"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest(SearchRequest):
    """The learning rate alone, first on a grid; a place is a rate.

    Attributes:
        rates: the first grid.
        min_rounds: rounds after the grid, one more rate per arm each.
        max_rounds: where to give up looking for an interior best rate.
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
        if rounds_made >= self.max_rounds or is_done(
            losses, rounds_made=rounds_made, min_rounds=self.min_rounds
        ):
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

    def tried_before(self, contents: Mapping[str, Any]) -> dict[str, list[Trial]]:
        return {arm: [] for arm in self.arms}

    def keep(self, arm: str, trials: Sequence[Trial]) -> None:
        """The file has them all."""

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
    """A tuning file that was read: what it chose, and for what."""

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
        return float(self.values["arms"][arm]["learning_rate"])

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
