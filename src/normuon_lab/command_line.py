"""The command line, for the record and with another option."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

MAKE_TARGET = "NORMUON_MAKE_TARGET"
"""Environment variable in which the Makefile names the target that called the command."""


def recorded_command() -> str:
    """The command line, for the record: ``normuon compare --seeds 2``."""
    return shlex.join(["normuon", *sys.argv[1:]])


def command_with(option: str, words: Sequence[str] | None = None) -> str:
    """The same command with one more option, as a user would type it.

    The words are what followed ``normuon``, by default the process's own.
    """
    words = list(sys.argv[1:] if words is None else words)
    words = [word for word in words if word != option]
    target = os.environ.get(MAKE_TARGET)
    if target and words[:1] == [target]:
        # make takes a dollar as the beginning of a variable.
        arguments = shlex.join([*words[1:], option]).replace("$", "$$")
        return f"make {target} ARGS={shlex.quote(arguments)}"
    return f"{program()} {shlex.join([*words, option])}"


def program() -> str:
    """How a shell finds this program: by name on the PATH, or by the path of this call."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == (__package__, "__main__.py"):
        return f"{_by_name_or_path(Path(sys.executable))} -m normuon_lab"
    if called.name == "normuon":
        return _by_name_or_path(called)
    return "normuon"


def _by_name_or_path(program: Path) -> str:
    found = shutil.which(program.name)
    is_on_path = found is not None and Path(found).absolute() == program.absolute()
    return program.name if is_on_path else shlex.quote(str(program))
