"""Where the `normuon` command begins: says which extra to install when one is missing.

Nothing here needs more than the standard library; the command itself is `cli.py`'s.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Sequence
from importlib import metadata

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_NOBODY_READS = 141
"""A shell's exit code for a process that SIGPIPE ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; 2, with one line, where an extra is missing."""
    # Tables and file names have characters that a terminal or a file in ASCII has not.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        from normuon_lab.cli import main as run

        code = run(arguments)
        # Here and not when Python ends, where an error could only be complained of.
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = extra_with(package)
        if extra is None:
            raise
        needed = f"the normuon command needs {package}: pip install 'normuon[{extra}]'"
        print(f"normuon: error: {needed}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:
        _write_no_more()
        return EXIT_NOBODY_READS
    except SystemExit as leaving:
        # How rich ends a program whose reader has gone.
        if isinstance(leaving.__context__, BrokenPipeError):
            return EXIT_NOBODY_READS
        raise
    except OSError as error:
        named = f": {error.filename}" if error.filename else ""
        print(f"normuon: error: {error.strerror or error}{named}", file=sys.stderr)
        try:
            if sys.stdout is not None:
                sys.stdout.flush()
        except OSError:
            _write_no_more()
        return EXIT_FAILED


def _write_no_more() -> None:
    """Let what is still to be written go nowhere; Python would complain once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def extra_with(package: str) -> str | None:
    """The extra of this distribution that installs a package; None if there is none.

    >>> extra_with("tyro"), extra_with("torch")
    ('lab', None)
    """
    normalized = package.replace("_", "-").lower()
    for requirement in metadata.requires("normuon") or ():
        found = re.match(r"([\w-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if found and found[1].replace("_", "-").lower() == normalized:
            return found[2]
    return None
