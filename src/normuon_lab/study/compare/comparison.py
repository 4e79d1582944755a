"""Plans a comparison, does its missing runs, and keeps everything in one folder."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from normuon_lab.atomic_files import write_json, write_text
from normuon_lab.errors import InterruptedRunsError, RunsFailedError, require
from normuon_lab.machine import default_num_workers, describe_machine, utc_now
from normuon_lab.study.compare.report import render_report, say
from normuon_lab.study.compare.results import REPORT_FILE, RESULTS_FILE, Results, open_results
from normuon_lab.study.search.tune import tuned_rates
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import Task

TENSORBOARD_FOLDER = "tensorboard"


def planned(
    experiment: Experiment,
    task: Task,
    arms: Sequence[str],
    seeds: Sequence[int],
    given_rates: Mapping[str, float],
    tuned_path: str | None,
) -> Results:
    """A comparison's results before any run; learning rates that are not given are tuned ones.

    Without a path, tuned rates are those that the package ships.

    Raises:
        InputError: an arm has neither a given nor a tuned rate, or its rate was tuned on one of the
            comparison's seeds.
    """
    for arm, value in given_rates.items():
        # Validates it, before anything is read or written.
        RunSpec(arm=arm, seed=0, learning_rate=value)
    rates: dict[str, dict[str, Any]] = {
        arm: {"value": value, "source": "given on the command line", "trials": []}
        for arm, value in given_rates.items()
    }
    untuned = [arm for arm in arms if arm not in rates]
    require(
        bool(untuned) or tuned_path is None,
        f"--tuned {tuned_path} is not needed: --lr gives every arm's rate; leave one of them out",
    )
    if untuned:
        rates |= tuned_rates(
            tuned_path, untuned, seeds=seeds, experiment=experiment, corpus_digest=task.digest
        )
    return Results(
        config={
            "arms": list(arms),
            "seeds": list(seeds),
            "learning_rates": {arm: rates[arm]["value"] for arm in arms},
            **experiment.to_json(),
        },
        corpus=task.to_json(),
        learning_rates={arm: rates[arm] for arm in arms},
        machine={},
        created=utc_now(),
    )


def run_comparison(
    new: Results, experiment: Experiment, task: Task, *, out: Path, resume: bool, console: Console
) -> Results:
    """Do the missing runs of a comparison and write results, metrics and report.

    Of a finished comparison only the report is written again.

    Raises:
        InputError: the request cannot be served; nothing was written.
        RunsFailedError: some runs failed; the others' results were written.
        InterruptedRunsError: Ctrl-C came; finished runs are kept.
    """
    results = open_results(out, new, resume=resume)
    if results.is_complete:
        say(
            console,
            f"All {len(results.records)} runs of this comparison are already in {out}, made "
            f"{results.created}; to run them again, give another --out.",
        )
        write_text(out / REPORT_FILE, render_report(results))
        return results
    # Not before the request is known to be good: an error should not wait for torch.
    results.machine = results.machine or describe_machine(
        num_workers=default_num_workers(results.num_runs)
    )
    corpus = results.corpus
    say(
        console,
        f"{corpus['name']}: {corpus['train_tokens']:,} tokens to train on, "
        f"{corpus['validation_tokens']:,} held out, SHA-256 {corpus['sha256'][:16]}",
    )
    for arm in results.arms:
        rate = results.learning_rates[arm]
        say(console, f"{arm}: learning rate {rate['value']:.4g}, {rate['source']}")
    try:
        _do_missing_runs(results, experiment, task, out, console)
    except KeyboardInterrupt:
        kept = len(results.records)
        if kept:
            # It may have come before the last record was written.
            write_json(out / RESULTS_FILE, results.to_json())
        raise InterruptedRunsError(
            f"interrupted: {kept} of {results.num_runs} runs are kept in {out}",
            can_resume=kept > 0,
        ) from None
    except RunsFailedError:
        if results.records:
            write_text(out / REPORT_FILE, render_report(results))
        raise
    write_text(out / REPORT_FILE, render_report(results))
    return results


def _do_missing_runs(
    results: Results, experiment: Experiment, task: Task, out: Path, console: Console
) -> None:
    from normuon_lab.train.runs.workers import Job, execute

    def keep(spec: RunSpec, record: RunRecord) -> None:
        results.records.append(record)
        write_json(out / RESULTS_FILE, results.to_json())
        _write_scalars(out / TENSORBOARD_FOLDER, record)

    jobs = [
        # One seed is enough to see the shape of an update, and its numbers are many.
        Job(
            RunSpec(arm=arm, seed=seed, learning_rate=results.learning_rates[arm]["value"]),
            probe_updates=seed == results.seeds[0],
        )
        for arm, seed in results.missing_runs()
    ]
    num_done = len(results.records)
    execute(jobs, experiment, task, console=console, on_finished=keep, num_done=num_done)


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
