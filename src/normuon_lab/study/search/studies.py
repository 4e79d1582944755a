"""Optuna studies that keep a sweep's trials in SQLite, one per arm: a sweep resumes from them.

Optuna's dashboard shows them: ``optuna-dashboard sqlite:///runs/sweep.db``. A file of exported
trials fills an empty database again, so that a sweep can go on where only its export is at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from normuon_lab.study.search.space import AXES, Trial

_DISTRIBUTIONS = {name: FloatDistribution(1e-9, 1e6, log=True) for name in AXES}


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
            given = {name: v for name, v in trial.setting.to_json().items() if v is not None}
            study.add_trial(
                optuna.trial.create_trial(
                    params=given,
                    distributions={name: _DISTRIBUTIONS[name] for name in given},
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
