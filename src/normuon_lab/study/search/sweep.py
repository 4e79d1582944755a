"""`normuon sweep`: its search, its database of trials, and its file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normuon_lab.atomic_files import damage_named, prove_file, read_json
from normuon_lab.config_difference import first_difference
from normuon_lab.errors import InputError, first_line, require
from normuon_lab.machine import utc_now
from normuon_lab.study.search.lattice import best_place, is_interior, next_round
from normuon_lab.study.search.searching import (
    AXES,
    Place,
    SearchRequest,
    Setting,
    Trial,
    Tried,
    in_order,
    setting_at,
)
from normuon_lab.train.runs.config import flag_of
from normuon_lab.train.runs.records import objective_name
from normuon_lab.train.runs.tasks import Task

if TYPE_CHECKING:
    import optuna

KIND = "normuon sweep"
SCHEMA_VERSION = 1


class Studies:
    """Optuna studies that keep a sweep's trials in SQLite, one per arm: a sweep resumes from them.

    Optuna's dashboard shows them: ``optuna-dashboard sqlite:///runs/sweep.db``. A file of exported
    trials fills an empty database, so that a sweep can continue from its export.

    Args:
        storage: the SQLite file; made if it is not there.
        name: of the sweep; a study is called ``<name>/<arm>``.

    Raises:
        InputError: the file is of another kind, or cannot be read or written.
    """

    def __init__(self, storage: Path, name: str) -> None:
        # Optuna takes a second to import, which reading a file should not wait for.
        import optuna
        from sqlalchemy.exc import DatabaseError

        self._optuna = optuna
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._storage = optuna.storages.RDBStorage(f"sqlite:///{storage}")
        except (DatabaseError, RuntimeError) as error:  # The latter: of another version of Optuna.
            cause = first_line(getattr(error, "orig", None) or error)
            raise InputError(f"--storage {storage} is no database of Optuna: {cause}") from None
        self._name = name

    def trials(self, arm: str) -> list[Trial]:
        """All trials of an arm, in the order in which they were made."""
        kept = self._study(arm).get_trials(deepcopy=False)
        return [Trial.from_json(trial.user_attrs["trial"]) for trial in kept]

    def add(self, arm: str, trials: Iterable[Trial]) -> None:
        """Keep finished trials."""
        any_value = self._optuna.distributions.FloatDistribution(1e-9, 1e6, log=True)
        for trial in trials:
            given = {name: value for name, value in trial.setting.items() if value is not None}
            frozen = self._optuna.trial.create_trial(
                params=given,
                distributions=dict.fromkeys(given, any_value),
                value=trial.mean,
                user_attrs={"trial": trial.to_json()},
            )
            self._study(arm).add_trial(frozen)

    def fill(self, arm: str, trials: Iterable[Trial]) -> None:
        """Keep exported trials that the database lacks."""
        known = {trial.place for trial in self.trials(arm)}
        self.add(arm, [trial for trial in trials if trial.place not in known])

    def _study(self, arm: str) -> optuna.Study:
        return self._optuna.create_study(
            storage=self._storage, study_name=f"{self._name}/{arm}", load_if_exists=True
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRequest(SearchRequest):
    """Several hyperparameters, on a lattice; resumes from its database or from its file.

    Attributes:
        name: of the sweep, in the database and in its file.
        axes: hyperparameters to tune, of `AXES`.
        storage: the SQLite file.
        fixed: by arm, the values of the axes that are not tuned.
        starts: by arm, the place where its search begins; by default the axes' starts.
    """

    name: str
    axes: tuple[str, ...]
    min_trials: int
    max_trials: int
    storage: Path
    fixed: Mapping[str, Setting] = field(default_factory=dict)
    starts: Mapping[str, Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        SearchRequest.__post_init__(self)
        require(in_order(self.axes) == self.axes, "the axes come in the order of a search")
        require(
            1 <= self.min_trials <= self.max_trials,
            f"--trials {self.min_trials} must be between 1 and --max-trials {self.max_trials}",
        )

    def next_round(self, tried: Tried) -> dict[str, list[Place]]:
        start = tuple(float(AXES[name].start) for name in self.axes)
        return next_round(
            {arm: _losses(trials) for arm, trials in tried.items()},
            {arm: self.starts.get(arm, start) for arm in self.arms},
            min_trials=self.min_trials,
            max_trials=self.max_trials,
        )

    def setting(self, arm: str, place: Place) -> Setting:
        return setting_at(self.axes, place, self.fixed.get(arm, {}))

    def contents(self, task: Task) -> dict[str, Any]:
        prove_file(self.storage, f"--storage {self.storage}")
        new = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "cell": self.name,
            "objective": objective_name(self.experiment.training),
            "created": utc_now(),
            "seeds": list(self.seeds),
            "config": self.experiment.to_json(),
            "corpus": task.to_json(),
            "arms": {},
        }
        if not self.out.exists():
            return new
        old = read_json(self.out, kind=KIND, schema_version=SCHEMA_VERSION)
        compared = ("seeds", "config", "corpus")
        with damage_named(self.out):
            was, wanted = ({key: values[key] for key in compared} for values in (old, new))
            difference = first_difference(was, wanted)
            for values in old["arms"].values():
                list(map(Trial.from_json, values["trials"]))
        if difference is not None:
            name, before, after = difference
            raise InputError(
                f"--out {self.out} was made with {flag_of(name)} {before}, not {after}; "
                "give another --out"
            )
        return old

    def tried_before(self, contents: Mapping[str, Any]) -> dict[str, list[Trial]]:
        studies = Studies(self.storage, self.name)
        for arm in self.arms:
            known = contents["arms"].get(arm, {}).get("trials", [])
            studies.fill(arm, [Trial.from_json(values) for values in known])
        return {arm: studies.trials(arm) for arm in self.arms}

    def keep(self, arm: str, trials: Sequence[Trial]) -> None:
        Studies(self.storage, self.name).add(arm, trials)

    def arm_to_json(self, trials: Sequence[Trial]) -> dict[str, Any]:
        if not trials:
            return {"axes": list(self.axes), "trials": []}
        losses = _losses(trials)
        best = next(trial for trial in trials if trial.place == best_place(losses))
        return {
            "axes": list(self.axes),
            "best": best.setting,
            "is_interior": is_interior(losses),
            "mean_objective": best.finite_mean,
            "trials": [{"number": i, **trial.to_json()} for i, trial in enumerate(trials)],
        }


def read_tuned_arms(path: Path) -> dict[str, Any]:
    """The tried arms in a sweep's file; empty if there is no file."""
    if not path.exists():
        return {}
    contents = read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)
    with damage_named(path):
        return {name: arm for name, arm in contents["arms"].items() if arm["trials"]}


def _losses(trials: Sequence[Trial]) -> dict[Place, float]:
    return {trial.place: trial.mean for trial in trials}
