"""`python -m normuon_lab.bench.suite`: the suite where tyro and the rest of the lab are missing."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from normuon_lab.bench.suite.options import PARTS, SuiteOptions
from normuon_lab.errors import InputError

EXIT_BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the suite and returns its exit code: 1 if a part failed, 2 for bad input."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    given = vars(parser().parse_args(words))
    command = shlex.join(["python", "-m", "normuon_lab.bench.suite", *words])
    from normuon_lab.bench.suite.run import exit_code, run_suite

    try:
        return exit_code(run_suite(SuiteOptions(**given, command=command)))
    except InputError as error:
        print(f"normuon: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


def parser() -> argparse.ArgumentParser:
    """Its flags, those of `normuon bench --suite gpu`; what is not given is `SuiteOptions`' own."""
    made = argparse.ArgumentParser(
        prog="python -m normuon_lab.bench.suite",
        description="Measure NorMuon on one GPU within a given time; on a CPU, a dry run.",
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("--out", type=Path, help="folder of gpu.json")
    made.add_argument("--seconds", type=float, help="for everything")
    made.add_argument("--device", choices=("auto", "cpu", "cuda"))
    made.add_argument("--dion", type=Path, help="a checkout of github.com/microsoft/dion")
    made.add_argument("--only", nargs="*", help="contenders' names, as a shell matches them")
    made.add_argument("--parts", nargs="*", help=f"of {', '.join(PARTS)}")
    made.add_argument("--models", nargs="+", help="of the step table")
    made.add_argument("--no-tests", dest="tests", action="store_false", help="leave tests/gpu out")
    made.add_argument("--tokens-per-step", type=int, help="of the training step")
    made.add_argument("--lr", type=float, help="of both optimizers compared")
    made.add_argument("--seed", type=int)
    return made


if __name__ == "__main__":
    sys.exit(main())
