"""`normuon tune` and `normuon sweep`: their options, output and errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normuon_lab.errors import RunsFailedError
from normuon_lab.train.arms.registry import ARMS, MAIN_ARMS
from normuon_lab.train.runs.config import ExperimentOptions

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class TuneCommand(ExperimentOptions):
    """Find each arm's learning rate, on seeds that no comparison uses."""

    arms: tuple[str, ...] = MAIN_ARMS
    """Optimizers to tune; every one gets the same number of trials."""
    lrs: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016, 0.032)
    """The first grid of peak learning rates; it grows if the best is at an end."""
    seeds: int = 2
    """Tuning seeds, counted from 1000."""
    rounds: int = 2
    """Rounds after the grid, each with one more rate per arm: beyond an end, or refining."""
    max_rounds: int = 6
    """Rounds after which to stop looking for a best rate that is not at an end."""
    out: Path = Path("runs/tuned.json")
    """File for the result; rewritten after every round."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        experiment = self.experiment()
        from rich.console import Console

        from normuon_lab.study.search.searching import run_search, tuning_seeds
        from normuon_lab.study.search.tune import TuneRequest

        request = TuneRequest(
            experiment=experiment,
            arms=self.arms,
            seeds=tuning_seeds(self.seeds),
            out=self.out,
            rates=self.lrs,
            min_rounds=self.rounds,
            max_rounds=self.max_rounds,
        )
        contents = run_search(request, Console(), show=print_trials)
        _require_interior(contents, self.arms, "learning rate", "--max-rounds or another --lrs")
        return 0


@dataclass(frozen=True, kw_only=True)
class SweepCommand(ExperimentOptions):
    """Tune several hyperparameters of each arm, all with the same number of trials.

    Every arm's grid grows until its best setting is interior. Resumes by itself: trials in the
    database or the export are not run again.
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
    """Name of the sweep; a database may hold several."""
    storage: Path = Path("runs/sweep.db")
    """SQLite database of Optuna studies, one per arm; optuna-dashboard shows it."""
    out: Path = Path("runs/sweep.json")
    """The export; rewritten after every round."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        experiment = self.experiment()
        from rich.console import Console

        from normuon_lab.study.search.searching import in_order, run_search, tuning_seeds
        from normuon_lab.study.search.sweep import SweepRequest

        request = SweepRequest(
            experiment=experiment,
            arms=self.arms,
            seeds=tuning_seeds(self.seeds),
            out=self.out,
            name=self.name,
            axes=in_order(self.axes),
            min_trials=self.trials,
            max_trials=self.max_trials,
            storage=self.storage,
        )
        console = Console()
        contents = run_search(request, console)
        console.print(best_settings(contents))
        _require_interior(contents, self.arms, "setting", "--max-trials")
        return 0


def _require_interior(
    contents: Mapping[str, Any], arms: tuple[str, ...], what: str, mend: str
) -> None:
    at_an_end = [arm for arm in arms if not contents["arms"][arm]["is_interior"]]
    if at_an_end:
        raise RunsFailedError(
            f"the best {what} of {', '.join(at_an_end)} is still at an end of what was tried: "
            f"give more {mend}"
        )


def print_trials(contents: Mapping[str, Any], console: Console) -> None:
    """Print the mean final loss of every arm and rate of a tuning, the chosen rate marked."""
    from rich.table import Table

    arms = contents["arms"]
    tried = {
        name: {trial["learning_rate"]: trial["mean_final_loss"] for trial in arm["trials"]}
        for name, arm in arms.items()
    }
    table = Table(title="Mean final validation loss; * marks the chosen learning rate")
    for title in ("learning rate", *(ARMS[name].label for name in arms)):
        table.add_column(title, justify="right")
    for rate in sorted(set().union(*tried.values())):
        cells = [
            _loss(losses[rate]) + (" *" if rate == arms[name]["learning_rate"] else "")
            if rate in losses
            else ""
            for name, losses in tried.items()
        ]
        table.add_row(f"{rate:.4g}", *cells)
    console.print(table)
    for name, arm in arms.items():
        if not arm["is_interior"]:
            console.print(f"{ARMS[name].label}: the best learning rate is at an end of the grid")


def best_settings(contents: Mapping[str, Any]) -> Table:
    """The best setting of every arm of a sweep."""
    from rich.table import Table

    table = Table(title=f"Best settings, by mean {contents['objective']}")
    for title in ("arm", "learning rate", "AdamW's", "weight decay", "mean", "trials"):
        table.add_column(title, justify="left" if title == "arm" else "right")
    for name, arm in contents["arms"].items():
        table.add_row(
            name,
            *("same" if value is None else f"{value:.4g}" for value in arm["best"].values()),
            _loss(arm["mean_objective"]),
            str(len(arm["trials"])),
        )
    return table


def _loss(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"
