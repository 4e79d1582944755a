"""`normuon tune`: its options, and when it fails."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from normuon_lab.errors import RunsFailedError
from normuon_lab.train.arms.registry import MAIN_ARMS
from normuon_lab.train.runs.config import ExperimentOptions


@dataclass(frozen=True, kw_only=True)
class TuneCommand(ExperimentOptions):
    """Find each arm's learning rate, on seeds that no comparison uses."""

    arms: tuple[str, ...] = MAIN_ARMS
    """Optimizers to tune; every one gets the same number of trials."""
    lrs: tuple[float, ...] = (0.002, 0.004, 0.008, 0.016, 0.032)
    """The first grid of peak learning rates; it grows where the best is at an end."""
    seeds: int = 2
    """Tuning seeds, counted from 1000."""
    rounds: int = 2
    """Rounds after the grid, each with one more rate per arm: beyond an end, or refining."""
    max_rounds: int = 6
    """Rounds after which to stop looking for a best rate that is not at an end."""
    out: Path = Path("runs/tuned.json")
    """File for the result; rewritten after every round."""

    def run(self) -> int:
        """Do it and return the exit code."""
        experiment = self.experiment()
        from rich.console import Console

        from normuon_lab.study.tune.tuning import TuneRequest, run_tuning

        request = TuneRequest(
            experiment=experiment,
            arms=self.arms,
            rates=self.lrs,
            num_seeds=self.seeds,
            min_rounds=self.rounds,
            max_rounds=self.max_rounds,
            out=self.out,
        )
        contents = run_tuning(request, Console(), command=shlex.join(["normuon", *sys.argv[1:]]))
        at_an_end = [arm for arm, found in contents["arms"].items() if not found["is_interior"]]
        if at_an_end:
            raise RunsFailedError(
                f"the best learning rate of {', '.join(at_an_end)} is still at an end of what was "
                "tried: give more --max-rounds or another --lrs"
            )
        return 0
