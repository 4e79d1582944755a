"""Finds each arm's learning rate, on seeds of its own.

Which rate comes next is `grid.py`'s business; this module does the runs and keeps the record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from normuon_lab.atomic_files import prove_file, write_json
from normuon_lab.errors import InterruptedRunsError, require
from normuon_lab.machine import default_num_workers, describe_machine, utc_now
from normuon_lab.study.tune.grid import best_rate, check_grid, is_done, is_interior, next_rate
from normuon_lab.study.tune.tuned_rates import KIND, SCHEMA_VERSION
from normuon_lab.train.arms.registry import ARMS, check_arms
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import load_task

# Far from the seeds a comparison uses, which count from 0.
FIRST_TUNING_SEED = 1000

# Final losses by arm, rate and seed; None for a run that diverged.
FinalLosses = Mapping[str, Mapping[float, Mapping[int, float | None]]]
RunMany = Callable[[Sequence[RunSpec]], Sequence[RunRecord]]
Save = Callable[[FinalLosses], None]


def tune(
    arms: Sequence[str],
    *,
    rates: Sequence[float],
    seeds: Sequence[int],
    min_rounds: int,
    max_rounds: int,
    run_many: RunMany,
    save: Save,
) -> dict[str, dict[float, dict[int, float | None]]]:
    """Try the grid for every arm, then extend and refine it round by round.

    Args:
        arms: names of the arms.
        rates: the first grid.
        seeds: the tuning seeds; each rate is tried with all of them.
        min_rounds: rounds after the grid, one more rate per arm each.
        max_rounds: where to give up looking for an interior best rate.
        run_many: does the runs; their records come back in any order.
        save: called with all final losses after the grid and after every round.

    Returns:
        Final losses by arm, rate and seed; None for a run that diverged.
    """
    found: dict[str, dict[float, dict[int, float | None]]] = {arm: {} for arm in arms}
    wanted = {arm: list(rates) for arm in arms}
    for round_number in range(max_rounds + 1):
        specs = [
            RunSpec(arm=arm, seed=seed, learning_rate=rate)
            for seed in seeds
            for arm in arms
            for rate in wanted[arm]
        ]
        for record in run_many(specs):
            by_seed = found[record.arm].setdefault(record.learning_rate, {})
            by_seed[record.seed] = record.final_loss
        save(found)
        means = {arm: mean_losses(found[arm]) for arm in arms}
        if is_done(means, rounds_made=round_number, min_rounds=min_rounds):
            break
        wanted = {arm: [next_rate(means[arm])] for arm in arms}
    return found


def mean_losses(by_rate: Mapping[float, Mapping[int, float | None]]) -> dict[float, float]:
    """Mean final loss per rate; infinite where a seed diverged."""
    return {
        rate: math.inf
        if any(loss is None for loss in by_seed.values())
        else math.fsum(loss for loss in by_seed.values() if loss is not None) / len(by_seed)
        for rate, by_seed in by_rate.items()
    }


def tuning_to_json(
    found: FinalLosses,
    *,
    experiment: Experiment,
    seeds: Sequence[int],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of a tuning file.

    Args:
        found: final losses by arm, rate and seed.
        experiment: what was trained.
        seeds: the tuning seeds.
        provenance: further fields, such as corpus, machine, command and date.
    """
    arms = {}
    for arm, by_rate in found.items():
        means = mean_losses(by_rate)
        chosen = best_rate(means)
        arms[arm] = {
            "learning_rate": chosen,
            "mean_final_loss": _finite(means[chosen]),
            "is_interior": is_interior(means),
            "trials": [
                {
                    "learning_rate": rate,
                    "mean_final_loss": _finite(means[rate]),
                    "final_losses": {str(seed): by_rate[rate].get(seed) for seed in seeds},
                }
                for rate in sorted(by_rate)
            ],
        }
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "seeds": list(seeds),
        "config": experiment.to_json(),
        "arms": arms,
        **provenance,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest:
    """What to tune, and where to write it."""

    experiment: Experiment
    arms: tuple[str, ...]
    rates: tuple[float, ...]
    num_seeds: int
    min_rounds: int
    max_rounds: int
    out: Path

    def __post_init__(self) -> None:
        check_arms(self.arms)
        check_grid(self.rates)
        require(self.num_seeds >= 1, f"--seeds must be at least 1, got {self.num_seeds}")
        require(
            0 <= self.min_rounds <= self.max_rounds,
            f"--rounds {self.min_rounds} must be between 0 and --max-rounds {self.max_rounds}",
        )
        require(not self.out.exists(), f"--out {self.out} exists already: give another file")

    @property
    def seeds(self) -> list[int]:
        """The tuning seeds."""
        return list(range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + self.num_seeds))


