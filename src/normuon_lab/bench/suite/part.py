"""One part of the suite: its input, its run, and the record of a failure.

As a program, the process of one part, so that a crash or a hang costs no other part: the first line
on standard input says what to do, and the input's end says that the suite is gone.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from normuon_lab.bench.suite.options import (
    DONE,
    DRY,
    FAILED,
    FULL,
    PARTS,
    RUNNING,
    Sizes,
    SuiteOptions,
)
from normuon_lab.bench.suite.record import json_path, read_record, write_record
from normuon_lab.errors import in_words


@dataclass(frozen=True, slots=True)
class PartContext:
    """What a part is given.

    Attributes:
        options: of the whole run.
        sizes: how large everything is.
        device: where.
        deadline: when the part should have ended, on `time.monotonic`'s clock.
        found: the values of parts that have run, by name.
        keep: records the part's results so far.
        say: prints progress.
    """

    options: SuiteOptions
    sizes: Sizes
    device: torch.device
    deadline: float
    found: Mapping[str, Mapping[str, Any]]
    keep: Callable[[Mapping[str, Any]], None]
    say: Callable[[str], None]

    @property
    def is_dry(self) -> bool:
        """Whether this is a dry run."""
        return self.device.type != "cuda"

    def seconds_left(self) -> float:
        """Until the deadline; negative after it."""
        return self.deadline - time.monotonic()


Run = Callable[[PartContext], Mapping[str, Any]]


def run_part(
    name: str,
    options: SuiteOptions,
    *,
    device: torch.device,
    budget_seconds: float,
    run: Run | None = None,
) -> None:
    """Runs a part and writes its results, or its failure, into gpu.json.

    `run` is called in place of the part's own module.
    """
    started = time.monotonic()
    record = read_record(json_path(options.out))
    entry = record["parts"][name]
    entry.update(status=RUNNING, reason=None, budget_seconds=budget_seconds, values={})

    def write(status: str, reason: str | None = None) -> None:
        spent = time.monotonic() - started
        record["elapsed_seconds"] += spent - (entry["seconds"] or 0.0)
        entry.update(status=status, reason=reason, seconds=spent)
        write_record(record, options.out)

    def keep(values: Mapping[str, Any]) -> None:
        entry["values"] = dict(values)
        write(RUNNING)

    entry["seconds"] = 0.0
    write(RUNNING)
    context = PartContext(
        options=options,
        sizes=DRY if device.type != "cuda" else FULL,
        device=device,
        deadline=started + budget_seconds,
        found={part: values["values"] for part, values in record["parts"].items()},
        keep=keep,
        say=lambda text: print(f"{name}: {text}", flush=True),
    )
    try:
        if run is None:
            run = importlib.import_module(f"normuon_lab.bench.suite.{PARTS[name].module}").run
        entry["values"] = dict(run(context))
    except Exception as error:  # The suite goes on, and what the part kept stays.
        traceback.print_exc()
        write(FAILED, in_words(error))
    else:
        write(DONE)


def _leave_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    run_part(
        request["part"],
        SuiteOptions(**request["options"]),
        device=torch.device(request["device"]),
        budget_seconds=request["budget_seconds"],
    )
    sys.stdout.flush()
    # Without waiting for threads of compilers, nor for the input that the parent holds open.
    os._exit(0)
