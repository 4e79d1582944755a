"""Loading processes that only the training process can end.

Ctrl-C and a scheduler's SIGTERM reach every process of a job. A loading process that obeyed would
take away the batches of the last steps before a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker

# macOS does not say who sent a signal, and has no schedulers that preempt.
_KNOWS_SENDERS = hasattr(signal, "sigwaitinfo")


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start processes inside: they, and every thread of theirs, begin with SIGTERM held back.

    A library's thread that took the signal instead would end the process by it. What comes for this
    process meanwhile arrives afterwards.
    """
    if not _KNOWS_SENDERS:
        yield
        return
    # It would be started with the first process, and lets SIGTERM through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(worker: int) -> None:
    """Ignore SIGINT, and SIGTERM from all but the parent; a loader's ``worker_init_fn``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _KNOWS_SENDERS:
        threading.Thread(target=_end_when_parent_asks, daemon=True).start()


def _end_when_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
