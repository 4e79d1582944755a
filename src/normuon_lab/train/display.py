"""Progress of training: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping

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

# In a log file: often enough to see that a run lives.
_SECONDS_BETWEEN_LINES = 30.0


class _Display:
    """Bars with a note, the elapsed and the remaining time, on an open terminal."""

    def __init__(self, console: Console, *, enabled: bool = True) -> None:
        self._console = console
        self._enabled = enabled
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class RunDisplay(_Display):
    """One run: a bar on a terminal, elsewhere a line now and then. Silent unless `enabled`."""

    def __init__(self, console: Console, *, step: int, steps: int, enabled: bool) -> None:
        super().__init__(console, enabled=enabled)
        self._steps = steps
        self._last_line = 0.0
        self._task = self._progress.add_task("training", total=steps, completed=step, note="")

    def advance(self, step: int, values: Mapping[str, float]) -> None:
        """A row of metrics was taken after `step` steps."""
        note = (
            f"loss {values['train_loss']:.4f}  lr {values['learning_rate']:.2e}  "
            f"{values['tokens_per_second']:,.0f} tokens/s"
        )
        self._progress.update(self._task, completed=step, note=note)
        now = time.monotonic()
        is_due = now - self._last_line >= _SECONDS_BETWEEN_LINES or step == self._steps
        if not self._console.is_terminal and is_due:
            self._last_line = now
            self.say(f"step {step}/{self._steps}  {note}")


class RunsDisplay(_Display):
    """Many runs: a bar for each running one and one for all, and a line for each that ends.

    The bar for all counts the steps of all runs, so that its time left means something before a run
    is finished. `num_done` and `steps_done` are of runs that were done before.
    """

    def __init__(
        self, console: Console, *, num_runs: int, num_done: int, steps: int, steps_done: int
    ) -> None:
        super().__init__(console)
        self._num_runs = num_runs
        self._num_done = num_done
        self._steps_done = steps_done
        self._running: dict[Hashable, TaskID] = {}
        self._total = self._progress.add_task(
            "all runs", total=steps, completed=steps_done, note=""
        )

    def __exit__(self, *error: object) -> None:
        for task in self._running.values():
            self._progress.remove_task(task)
        super().__exit__(*error)

    def start(self, run: Hashable, title: str, *, steps: int) -> None:
        """A run of `steps` steps begins."""
        self._running[run] = self._progress.add_task(title, total=steps, note="starting")

    def advance(self, run: Hashable, step: int, loss: float) -> None:
        """A run has done `step` steps."""
        note = f"train loss {loss:.3f}"
        self._progress.update(self._running[run], completed=step, note=note)
        self._show_total()

    def end(self, run: Hashable, outcome: str) -> None:
        """A run ended, with or without a result."""
        number = self._running.pop(run)
        (task,) = (task for task in self._progress.tasks if task.id == number)
        self._num_done += 1
        self._steps_done += int(task.total or 0)
        self._progress.remove_task(number)
        self._show_total()
        self.say(f"[{self._num_done}/{self._num_runs}] {task.description}: {outcome}")

    def _show_total(self) -> None:
        running = (task.completed for task in self._progress.tasks if task.id != self._total)
        self._progress.update(self._total, completed=self._steps_done + sum(running))
