"""Trials kept in Optuna studies, one per arm, in SQLite: a sweep resumes from them.

Optuna's dashboard shows them: ``optuna-dashboard sqlite:///runs/sweep.db``. A file of exported
trials fills an empty database again, so that a sweep can go on where only its export is at hand.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from normuon_lab.study.sweep.space import AXES, Place, Setting

_DISTRIBUTIONS = {name: FloatDistribution(1e-9, 1e6, log=True) for name in AXES}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting, tried with every tuning seed.

    Attributes:
        place: on the lattice of the axes that were tuned.
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


class Studies:
    """The studies of one sweep.

    Args:
        storage: the SQLite file; made if it is not there.
        name: of the sweep; a study is called ``<name>/<arm>``.
    """

    def __init__(self, storage: Path, name: str) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage.parent.mkdir(parents=True, exist_ok=True)
        self._storage = optuna.storages.RDBStorage(f"sqlite:///{storage}")
        self._name = name

    def trials(self, arm: str) -> list[Trial]:
        """All trials of an arm, in the order in which they were made."""
        return [
            Trial.from_json(trial.user_attrs["trial"])
            for trial in self._study(arm).get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        ]

    def add(self, arm: str, trials: Iterable[Trial]) -> None:
        """Keep finished trials."""
        study = self._study(arm)
        for trial in trials:
            study.add_trial(
                optuna.trial.create_trial(
                    params=(params := _params(trial.setting)),
                    distributions={name: _DISTRIBUTIONS[name] for name in params},
                    value=trial.mean,
                    user_attrs={"trial": trial.to_json()},
                )
            )

    def fill(self, arm: str, trials: Iterable[Trial]) -> None:
        """Keep exported trials that the database lacks."""
        known = {trial.place for trial in self.trials(arm)}
        self.add(arm, [trial for trial in trials if trial.place not in known])

    def _study(self, arm: str) -> optuna.Study:
        return optuna.create_study(
            storage=self._storage, study_name=f"{self._name}/{arm}", load_if_exists=True
        )


def _params(setting: Setting) -> dict[str, float]:
    return {name: value for name, value in setting.to_json().items() if value is not None}
