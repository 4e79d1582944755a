"""`normuon compare`: its options and its output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from normuon_lab.errors import InputError, require
from normuon_lab.train.arms.registry import MAIN_ARMS, check_arms
from normuon_lab.train.runs.config import FIRST_TUNING_SEED, ExperimentOptions


@dataclass(frozen=True, kw_only=True)
class CompareCommand(ExperimentOptions):
    """Train one small model per arm and seed, and report how many fewer steps each arm needs."""

    arms: tuple[str, ...] = MAIN_ARMS
    """Optimizers to compare."""
    seeds: int = 4
    """Seeds per arm, counted from 0: each sets the initial weights and the order of the data."""
    lr: tuple[str, ...] = ()
    """Peak learning rates that replace tuned ones, as ARM=VALUE."""
    tuned: str | None = None
    """A file written by `normuon tune`, instead of the package's rates."""
    out: Path = Path("runs/compare")
    """Folder for results.json, report.html and TensorBoard's files."""
    resume: bool = False
    """Run only what OUT lacks."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        experiment = self.experiment()
        rates = parse_rates(self.lr)
        check_arms(self.arms)
        require(self.seeds >= 1, f"--seeds must be at least 1, got {self.seeds}")
        require(
            self.seeds <= FIRST_TUNING_SEED,
            f"--seeds must be at most {FIRST_TUNING_SEED}, got {self.seeds}: seeds from "
            f"{FIRST_TUNING_SEED} on are for tuning",
        )
        for arm in rates:
            require(arm in self.arms, f"--lr {arm}=...: {arm} is not among the arms")
        from rich.console import Console

        from normuon_lab.study.compare.comparison import planned, run_comparison
        from normuon_lab.study.compare.report import print_summary, say
        from normuon_lab.train.runs.tasks import load_task

        console, task = Console(), load_task(experiment)
        new = planned(experiment, task, self.arms, range(self.seeds), rates, self.tuned)
        results = run_comparison(
            new, experiment, task, out=self.out, resume=self.resume, console=console
        )
        print_summary(results, console)
        say(console, f"Report: {self.out / 'report.html'}")
        return 0


def parse_rates(pairs: Sequence[str]) -> dict[str, float]:
    """`--lr`'s pairs as a dictionary.

    >>> parse_rates(["adamw=0.002"])
    {'adamw': 0.002}
    """
    rates: dict[str, float] = {}
    for pair in pairs:
        arm, _, text = pair.partition("=")
        try:
            value = float(text)
        except ValueError:
            raise InputError(f"--lr {pair}: write ARM=VALUE, such as normuon=0.004") from None
        require(arm not in rates, f"--lr names {arm} twice")
        rates[arm] = value
    return rates
