"""Does a list of runs in worker processes while the terminal shows how far they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from normuon_lab.errors import RunsFailedError, counted
from normuon_lab.machine import default_num_workers
from normuon_lab.train.runs import workers
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import Task
from normuon_lab.train.runs.workers import Failed, Finished, Job, Started, run_jobs


class RunDisplay:
    """One bar per run that is going on, with its loss and time left, and one for all runs.

    On a terminal the bars are live; elsewhere only the line per finished run is printed.
    """

    def __init__(
        self, console: Console, *, num_runs: int, num_done: int, steps: int, steps_done: int
    ) -> None:
        self._console = console
        self._num_runs = num_runs
        self._num_done = num_done
        self._steps_done = steps_done
        self._tasks: dict[RunSpec, TaskID] = {}
        self._lengths: dict[RunSpec, int] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        # Counted in steps, so that its time left means something before a run is finished.
        self._total = self._progress.add_task(
            "all runs", total=steps, completed=steps_done, note=""
        )

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for task in self._tasks.values():
            self._progress.remove_task(task)
        self._progress.stop()

    def start(self, spec: RunSpec, *, steps: int) -> None:
        """A run of `steps` steps begins."""
        self._lengths[spec] = steps
        self._tasks[spec] = self._progress.add_task(self._title(spec), total=steps, note="starting")

    def advance(self, spec: RunSpec, step: int, loss: float) -> None:
        """A run has done `step` steps."""
        task = self._tasks[spec]
        self._progress.update(task, completed=step, note=f"train loss {loss:.3f}")
        self._show_total()

    def finish(self, spec: RunSpec, record: RunRecord) -> None:
        """A run is done."""
        outcome = (
            f"diverged after {counted(len(record.train_losses), 'step')}"
            if record.final_loss is None
            else f"validation loss {record.final_loss:.4f}"
        )
        self._end(spec, f"{outcome} in {record.total_seconds:.1f} s")

    def fail(self, spec: RunSpec, reason: str) -> None:
        """A run ended without a result."""
        self._end(spec, f"failed: {reason}")

    def _end(self, spec: RunSpec, outcome: str) -> None:
        self._num_done += 1
        self._steps_done += self._lengths.pop(spec, 0)
        task = self._tasks.pop(spec, None)
        if task is not None:
            self._progress.remove_task(task)
        self._show_total()
        line = f"[{self._num_done}/{self._num_runs}] {self._title(spec)}: {outcome}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show_total(self) -> None:
        running = set(self._tasks.values())
        steps = sum(task.completed for task in self._progress.tasks if task.id in running)
        self._progress.update(self._total, completed=self._steps_done + steps)

    @staticmethod
    def _title(spec: RunSpec) -> str:
        return f"{spec.arm} seed {spec.seed} (lr {spec.learning_rate:g})"


def execute(
    jobs: Sequence[Job],
    experiment: Experiment,
    task: Task,
    *,
    console: Console,
    on_finished: Callable[[RunSpec, RunRecord], object],
    num_done: int = 0,
) -> None:
    """Do all jobs and hand over each record as it comes.

    Args:
        jobs: the runs, in order of start.
        experiment: what they share.
        task: its data.
        console: where to show progress.
        on_finished: called with every run's specification and record.
        num_done: runs of the experiment's length that were finished earlier, for the counter.

    Raises:
        RunsFailedError: after all other jobs are done, if any failed.
    """
    failures: list[Failed] = []
    lengths = {job.spec: job.spec.training(experiment).steps for job in jobs}
    display = RunDisplay(
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
                    display.start(spec, steps=lengths[spec])
                elif isinstance(event, workers.Progress):
                    display.advance(spec, event.step, event.loss)
                elif isinstance(event, Finished):
                    on_finished(spec, event.record)
                    display.finish(spec, event.record)
                else:
                    failures.append(event)
                    display.fail(spec, event.reason)
        finally:
            events.close()
    if failures:
        raise RunsFailedError(
            "; ".join(f"{event.job.spec.name} failed: {event.reason}" for event in failures)
        )


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
