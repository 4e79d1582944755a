"""What a step costs besides arithmetic: operations launched, host time, ranks' overhead, planning.

    python benchmarks/launches.py --dion PATH --out benchmarks/results/launches.json

`--only SECTION ...` measures some of the sections:

operations: what a `TorchDispatchMode` sees in one steady step of Llama-like layers (four D x D, two
    4D x D, one D x 4D), on one accelerator that is a name only (fake tensors, D = 1024) and on
    rank 0 of row-sharded ranks that only pretend to communicate (CPU tensors, D = 64). Views and
    allocations are left out; `launches_cases.OperationCounter` says precisely what is. What a peer
    compiles runs eagerly, operation by operation, as ours does. On the accelerator the library
    chooses Newton-Schulz's dtype, on CPU tensors it is bfloat16 whatever the processor.
host: milliseconds of those sharded steps on one CPU thread, contenders in turn in one process, with
    Newton-Schulz in float32. Nothing is sent: this is the host's work and some arithmetic.
ranks: a step on 2 Gloo ranks, the slower rank of each round, over a step of the same matrices in
    one process, in turn in the same two processes, one thread each.
planning: seconds and traced memory of `plan_for` for DeepSeek-V3's MoE layers.

Milliseconds are medians over rounds, ratios medians of the rounds' ratios with quartiles in
brackets. Every case runs in a process of its own. Reports; passes or fails on nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from launches_cases import (
    DION,
    ONE_PROCESS,
    OURS,
    PLANNED_RANKS,
    TORCH,
    count_steps,
    failure_words,
    layer_shapes,
    plan_experts,
    time_host,
    time_rank,
)

from normuon_lab.atomic_files import write_json
from normuon_lab.machine import describe_machine, utc_now

STEPPED = ((1, 16), (1, 64), (16, 16), (64, 16), (64, 64))
"""(ranks, layers); one rank is one accelerator, without a process group."""
PLANNING_REPEATS = 3
SECTIONS = {
    "operations": "device operations of one step",
    "host": "host time of one step, one CPU thread",
    "ranks": "a step on 2 Gloo ranks, one thread each",
    "planning": "planning",
}
HEADER = ("", "normuon", "beside", "value", "ratio")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Args:
        section: of `SECTIONS`.
        case: what was stepped or planned, and where.
        unit: of both values: "operations", "ms", "s" or "MiB".
        normuon: our value; None where our step failed.
        other: what it is compared with, if anything.
        theirs: the other's value; None where it failed.
        ratio: ours over theirs.
        ratio_quartiles: over rounds, where values are medians over rounds.
        details: what the values are made of, for the JSON file.
    """

    section: str
    case: str
    unit: str
    normuon: float | None
    other: str | None = None
    theirs: float | None = None
    ratio: float | None = None
    ratio_quartiles: tuple[float, float] | None = None
    details: Mapping[str, Any]


