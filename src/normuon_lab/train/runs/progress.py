"""What the terminal shows while runs are going on."""

from __future__ import annotations

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

from normuon_lab.train.runs.config import RunSpec
from normuon_lab.train.runs.records import RunRecord


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
            f"diverged after {len(record.train_losses)} steps"
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
