"""A benchmark's contents for the terminal, within 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from normuon.distributed.cost import format_bytes
from normuon_lab.bench.contents import polar_error
from normuon_lab.errors import counted

Cells = Callable[[Mapping[str, Any]], tuple[str, ...]]
"""A contender's values as the cells of its line."""

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
        f"{1e-9 * rate:.3g} in {dtype}"
        for dtype, rate in contents["matmul_peak_flops_per_second"].items()
    )
    say(f"{contents['title']}: {matrices}")
    say(
        f"{contents['device']}, {machine['processor']}, "
        f"{counted(machine['threads_per_worker'], 'thread')}; "
        f"GFLOP/s of a product of side {contents['matmul_peak_side']}: {peaks}"
    )
    console.print(_table(contents, ("ms", "± IQR/2", "x first", "x bound", "error"), _timed_cells))
    console.print(_table(contents, ("GFLOP", "products", "scratch", "state"), _counted_cells))
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


def _table(contents: Mapping[str, Any], titles: Sequence[str], cells: Cells) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("one step")  # Names wrap where the line is short; numbers never do.
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for values in contents["contenders"]:
        style = "bold" if values["name"] == contents["reference"] else None
        table.add_row(values["name"], *cells(values), style=style)
    return table


def _timed_cells(values: Mapping[str, Any]) -> tuple[str, ...]:
    first, third = values["quartiles_ms"]
    over_bound, error = values["time_over_bound"], polar_error(values)
    return (
        f"{values['median_ms']:.4g}",
        f"{(third - first) / 2:.2g}",
        f"{values['ratio_to_reference']:.2f}",
        "-" if over_bound is None else f"{over_bound:.2f}",
        "-" if error is None else f"{error:.4f}",
    )


def _counted_cells(values: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{1e-9 * values['flops']:.4g}",
        f"{values['profile']['products_share']:.0%}",
        format_bytes(values["scratch_bytes"]),
        format_bytes(values["state_bytes"]),
    )
