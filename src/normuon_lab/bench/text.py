"""A benchmark's contents for the terminal, within 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from normuon.distributed.cost import format_bytes
from normuon_lab.bench.race import polar_error
from normuon_lab.errors import counted, significant

Columns = Mapping[str, Callable[[Mapping[str, Any]], str]]
"""Titles, and what makes each cell of a contender's values."""

TIMES: Columns = {
    "ms": lambda one: significant(one["median_ms"], 4),
    "± IQR/2": lambda one: significant((one["quartiles_ms"][1] - one["quartiles_ms"][0]) / 2, 2),
    "x first": lambda one: f"{one['ratio_to_reference']:.2f}",
    "x bound": lambda one: _or_dash(one["time_over_bound"], ".2f"),
    "error": lambda one: _or_dash(polar_error(one), ".4f"),
}
FIGURES: Columns = {
    "GFLOP": lambda one: significant(1e-9 * one["flops"], 4),
    "products": lambda one: f"{one['profile']['products_share']:.0%}",
    "scratch": lambda one: format_bytes(one["scratch_bytes"]),
    "state": lambda one: format_bytes(one["state_bytes"]),
}
LEGEND = (
    "x first: time over the first line's, round by round. x bound: time over that of its own "
    "counted FLOPs at the measured rate of products. error: distance of its direction from the "
    "polar factor, the worst shape, without neuron scaling. scratch: all memory besides weights, "
    "gradients and state."
)


def print_bench(contents: Mapping[str, Any], console: Console) -> None:
    """The matrices, two lines per contender, where ours spends its time, and who is missing."""

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    matrices = ", ".join(
        f"{one['count']} of {one['rows']} x {one['cols']}" for one in contents["matrices"]
    )
    machine = contents["machine"]
    peaks = ", ".join(
        f"{significant(1e-9 * rate, 3)} in {dtype}"
        for dtype, rate in contents["matmul_peak_flops_per_second"].items()
    )
    say(f"{contents['title']}: {matrices}")
    say(
        f"{contents['device']}, {machine['processor']}, "
        f"{counted(machine['threads_per_worker'], 'thread')}; "
        f"GFLOP/s of a product of side {contents['matmul_peak_side']}: {peaks}"
    )
    console.print(_table(contents, TIMES))
    console.print(_table(contents, FIGURES))
    say(f"Medians of {contents['rounds']} interleaved steps. {LEGEND}")
    say(memory_sentence(contents))
    say(profile_sentence(contents["contenders"][0]))
    for name, reason in contents["not_run"].items():
        say(f"Not run: {name}: {reason}")
    for values in contents["contenders"]:
        if values["note"]:
            say(f"Note: {values['name']}: {values['note']}")


def memory_sentence(contents: Mapping[str, Any]) -> str:
    """State and scratch of the first contender, and what they should be."""
    first = contents["contenders"][0]
    scratch = first["scratch_bytes"] / contents["largest_class_bytes"]
    return (
        f"{first['name']}: {first['state_elements']:,} elements of state where m (n + 1) is "
        f"{contents['normuon_state_elements']:,}; scratch is {scratch:.2f} of the largest class of "
        "matrices."
    )


def profile_sentence(values: Mapping[str, Any]) -> str:
    """Where a contender's time goes."""
    profile = values["profile"]
    wall = profile["wall_ms"]
    rest = ", ".join(
        f"{name.partition('::')[2]} {spent / wall:.1%}"
        for name, spent in profile["rest_by_operator_ms"].items()
        if spent / wall >= 0.001
    )
    return (
        f"{values['name']} spends {profile['products_share']:.1%} of a profiled step in matrix "
        f"products, {profile['rest_ms'] / wall:.1%} in other operators ({rest or 'all small'}) and "
        f"{profile['outside_ms'] / wall:.1%} outside of any."
    )


def _table(contents: Mapping[str, Any], columns: Columns) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("one step")  # Names wrap where the line is short; numbers never do.
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for one in contents["contenders"]:
        style = "bold" if one["name"] == contents["reference"] else None
        table.add_row(one["name"], *(cell(one) for cell in columns.values()), style=style)
    return table


def _or_dash(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
