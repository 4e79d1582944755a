"""A request to stop: SIGTERM, as schedulers send it before they take the machine away."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

from normuon_lab.train.ranks import Ranks


class StopRequest:
    """Notes SIGTERM while it is open, and lets ranks agree to stop at the same step.

    The signal only sets a flag: a step, or a checkpoint that is being written, ends first.
    """

    def __init__(self) -> None:
        self._requested = False

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; all ranks call this together."""
        return ranks.any(self._requested)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
