"""Plans a comparison, does the runs it is still missing, and keeps everything in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from normuon_lab.atomic_files import write_json
from normuon_lab.errors import InterruptedRunsError, RunsFailedError, require
from normuon_lab.machine import default_num_workers, describe_machine, utc_now
from normuon_lab.study.compare.results import (
    REPORT_FILE,
    RESULTS_FILE,
    Results,
    missing_runs,
    open_results,
)
from normuon_lab.study.search.tune import TunedRates
from normuon_lab.train.arms.registry import check_arms
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import Task, load_task

TENSORBOARD_FOLDER = "tensorboard"


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRequest:
    """What to compare, and where to put it.

    Attributes:
        given_rates: learning rates by arm that override the tuned ones.
        tuned_path: a tuning file; None for the one shipped with the package.
    """

    experiment: Experiment
    arms: tuple[str, ...]
    num_seeds: int
    given_rates: Mapping[str, float]
    tuned_path: str | None
    out: Path
    resume: bool

    def __post_init__(self) -> None:
        check_arms(self.arms)
        require(self.num_seeds >= 1, f"--seeds must be at least 1, got {self.num_seeds}")
        for arm in self.given_rates:
            require(arm in self.arms, f"--lr {arm}=...: {arm} is not among the arms")

    @property
    def seeds(self) -> list[int]:
        """The seeds that the claim is made on."""
        return list(range(self.num_seeds))


def run_comparison(request: ComparisonRequest, console: Console) -> Results:
    """Do what is missing of a comparison and write results, metrics and report.

    Of a finished one the report alone is written anew.

    Returns:
        The results, complete.

    Raises:
        InputError: the request cannot be served; nothing was written.
        RunsFailedError: some runs failed; what the others found was written.
        InterruptedRunsError: Ctrl-C came; finished runs are kept.
    """
    task = load_task(request.experiment)
    results = open_results(request.out, _planned(request, task), resume=request.resume)
    if results.is_complete:
        console.print(
            f"All {len(results.records)} runs of this comparison are in {request.out} already, of "
            f"{results.created}; another --out runs them anew.",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        _write_report(results, request.out)
        return results
    # Not before the request is known to be good: an error should not wait for torch.
    results.machine = results.machine or describe_machine(
        num_workers=default_num_workers(len(results.arms) * len(results.seeds))
    )
    _announce(results, console)
    try:
        _do_missing_runs(results, request, task, console)
    except KeyboardInterrupt:
        kept, wanted = len(results.records), len(results.arms) * len(results.seeds)
        raise InterruptedRunsError(
            f"interrupted: {kept} of {wanted} runs are kept in {request.out}", can_resume=kept > 0
        ) from None
    except RunsFailedError:
        if results.records:
            _write_report(results, request.out)
        raise
    _write_report(results, request.out)
    return results


def choose_learning_rates(request: ComparisonRequest, task: Task) -> dict[str, dict[str, Any]]:
    """Per arm the peak learning rate, a sentence on where it is from, and the trials behind it.

    Raises:
        InputError: an arm has neither a given nor a tuned rate, or the comparison's seeds are among
            those its rates were tuned on.
    """
    chosen: dict[str, dict[str, Any]] = {}
    for arm in request.arms:
        if arm in request.given_rates:
            value = request.given_rates[arm]
            # Validates it, before anything is read or written.
            RunSpec(arm=arm, seed=0, learning_rate=value)
            chosen[arm] = {"value": value, "source": "given on the command line", "trials": []}
    untuned = [arm for arm in request.arms if arm not in chosen]
    if not untuned:
        return chosen
    tuned = TunedRates.load(request.tuned_path)
    shared = sorted(set(tuned.seeds) & set(request.seeds))
    require(
        not shared,
        f"{tuned.source} was tuned on seed {shared[0] if shared else ''}, which this comparison "
        "would claim on: never tune and claim on the same seeds",
    )
    for arm in untuned:
        chosen[arm] = {
            "value": tuned.learning_rate(arm),
            "source": tuned.summary(arm, request.experiment, task.digest),
            "trials": tuned.values["arms"][arm]["trials"],
            "command": tuned.values.get("command"),
        }
    return {arm: chosen[arm] for arm in request.arms}


def _planned(request: ComparisonRequest, task: Task) -> Results:
    """The comparison's results before any run."""
    learning_rates = choose_learning_rates(request, task)
    return Results(
        config={
            "arms": list(request.arms),
            "seeds": request.seeds,
            "learning_rates": {arm: learning_rates[arm]["value"] for arm in request.arms},
            **request.experiment.to_json(),
        },
        corpus=task.to_json(),
        learning_rates=learning_rates,
        machine={},
        created=utc_now(),
    )


def _do_missing_runs(
    results: Results, request: ComparisonRequest, task: Task, console: Console
) -> None:
    from normuon_lab.train.runs.execution import execute
    from normuon_lab.train.runs.workers import Job

    def keep(spec: RunSpec, record: RunRecord) -> None:
        results.records.append(record)
        write_json(request.out / RESULTS_FILE, results.to_json())
        _write_scalars(request.out / TENSORBOARD_FOLDER, record)

    jobs = [
        # One seed is enough to see the shape of an update, and its numbers are many.
        Job(
            RunSpec(arm=arm, seed=seed, learning_rate=results.learning_rates[arm]["value"]),
            probe_updates=seed == results.seeds[0],
        )
        for arm, seed in missing_runs(results)
    ]
    execute(
        jobs,
        request.experiment,
        task,
        console=console,
        on_finished=keep,
        num_done=len(results.records),
    )


def _write_scalars(folder: Path, record: RunRecord) -> None:
    """Write the run's losses below `folder`, in place of what an earlier attempt left there."""
    from torch.utils.tensorboard import SummaryWriter

    run_folder = folder / f"{record.arm}-seed{record.seed}"
    shutil.rmtree(run_folder, ignore_errors=True)
    with SummaryWriter(log_dir=str(run_folder)) as writer:
        for step, loss in enumerate(record.train_losses, start=1):
            writer.add_scalar("loss/train", loss, step)
        for step, loss, seconds in zip(
            record.eval_steps, record.eval_losses, record.eval_seconds, strict=True
        ):
            writer.add_scalar("loss/validation", loss, step)
            writer.add_scalar("seconds/training", seconds, step)


def _announce(results: Results, console: Console) -> None:
    corpus = results.corpus
    console.print(
        f"{corpus['name']}: {corpus['train_tokens']:,} tokens to train on, "
        f"{corpus['validation_tokens']:,} held out, SHA-256 {corpus['sha256'][:16]}",
        highlight=False,
        soft_wrap=True,
    )
    for arm in results.arms:
        rate = results.learning_rates[arm]
        line = f"{arm}: learning rate {rate['value']:.4g}, {rate['source']}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _write_report(results: Results, out: Path) -> None:
    # Plotly takes a second to import, which an error in the request should not wait for.
    from normuon_lab.study.compare.report import write_report

    write_report(out / REPORT_FILE, results)
