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
        name: as in `RunSpec` or `ArmOptions`.
        base: the value at k = 0.
        ratio: between neighbouring values.
        start: the k where a search begins by default.
    """

    name: str
    base: float
    ratio: float
    start: int

    def value(self, k: float) -> float:
        """The value at place k, to twelve digits, so that equal places give equal numbers.

        Example:
            >>> AXES["learning_rate"].value(3)
            0.008
        """
        return float(f"{self.base * self.ratio**k:.12g}")


# In the order in which a search looks at them: the most sensitive first.
AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis(name="learning_rate", base=0.001, ratio=2.0, start=3),
        Axis(name="adam_lr", base=0.001, ratio=2.0, start=3),
        Axis(name="weight_decay", base=0.1, ratio=10**0.5, start=0),
    )
}

Place = tuple[float, ...]
"""Where a search has put a setting: one k per axis of a sweep, the learning rate of a grid."""


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


@dataclass(frozen=True, slots=True)
class Setting:
    """The hyperparameters of one trial.

    Attributes:
        learning_rate: the peak, of hidden matrices.
        adam_lr: the peak of everything else; None: the same.
        weight_decay: of hidden matrices.
    """

    learning_rate: float
    adam_lr: float | None = None
    weight_decay: float = HIDDEN_WEIGHT_DECAY

    def spec(
        self,
        arm: str,
        seed: int,
        *,
        steps: int | None = None,
        normuon: tuple[tuple[str, Any], ...] = (),
    ) -> RunSpec:
        """A run with these hyperparameters; `normuon` is `ArmOptions`'."""
        options = ArmOptions(adam_lr=self.adam_lr, weight_decay=self.weight_decay, normuon=normuon)
        return RunSpec(
            arm=arm, seed=seed, learning_rate=self.learning_rate, options=options, steps=steps
        )

    def to_json(self) -> dict[str, float | None]:
        """Plain values by axis, as stored."""
        return {name: getattr(self, name) for name in AXES}


def setting_at(names: tuple[str, ...], place: Place, fixed: Mapping[str, float | None]) -> Setting:
    """The hyperparameters at a place; those that no axis names are `fixed`'s, or the defaults.

    Example:
        >>> setting_at(("learning_rate",), (1.0,), {"adam_lr": 0.008, "weight_decay": 0.1})
        Setting(learning_rate=0.002, adam_lr=0.008, weight_decay=0.1)
    """
    values: dict[str, Any] = dict(fixed)
    values |= {name: AXES[name].value(k) for name, k in zip(names, place, strict=True)}
    return Setting(**values)


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
            >>> Trial(place=(), setting=Setting(1.0, 1.0, 0.0), objectives={1: 2.0, 2: None}).mean
            inf
        """
        values = list(self.objectives.values())
        if any(value is None for value in values):
            return math.inf
        return math.fsum(value for value in values if value is not None) / len(values)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as exported."""
        return {
            "place": list(self.place),
            **self.setting.to_json(),
            "mean_objective": self.mean if math.isfinite(self.mean) else None,
            "objectives": {str(seed): value for seed, value in self.objectives.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Trial:
        """The inverse of `to_json`."""
        return cls(
            place=tuple(values["place"]),
            setting=Setting(**{name: values[name] for name in AXES}),
            objectives={int(seed): value for seed, value in values["objectives"].items()},
        )
