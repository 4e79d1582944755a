"""`normuon sweep`: its options, what it prints, and when it fails."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normuon_lab.errors import RunsFailedError, require
from normuon_lab.train.arms.registry import MAIN_ARMS
from normuon_lab.train.runs.config import ExperimentOptions

if TYPE_CHECKING:
    from rich.table import Table

FIRST_SEED = 1000
"""Far from the seeds a claim uses, which count from 0."""


@dataclass(frozen=True, kw_only=True)
class SweepCommand(ExperimentOptions):
    """Tune several hyperparameters of each arm, all with the same number of trials.

    Every arm's grid grows until its best setting is interior. Resumes by itself: what the database
    or the export holds is not run again.
    """

    arms: tuple[str, ...] = MAIN_ARMS
    """Optimizers to tune."""
    axes: tuple[str, ...] = ("learning_rate", "adam_lr", "weight_decay")
    """What is tuned: the learning rate of hidden matrices, AdamW's for the rest, weight decay."""
    trials: int = 16
    """Settings tried per arm, at least; more for all where a best one would not be interior."""
    max_trials: int = 32
    """Settings per arm after which to stop looking for an interior best one."""
    seeds: int = 2
    """Tuning seeds, counted from 1000; each setting is tried with all of them."""
    name: str = "sweep"
    """Of the sweep: a database may hold several."""
    storage: Path = Path("runs/sweep.db")
    """SQLite database of Optuna studies, one per arm; optuna-dashboard shows it."""
    out: Path = Path("runs/sweep.json")
    """The export; rewritten after every round."""

    def run(self) -> int:
        """Do it and return the exit code."""
        experiment = self.experiment()
        require(self.seeds >= 1, f"--seeds must be at least 1, got {self.seeds}")
        from rich.console import Console

        from normuon_lab.study.sweep.space import in_order
        from normuon_lab.study.sweep.sweeping import SweepRequest, run_sweep

        request = SweepRequest(
            name=self.name,
            experiment=experiment,
            arms=self.arms,
            axes=in_order(self.axes),
            seeds=tuple(range(FIRST_SEED, FIRST_SEED + self.seeds)),
            min_trials=self.trials,
            max_trials=self.max_trials,
            storage=self.storage,
            out=self.out,
        )
        console = Console()
        contents = run_sweep(request, console, command=shlex.join(["normuon", *sys.argv[1:]]))
        console.print(best_settings(contents))
        at_an_end = [arm for arm in self.arms if not contents["arms"][arm]["is_interior"]]
        if at_an_end:
            raise RunsFailedError(
                f"the best setting of {', '.join(at_an_end)} is still at an end of what was tried: "
                "give more --max-trials"
            )
        return 0


def best_settings(contents: Mapping[str, Any]) -> Table:
    """The best setting of every arm of an export."""
    from rich.table import Table

    table = Table(title=f"Best settings, by mean {contents['objective']}")
    for title in ("arm", "learning rate", "AdamW's", "weight decay", "mean", "trials"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    for name, arm in contents["arms"].items():
        loss = arm["mean_objective"]
        table.add_row(
            name,
            *("same" if value is None else f"{value:.4g}" for value in arm["best"].values()),
            "diverged" if loss is None else f"{loss:.4f}",
            str(len(arm["trials"])),
        )
    return table
