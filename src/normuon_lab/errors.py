"""The errors that the command line turns into one line and an exit code."""

from __future__ import annotations


class InputError(ValueError):
    """What the user gave cannot be used; the text is one line and says what to do instead."""


class RunsFailedError(RuntimeError):
    """Some runs ended without a record; the text names each, with its reason."""


class InterruptedRunsError(Exception):
    """Ctrl-C came; the text says what was kept.

    Attributes:
        can_resume: whether the same command with `--resume` goes on.
    """

    def __init__(self, text: str, *, can_resume: bool) -> None:
        super().__init__(text)
        self.can_resume = can_resume


def require(condition: bool, message: str) -> None:
    """Raise `InputError` with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)