def fresh(function: Callable[..., Any], *calls: Sequence[Any]) -> list[Any]:
    """Runs a function once for every tuple of arguments, each in a new process, at one time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(calls), mp_context=context) as pool:
        return [future.result() for future in [pool.submit(function, *call) for call in calls]]


def contenders(world_size: int, layers: int, dion: str | None) -> list[str]:
    """Who steps a case, ours first; on one accelerator peers step the smaller model alone."""
    if world_size == 1 and layers != STEPPED[0][1]:
        return [OURS]
    return [OURS, *([DION] if dion else []), *([TORCH] if world_size == 1 else [])]


def operation_rows(dion: str | None) -> Iterator[Row]:
    """Counts of every contender."""
    for world_size, layers in STEPPED:
        names = contenders(world_size, layers, dion)
        (found,) = fresh(count_steps, (world_size, layers, names, dion))
        ours = found[OURS]["total"]
        others: list[str | None] = [*names[1:]] or [None]
        for other in others:
            theirs = found[other]["total"] if other else None
            yield Row(
                section="operations",
                case=case_words(world_size, layers),
                unit="operations",
                normuon=ours,
                other=other,
                theirs=theirs,
                ratio=ours / theirs if ours and theirs else None,
                details={name: found[name] for name in (OURS, other) if name},
            )


def host_rows(dion: str | None) -> Iterator[Row]:
    """Times on rank 0 of ranks that only pretend to communicate."""
    for world_size, layers in STEPPED:
        if world_size > 1:
            names = contenders(world_size, layers, dion)
            (found,) = fresh(time_host, (world_size, layers, names, dion))
            yield timed_row("host", case_words(world_size, layers), found, OURS, DION)


def rank_rows(_: str | None) -> Iterator[Row]:
    """Two real ranks beside one process."""
    for experts in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            ranks = fresh(time_rank, *((rank, f"{folder}/store", experts) for rank in range(2)))
        found = {name: [*map(max, *(times[name] for times in ranks))] for name in ranks[0]}
        what = "24 parameters [256, 16, 16]" if experts else "200 matrices [32, 32]"
        for name in found:
            if name != ONE_PROCESS:
                yield timed_row("ranks", f"{what}, sharded {name}", found, name, ONE_PROCESS)


def planning_rows(_: str | None) -> Iterator[Row]:
    """Time from processes of its own: tracing memory makes planning slower."""
    timed = [fresh(plan_experts, (False,))[0] for _ in range(PLANNING_REPEATS)]
    (traced,) = fresh(plan_experts, (True,))
    seconds = [plan["seconds"] for plan in timed]
    case = f"{traced['num_matrices']:,} matrices, {PLANNED_RANKS} ranks"
    details = {name: traced[name] for name in ("num_matrices", "imbalance")}
    yield Row(
        section="planning",
        case=f"{case}: time",
        unit="s",
        normuon=statistics.median(seconds),
        details=details | {"seconds": seconds},
    )
    yield Row(
        section="planning",
        case=f"{case}: traced peak",
        unit="MiB",
        normuon=traced["peak_bytes"] / 2**20,
        details=details,
    )


ROWS = dict(zip(SECTIONS, (operation_rows, host_rows, rank_rows, planning_rows), strict=True))


def timed_row(
    section: str, case: str, found: Mapping[str, Sequence[float]], ours: str, other: str
) -> Row:
    """Medians over rounds, and the median of the rounds' ratios if the other was timed too."""
    row = Row(
        section=section,
        case=case,
        unit="ms",
        normuon=statistics.median(found[ours]),
        details={f"{name} ms": [round(value, 3) for value in found[name]] for name in found},
    )
    if other not in found:
        return row
    ratios = [mine / theirs for mine, theirs in zip(found[ours], found[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return dataclasses.replace(
        row,
        other=other,
        theirs=statistics.median(found[other]),
        ratio=middle,
        ratio_quartiles=(low, high),
    )


def case_words(world_size: int, layers: int) -> str:
    """Where a model is stepped, and how many matrices it has."""
    where = "one accelerator" if world_size == 1 else f"rank 0 of {world_size}"
    return f"{where}, {len(layer_shapes(layers, 1))} matrices"


def table_cells(row: Row) -> tuple[str, ...]:
    """A row's cells, one for each of `HEADER`."""

    def value(number: float | None) -> str:
        if number is None:
            return "failed"
        if row.unit == "operations":
            return f"{number:,}"
        return f"{number:,.{2 if row.unit == 's' else 1}f} {row.unit}"

    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    if row.ratio_quartiles is not None:
        ratio += " ({:.2f} to {:.2f})".format(*row.ratio_quartiles)
    theirs = "" if row.other is None else value(row.theirs)
    return f"  {row.case}", value(row.normuon), row.other or "", theirs, ratio


def print_table(rows: Sequence[Row], failures: Mapping[str, str], dion: str | None) -> None:
    """All rows in one table, section by section, and what is missing from it."""
    cells = {
        section: [table_cells(row) for row in rows if row.section == section]
        for section in SECTIONS
    }
    lines = [HEADER, *(line for found in cells.values() for line in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]

    def show(line: tuple[str, ...]) -> None:
        padded = [
            f"{cell:{'>' if column in (1, 3) else '<'}{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(padded).rstrip())

    show(HEADER)
    for section, found in cells.items():
        if found:
            print(SECTIONS[section])
        for line in found:
            show(line)
    for what, words in failures.items():
        print(f"{what} failed: {words}")
    if dion is None:
        print(f"{DION} is left out: give --dion PATH, a checkout of github.com/microsoft/dion")


def measure(
    sections: Sequence[str], dion: str | None
) -> tuple[list[Row], dict[str, str], dict[str, float]]:
    """The rows of these sections, what failed and why, and the seconds that each section took."""
    rows: list[Row] = []
    failures, seconds = {}, {}
    for section in sections:
        print(f"measuring {SECTIONS[section]} ...", file=sys.stderr, flush=True)
        started = time.perf_counter()
        try:
            for row in ROWS[section](dion):
                rows.append(row)
                for name, value in row.details.items():
                    if isinstance(value, dict) and "failure" in value:
                        failures[f"{row.case}, {name}"] = value["failure"]
        except Exception as error:
            failures[section] = failure_words(error)
        seconds[section] = round(time.perf_counter() - started, 1)
    return rows, failures, seconds


def main() -> None:
    """Measure what was asked for, print the table, and write it when told where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dion", type=Path, help="a checkout of github.com/microsoft/dion")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    if arguments.dion and not (arguments.dion / "dion" / "__init__.py").is_file():
        parser.error(f"--dion {arguments.dion}: it has no dion/__init__.py")
    dion = str(arguments.dion.resolve()) if arguments.dion else None
    rows, failures, seconds = measure(arguments.only, dion)
    print_table(rows, failures, dion)
    if arguments.out is not None:
        all_sections = arguments.only == list(SECTIONS)
        only = "" if all_sections else f" --only {' '.join(arguments.only)}"
        contents = {
            "kind": "benchmarks/launches.py",
            "schema_version": 1,
            "command": f"python benchmarks/launches.py{only}{' --dion PATH' if dion else ''}",
            "created": utc_now(),
            "machine": describe_machine(num_workers=2 if "ranks" in arguments.only else 1),
            "section_seconds": seconds,
            "failures": failures,
            "rows": [dataclasses.asdict(row) for row in rows],
        }
        write_json(arguments.out, contents)


if __name__ == "__main__":
    main()