def run_tuning(request: TuneRequest, console: Console, *, command: str) -> dict[str, Any]:
    """Tune all arms, write the file, show the trials.

    Args:
        request: what to tune.
        console: where to show progress and the table.
        command: the command line, for the record.

    Returns:
        The contents of the file.

    Raises:
        InputError: the request cannot be served; nothing was written.
        RunsFailedError: a run failed; the rounds before are kept.
        InterruptedRunsError: Ctrl-C came; finished rounds are kept.
    """
    prove_file(request.out, f"--out {request.out}")
    task = load_task(request.experiment)
    jobs_at_once = len(request.arms) * len(request.rates) * request.num_seeds
    provenance = {
        "corpus": task.to_json(),
        "machine": describe_machine(num_workers=default_num_workers(jobs_at_once)),
        "command": command,
        "created": utc_now(),
    }
    # Not before the request is known to be good: an error should not wait for torch.
    from normuon_lab.train.runs.execution import execute
    from normuon_lab.train.runs.workers import Job

    contents: dict[str, Any] = {}

    def save(found: FinalLosses) -> None:
        contents.update(
            tuning_to_json(
                found, experiment=request.experiment, seeds=request.seeds, provenance=provenance
            )
        )
        write_json(request.out, contents)
        print_trials(contents, console)

    def run_many(specs: Sequence[RunSpec]) -> list[RunRecord]:
        records: list[RunRecord] = []
        execute(
            [Job(spec) for spec in specs],
            request.experiment,
            task,
            console=console,
            on_finished=lambda spec, record: records.append(record),
        )
        return records

    try:
        tune(
            request.arms,
            rates=request.rates,
            seeds=request.seeds,
            min_rounds=request.min_rounds,
            max_rounds=request.max_rounds,
            run_many=run_many,
            save=save,
        )
    except KeyboardInterrupt:
        kept = f"finished rounds are kept in {request.out}" if contents else "nothing was finished"
        raise InterruptedRunsError(f"interrupted: {kept}", can_resume=False) from None
    return contents


def print_trials(contents: Mapping[str, Any], console: Console) -> None:
    """Print the mean final loss of every arm and rate, the chosen rate marked."""
    rates = sorted({t["learning_rate"] for a in contents["arms"].values() for t in a["trials"]})
    table = Table(title="Mean final validation loss; * marks the chosen learning rate")
    table.add_column("learning rate", justify="right")
    for arm in contents["arms"]:
        table.add_column(ARMS[arm].label, justify="right")
    for rate in rates:
        table.add_row(f"{rate:.4g}", *(_cell(arm, rate) for arm in contents["arms"].values()))
    console.print(table)
    for name, arm in contents["arms"].items():
        if not arm["is_interior"]:
            console.print(f"{ARMS[name].label}: the best learning rate is at an end of the grid")


def _cell(arm: Mapping[str, Any], rate: float) -> str:
    for trial in arm["trials"]:
        if trial["learning_rate"] == rate:
            loss = trial["mean_final_loss"]
            mark = " *" if rate == arm["learning_rate"] else ""
            return ("diverged" if loss is None else f"{loss:.4f}") + mark
    return ""


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
