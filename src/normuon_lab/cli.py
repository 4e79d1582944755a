"""The `normuon` command: subcommands, and errors of input as one line and exit code 2."""

from __future__ import annotations

import contextlib
import io
import itertools
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from functools import lru_cache
from importlib import metadata
from typing import Annotated, Any, Protocol, Union

import tyro

from normuon_lab.bench.command import BenchCommand
from normuon_lab.command_line import command_with
from normuon_lab.data.command import DataCommand
from normuon_lab.doctor import DoctorCommand
from normuon_lab.errors import InputError, InterruptedRunsError, RunsFailedError
from normuon_lab.plan.command import PlanCommand
from normuon_lab.study.compare.command import CompareCommand
from normuon_lab.study.evidence.command import EvidenceCommand
from normuon_lab.study.search.command import SweepCommand, TuneCommand
from normuon_lab.train.pretrain.command import Train, default_command
from normuon_lab.train.pretrain.export import ExportCommand
from normuon_lab.train.pretrain.inspect import InspectCommand

EXIT_RUNS_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

MAY_BE_EMPTY = ("--prompt", "--mesh")
"""Options that take an empty value, or say what to write instead; elsewhere it is most likely a
variable which the shell did not know."""
MAX_INTEGER = 2**63 - 1
"""Sizes and seeds are 64-bit integers wherever they are used."""

_INTEGERS = tyro.constructors.ConstructorRegistry()


