"""Trials survive in SQLite, and in an export that fills an empty database again."""

from __future__ import annotations

import math
from pathlib import Path

import optuna

from normuon_lab.study.search.searching import Trial
from normuon_lab.study.search.sweep import Studies

GOOD = Trial(
    place=(1.0, 3.0),
    setting={"learning_rate": 0.002, "adam_lr": 0.008, "weight_decay": 0.1},
    objectives={1000: 1.5, 1001: 2.0},
)
DIVERGED = Trial(
    place=(9.0, 3.0),
    setting={"learning_rate": 0.512, "adam_lr": 0.008, "weight_decay": 0.1},
    objectives={1000: None, 1001: 2.0},
)


def test_trials_come_back_from_a_database_that_was_closed(tmp_path: Path) -> None:
    storage = tmp_path / "deep" / "sweep.db"
    Studies(storage, "cell").add("adamw", [GOOD, DIVERGED])
    assert Studies(storage, "cell").trials("adamw") == [GOOD, DIVERGED]
    assert Studies(storage, "cell").trials("muon") == []
    assert Studies(storage, "other cell").trials("adamw") == []


def test_an_export_fills_what_a_database_lacks_and_no_more(tmp_path: Path) -> None:
    studies = Studies(tmp_path / "sweep.db", "cell")
    studies.add("adamw", [GOOD])
    exported = [Trial.from_json(trial.to_json()) for trial in (GOOD, DIVERGED)]
    studies.fill("adamw", exported)
    studies.fill("adamw", exported)
    assert studies.trials("adamw") == [GOOD, DIVERGED]


def test_optuna_sees_settings_and_means(tmp_path: Path) -> None:
    storage = tmp_path / "sweep.db"
    Studies(storage, "cell").add("adamw", [DIVERGED, GOOD])
    study = optuna.load_study(study_name="cell/adamw", storage=f"sqlite:///{storage}")
    assert study.best_params == {"learning_rate": 0.002, "adam_lr": 0.008, "weight_decay": 0.1}
    assert [trial.value for trial in study.trials] == [math.inf, 1.75]
