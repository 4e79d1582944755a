"""The errors that the command line prints as one line with an exit code, and how texts put numbers,
options and errors into words."""

from __future__ import annotations

MAX_WORDS = 300
"""Characters of an error's text that a record keeps."""


class InputError(ValueError):
    """The user's input cannot be used; the text is one line and says what to do instead."""


class RunsFailedError(RuntimeError):
    """Some runs ended without a record; the text names each, with its reason."""


class InterruptedRunsError(Exception):
    """The run was interrupted by Ctrl-C; the text says what was kept.

    It `can_resume` if the same command with `--resume` continues it.
    """

    def __init__(self, text: str, *, can_resume: bool) -> None:
        super().__init__(text)
        self.can_resume = can_resume


def counted(number: int, noun: str) -> str:
    """A number and what it counts, for messages.

    Example:
        >>> counted(1, "shard"), counted(1200, "shard")
        ('1 shard', '1,200 shards')
    """
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def significant(value: float, digits: int) -> str:
    """A number to so many significant digits, written out where ``g`` takes an exponent.

    Example:
        >>> significant(2.449, 3), significant(507_340.0, 3), significant(1e-7, 3)
        ('2.45', '507,000', '1e-07')
    """
    text = f"{value:.{digits}g}"
    return f"{float(text):,.0f}" if "e+" in text else text


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its kind where it has none.

    Example:
        >>> first_line(ValueError("no such file\\nsee the manual")), first_line(KeyError())
        ('no such file', 'KeyError')
    """
    return _first_line_of_text(error) or type(error).__name__


def in_words(error: BaseException) -> str:
    """An error's class and the first line of its text, cut to `MAX_WORDS` characters.

    Example:
        >>> in_words(ValueError("no such file\\nsee the manual")), in_words(KeyError())
        ('ValueError: no such file', 'KeyError')
    """
    return f"{type(error).__name__}: {_first_line_of_text(error)}"[:MAX_WORDS].rstrip(": ")


def _first_line_of_text(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


def require(condition: bool, message: str) -> None:
    """Raise `InputError` with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def flag(field: str) -> str:
    """The command line's name of a configuration's field.

    Example:
        >>> flag("batch_size")
        '--batch-size'
    """
    return f"--{field.replace('_', '-')}"
