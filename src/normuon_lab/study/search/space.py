"""The hyperparameters that are tuned, the log-spaced lattice of a sweep's values, and trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normuon_lab.errors import require
from normuon_lab.train.arms.options import HIDDEN_WEIGHT_DECAY, ArmOptions
from normuon_lab.train.runs.config import RunSpec


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
    """The named axes in the order in which a search looks at them.

    Raises:
        InputError: a name is unknown or comes twice, or the learning rate is not among them.
    """
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

    def to_json(self) -> dict[str, Any]:
        """Plain values, as exported."""
        return {
            "place": list(self.place),
            **self.setting,
            "mean_objective": self.mean if math.isfinite(self.mean) else None,
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
