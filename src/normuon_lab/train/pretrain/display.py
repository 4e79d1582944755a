"""What the terminal shows of a run: one bar that moves, or lines where nobody watches."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# In a log file: often enough to see that a run lives.
_SECONDS_BETWEEN_LINES = 30.0


class RunDisplay:
    """A progress bar on a terminal; elsewhere a line now and then. Silent on ranks but the first.

    Args:
        console: where to show it.
        step: the step to begin from.
        steps: those of the whole run.
        enabled: False for ranks that have nothing to say.
    """

    def __init__(self, console: Console, *, step: int, steps: int, enabled: bool) -> None:
        self._console = console
        self._steps = steps
        self._enabled = enabled
        self._last_line = 0.0
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not (enabled and console.is_terminal),
        )
        self._task = self._progress.add_task("", total=steps, completed=step, note="")

    def __enter__(self) -> RunDisplay:
        self._progress.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

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

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
