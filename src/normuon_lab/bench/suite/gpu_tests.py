"""The repository's tests of the GPU, counted."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import normuon_lab
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.errors import MAX_WORDS

FOLDER = Path("tests/gpu")
MARGIN_SECONDS = 2.0
MOST_WORKERS = 8
"""Of pytest-xdist: kernels compile side by side, and each worker takes some memory of the GPU."""
STATES = "PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS"
OUTCOME = re.compile(rf"^(?P<name>\S+::.*?) (?P<state>{STATES})\b.*\[ *\d+%\]$")
OUTCOME_OF_WORKER = re.compile(rf"^\[gw\d+\] \[ *\d+%\] (?P<state>{STATES}) (?P<name>\S+::.*?) *$")
REASON = re.compile(r"^(?:FAILED|ERROR) (\S+::.*?) - (.*)$")
SKIP = re.compile(r"^(?:SKIPPED) \[(\d+)\] [^ ]+: (.*)$")


def run(context: PartContext) -> dict[str, Any]:
    """Counts of outcomes and the names of failures.

    Raises:
        RuntimeError: there is nothing to run the tests with, pytest ran none, or time ran out.
    """
    root = find_root()
    if root is None:
        raise RuntimeError(f"no {FOLDER} here: run from a checkout of the repository")
    if importlib.util.find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed")
    timed_out = False
    with tempfile.TemporaryFile("w+") as output:
        try:
            # Without the options of pyproject.toml, which need pytest's plugins.
            code = subprocess.run(
                [
                    *(sys.executable, "-m", "pytest", str(FOLDER), "-v", "--tb=line", "-rfEs"),
                    *("-p", "no:cacheprovider", "-o", "addopts=", *_workers(context)),
                ],
                cwd=root,
                env={
                    **os.environ,
                    "COLUMNS": "400",
                    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
                    # So that tests that time cuts are counted as far as they came.
                    "PYTHONUNBUFFERED": "1",
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, context.seconds_left() - MARGIN_SECONDS),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            timed_out, code = True, None
        output.seek(0)
        text = output.read()
    values = {"exit_code": code, "timed_out": timed_out, **counted(text)}
    context.keep(values)
    if timed_out:
        raise RuntimeError("the tests took longer than their time")
    if not sum(values["counts"].values()):
        last = text.strip().splitlines()[-1:] or ["no output"]
        raise RuntimeError(f"pytest ran no test: exit code {code}, {last[0][:MAX_WORDS]}")
    return values


def _workers(context: PartContext) -> tuple[str, ...]:
    """Arguments that run tests side by side on a GPU, where pytest-xdist is installed."""
    if context.is_dry or importlib.util.find_spec("xdist") is None:
        return ()
    return "-p", "xdist", "-n", str(min(MOST_WORKERS, os.cpu_count() or 1))


def find_root() -> Path | None:
    """The checkout with the tests: the working folder, or the one this package lies in."""
    candidates = (Path.cwd(), Path(normuon_lab.__file__).resolve().parents[2])
    return next((one for one in candidates if (one / FOLDER).is_dir()), None)


def counted(text: str) -> dict[str, Any]:
    """Outcomes in pytest's verbose output, complete or not.

    Example:
        >>> counted("tests/gpu/test_a.py::test_b[{'x': 1}] PASSED          [ 50%]")["counts"]
        {'passed': 1}
        >>> counted("[gw3] [ 50%] FAILED tests/gpu/test_a.py::test_b[{'x': 1}] ")["counts"]
        {'failed': 1}
    """
    counts: Counter[str] = Counter()
    failures: dict[str, str] = {}
    skips = []
    for line in text.splitlines():
        if outcome := OUTCOME.match(line) or OUTCOME_OF_WORKER.match(line):
            counts[outcome["state"].lower()] += 1
            if outcome["state"] in ("FAILED", "ERROR"):
                failures.setdefault(outcome["name"], "")
        elif reason := REASON.match(line):
            failures[reason[1]] = reason[2][:MAX_WORDS]
        elif skip := SKIP.match(line):
            skips.append({"count": int(skip[1]), "reason": skip[2][:MAX_WORDS]})
    return {
        "counts": dict(counts),
        "failures": [{"name": name, "reason": reason} for name, reason in failures.items()],
        "skips": skips,
    }
