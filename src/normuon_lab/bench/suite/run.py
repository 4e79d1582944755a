"""Runs the parts of the suite, each in its own process and time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import normuon_lab
from normuon_lab.atomic_files import prove_folder
from normuon_lab.bench.suite.options import (
    CUT,
    DONE,
    DRY,
    FAILED,
    FULL,
    NO_TIME,
    NOT_RUN,
    PARTS,
    SuiteOptions,
    matrices_of,
)
from normuon_lab.bench.suite.record import (
    json_path,
    new_record,
    page_note,
    page_path,
    plain,
    read_record,
    write_record,
)
from normuon_lab.errors import require
from normuon_lab.machine import utc_now

PATIENCE = 1.4
GRACE_SECONDS = 20.0
"""A part is ended after so many times its budget, or so many seconds more if that is longer."""

OVERTIME_SECONDS = 30.0
"""A part is ended when the suite has taken so much more than it was given."""

Start = Callable[[str, SuiteOptions, torch.device, float, float], None]


def run_suite(options: SuiteOptions, *, start: Start | None = None) -> dict[str, Any]:
    """Runs every part, by default in a process each; returns what gpu.json holds in the end.

    Raises:
        InputError: there is no such device or model, or the folder cannot be made.
    """
    has_cuda = torch.cuda.is_available()
    require(has_cuda or options.device != "cuda", "--device cuda: torch finds no CUDA device")
    for model in options.models:
        matrices_of(model, tiny=True)
    device = torch.device("cuda:0" if has_cuda and options.device != "cpu" else "cpu")
    prove_folder(options.out, f"--out {options.out}")
    page_path(options.out).unlink(missing_ok=True)
    dry_run = device.type != "cuda"
    # The device's name is the first part's: asking for it here would take memory from all parts.
    write_record(new_record(options, device=device.type, dry_run=dry_run), options.out)
    if dry_run:
        print("Dry run on a CPU: tiny sizes, and no number says anything about a GPU.", flush=True)
    started = time.monotonic()
    with _ended_by_signals():
        for position, part in enumerate(PARTS):
            left = options.seconds - (time.monotonic() - started)
            asked = [one for one in [*PARTS][position:] if options.left_out(one) is None]
            _one_part(part, options, device, left=left, asked=asked, start=start or in_process)
    record = read_record(json_path(options.out))
    record.update(finished=utc_now(), elapsed_seconds=time.monotonic() - started)
    write_record(record, options.out)
    for part in PARTS:
        entry = record["parts"][part]
        print(f"{part}: {entry['status']}{_because(entry)}")
    print(f"Results: {json_path(options.out)}\n{page_note(options.out)}", flush=True)
    return record


def exit_code(record: Mapping[str, Any]) -> int:
    """1 if a part failed or was cut, else 0."""
    states = {entry["status"] for entry in record["parts"].values()}
    return 1 if states & {FAILED, CUT} else 0


def _one_part(
    part: str,
    options: SuiteOptions,
    device: torch.device,
    *,
    left: float,
    asked: list[str],
    start: Start,
) -> None:
    is_dry = device.type != "cuda"
    sizes = DRY if is_dry else FULL
    budgets = {name: one.dry_budget if is_dry else one.budget for name, one in PARTS.items()}
    reason = options.left_out(part)
    share, least = budgets[part]
    budget = 0.0
    if reason is None:
        budget = left * share / sum(budgets[one][0] for one in asked)
        # A short run's first parts may take more than their share, if the rest can bear it.
        budget = min(left + sizes.overtime_seconds, max(budget, least))
        reason = NO_TIME if budget < least else None
    if reason is not None:
        _mark(options, part, NOT_RUN, reason)
        return
    print(f"{part}: {budget:.0f} s", flush=True)
    patience = max(PATIENCE * budget, budget + GRACE_SECONDS)
    last = left + sizes.overtime_seconds + OVERTIME_SECONDS
    start(part, options, device, budget, min(last, patience))
    entry = read_record(json_path(options.out))["parts"][part]
    if entry["status"] not in (DONE, FAILED, CUT):
        _mark(options, part, FAILED, "its process ended without a word")
    elif entry["reason"]:
        print(f"{part}: {entry['status']}{_because(entry)}", flush=True)


def in_process(
    part: str, options: SuiteOptions, device: torch.device, budget: float, limit: float
) -> None:
    """Runs a part in a process of its own and ends it after `limit` seconds."""
    request = {
        "part": part,
        "options": plain(asdict(options)),
        "device": str(device),
        "budget_seconds": budget,
    }
    # Threads that wait for one another make tiny steps on a busy CPU take a hundred times as long.
    threads = {"OMP_NUM_THREADS": "1"} if device.type == "cpu" else {}
    source = str(Path(normuon_lab.__file__).parents[1])
    child = subprocess.Popen(
        [sys.executable, "-m", "normuon_lab.bench.suite.part"],
        stdin=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={
            **os.environ,
            **threads,
            "PYTHONPATH": os.pathsep.join(
                path for path in (source, os.environ.get("PYTHONPATH")) if path
            ),
            # Read when torch is loaded: its profiler otherwise comments on each use on stderr.
            "KINETO_LOG_LEVEL": os.environ.get("KINETO_LOG_LEVEL", "99"),
        },
    )
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(request) + "\n")
        child.stdin.flush()
        code = child.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        _end(child)
        _mark(options, part, CUT, f"ended after {limit:.0f} s; what it had found is kept")
    except BrokenPipeError:
        code = child.wait()
        _mark(options, part, FAILED, f"its process could not start: exit code {code}")
    else:
        if code != 0:
            _mark(options, part, FAILED, f"its process ended with exit code {code}")
    finally:
        _end(child)


def _end(child: subprocess.Popen[str]) -> None:
    """Ends a part and what it started, which share its session."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        with suppress(BrokenPipeError):
            child.stdin.close()


def _mark(options: SuiteOptions, part: str, status: str, reason: str) -> None:
    record = read_record(json_path(options.out))
    record["parts"][part].update(status=status, reason=reason)
    write_record(record, options.out)


def _because(entry: Mapping[str, Any]) -> str:
    return f" ({entry['reason']})" if entry["reason"] else ""


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """When the suite is asked to end, the running part ends, too."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
