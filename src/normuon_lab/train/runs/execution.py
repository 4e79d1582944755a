"""Does a list of runs in worker processes, with progress on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from normuon_lab.errors import RunsFailedError, counted
from normuon_lab.machine import default_num_workers
from normuon_lab.train.display import RunsDisplay
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import Task
from normuon_lab.train.runs.workers import Failed, Finished, Job, Progress, Started, run_jobs


def execute(
    jobs: Sequence[Job],
    experiment: Experiment,
    task: Task,
    *,
    console: Console,
    on_finished: Callable[[RunSpec, RunRecord], object],
    num_done: int = 0,
) -> None:
    """Do all jobs and pass on each record as it comes.

    Raises:
        RunsFailedError: after all other jobs are done, if any failed.
    """
    failures: list[Failed] = []
    lengths = {job.spec: job.spec.training(experiment).steps for job in jobs}
    display = RunsDisplay(
        console,
        num_runs=num_done + len(jobs),
        num_done=num_done,
        steps=num_done * experiment.training.steps + sum(lengths.values()),
        steps_done=num_done * experiment.training.steps,
    )
    events = run_jobs(jobs, experiment, task, num_workers=default_num_workers(len(jobs)))
    with display:
        try:
            for event in events:
                spec = event.job.spec
                if isinstance(event, Started):
                    title = f"{spec.arm} seed {spec.seed} (lr {spec.learning_rate:g})"
                    display.start(spec, title, steps=lengths[spec])
                elif isinstance(event, Progress):
                    display.advance(spec, event.step, event.loss)
                elif isinstance(event, Finished):
                    on_finished(spec, event.record)
                    display.end(spec, _outcome(event.record))
                else:
                    failures.append(event)
                    display.end(spec, f"failed: {event.reason}")
        finally:
            events.close()
    if failures:
        raise RunsFailedError(
            "; ".join(f"{event.job.spec.name} failed: {event.reason}" for event in failures)
        )


def _outcome(record: RunRecord) -> str:
    outcome = (
        f"diverged after {counted(len(record.train_losses), 'step')}"
        if record.final_loss is None
        else f"validation loss {record.final_loss:.4f}"
    )
    return f"{outcome} in {record.total_seconds:.1f} s"


def execute_specs(
    specs: Sequence[RunSpec], experiment: Experiment, task: Task, *, console: Console
) -> dict[RunSpec, RunRecord]:
    """Do all runs and return their records; see `execute`."""
    records: dict[RunSpec, RunRecord] = {}
    execute(
        [Job(spec) for spec in specs],
        experiment,
        task,
        console=console,
        on_finished=records.__setitem__,
    )
    return records