@_INTEGERS.primitive_rule
def _integer_rule(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[int] | None:
    """Integers as Python reads them, but none beyond 64 bits."""
    if info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda words: _integer(words[0]),
        is_instance=lambda value: isinstance(value, int) and not isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def _integer(word: str) -> int:
    value = int(word)
    if abs(value) > MAX_INTEGER:
        raise ValueError(f"invalid literal for int(), beyond 64 bits: '{word}'")
    return value


class Runnable(Protocol):
    """A parsed command line."""

    def run(self) -> int:
        """Run the command and return its exit code."""


COMMANDS: dict[str, type[Runnable]] = {
    "compare": CompareCommand,
    "tune": TuneCommand,
    "sweep": SweepCommand,
    "evidence": EvidenceCommand,
    "plan": PlanCommand,
    "bench": BenchCommand,
    "train": Train,
    "data": DataCommand,
    "export": ExportCommand,
    "inspect": InspectCommand,
    "doctor": DoctorCommand,
}
Command: Any = Union[  # noqa: UP007
    tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in COMMANDS.items())
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code.

    Errors of input are one line on stderr and exit code 2; failed runs 1; Ctrl-C 130.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words == ["--version"]:
        print(f"normuon {metadata.version('normuon')}")
        return 0
    try:
        return parse(words).run()
    except InputError as error:
        return _fail(f"error: {error}", EXIT_BAD_INPUT)
    except RunsFailedError as error:
        return _fail(f"error: {error}", EXIT_RUNS_FAILED)
    except InterruptedRunsError as error:
        hint = f"; continue with: {command_with('--resume', words)}" if error.can_resume else ""
        return _fail(f"{error}{hint}", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("interrupted", EXIT_INTERRUPTED)


def parse(words: list[str]) -> Runnable:
    """Parses the words of a command line.

    Raises:
        InputError: they are not valid; tyro's boxes become one line.
    """
    _refuse_empty(words)
    shown = io.StringIO()
    # The defaults of these flags are those of --preset and --config, which are read first.
    defaults = {"default": default_command(words[1:])} if words[:1] == ["train"] else {}
    try:
        with contextlib.redirect_stderr(shown), _INTEGERS:
            command: Runnable = tyro.cli(  # type: ignore[call-overload]
                Command,
                prog="normuon",
                description="Train language models with NorMuon, and compare it with others.",
                args=words,
                config=(tyro.conf.FlagCreatePairsOff,),
                **defaults,
            )
    except SystemExit as leaving:
        if leaving.code in (0, None):
            raise
        raise InputError(_words_for(shown.getvalue(), words)) from None
    return command


def _refuse_empty(words: Sequence[str]) -> None:
    """Raise `InputError` for a value that is empty: as a path it would be the current folder."""
    for before, word in itertools.pairwise(["", *words]):
        option, separator, value = word.partition("=")
        if not word:
            option = before if before.startswith("--") else ""
        elif value or not (separator and option.startswith("--")):
            continue
        if option not in MAY_BE_EMPTY:
            name = _subcommand(words)
            text = f"{option} is empty: give a value, or leave {option} out"
            if not option:
                text = f"an argument of {name} is empty: give a value"
            raise InputError(f"{text} (see {name} --help)")


def _words_for(box: str, words: Sequence[str]) -> str:
    """What is wrong with a command line, from tyro's box, and which help to read."""
    text = _first_message(box)
    name = _subcommand(words)
    unknown = re.match(r"Unrecognized (?:or misplaced )?options: (.+)", text)
    if unknown:
        given = re.findall(
            r"[^\s,]+", re.sub(r"\(applied to [^)]*\)|Arguments are .*", "", unknown[1])
        )
        # What follows an unknown option is most likely its value.
        option = next((word for word in given if word.startswith("--")), given[0])
        of = "an option of" if option.startswith("-") else "a word of"
        text = f"{option} is not {of} {name}"
        close = get_close_matches(option, _known_words(name), n=1)
        if close:
            text += f"; did you mean {close[0]}?"
    number = re.match(r"Error parsing (--\S+): .*(int\(\)|to float).*: '(.*)'$", text)
    if number:
        kind = "an integer" if number[2] == "int()" else "a number"
        if "beyond 64 bits" in text:
            kind = f"an integer of at most {MAX_INTEGER}"
        text = f"{number[1]} {number[3]}: give {kind}"
    numbers = re.match(r"Error parsing (--\S+): Could not .*arguments:? \[(.*)\]", text)
    if numbers:
        values = " ".join(re.findall("'([^']*)'", numbers[2]))
        text = f"{numbers[1]} {values}: give numbers within 64 bits"
    return f"{text} (see {name} --help)"


def _subcommand(words: Sequence[str]) -> str:
    """The valid part of the command: ``normuon``, ``normuon train``."""
    named = ["normuon"]
    for word in words:
        if word not in _known_words(" ".join(named)) or word.startswith("-"):
            break
        named.append(word)
    return " ".join(named)


@lru_cache(maxsize=16)
def _known_words(name: str) -> tuple[str, ...]:
    """The options and the subcommands that the help of a command names."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(
            Command,
            prog="normuon",
            args=[*name.split()[1:], "--help"],
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    text = shown.getvalue()
    subcommands = re.search(r"\{([\w,-]+)\}", text)
    names = subcommands[1].split(",") if subcommands else []
    return (*sorted(set(re.findall(r"--[a-z][\w.-]*", text))), *names)


def _first_message(box: str) -> str:
    """The message inside one of tyro's boxes: the text above its first rule, on one line."""
    lines = [line.strip("│ ").strip() for line in box.splitlines()]
    is_rule = re.compile("[╭╰─-]{3,}.*|[╭╰].*").fullmatch
    # Above the first is nothing, or where the output is not UTF-8 the title.
    inside = itertools.dropwhile(lambda line: not is_rule(line), lines)
    message = itertools.takewhile(lambda line: not is_rule(line), itertools.islice(inside, 1, None))
    text = " ".join(" ".join(message).split())
    # What a group of options says of itself needs no name of the group, least of all tyro's.
    text = re.sub(r"^Error parsing __tyro-dummy-inner__\S*: ", "", text)
    return text or "the command line cannot be parsed"


def _fail(text: str, code: int) -> int:
    # Names of files may hold bytes that are no text.
    printable = f"normuon: {text}".encode("utf-8", "backslashreplace").decode()
    print(printable, file=sys.stderr)
    return code
