"""A plan's contents for the terminal, and words and units that the page uses too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Column, Table

from normuon.distributed.cost import format_bytes
from normuon_lab.errors import counted, significant


class Scheme(NamedTuple):
    """How a way of distributing is called, and drawn: a colour of Okabe and Ito's palette."""

    label: str
    short: str
    color: str


SCHEMES = {
    "plan": Scheme("this plan", "this plan", "#009E73"),
    "owners": Scheme("one owner for each matrix", "owners", "#56B4E9"),
    "round_robin": Scheme("the paper's round-robin", "round-robin", "#E69F00"),
    "replicate": Scheme("every rank computes everything", "replicated", "#0072B2"),
    "padding": Scheme("same shapes padded to all ranks", "padded", "#CC79A7"),
    "all_reduce": Scheme("shards with an all-reduce per step", "all-reduce", "#D55E00"),
}
"""Ways of distributing, in the order in which they are shown."""


def scheme_rows(contents: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per way of distributing, every cell in words."""
    rows = []
    for name, scheme in schemes_of(contents).items():
        label, short, _ = SCHEMES[name]
        if name == "plan" and contents["settings"]["balance"] == "paper":
            label = "this plan (round-robin)"
        rows.append(
            {
                "name": name,
                "label": label,
                "short": short,
                "num_orthogonalisations": f"{scheme['num_orthogonalisations']:,}",
                "busiest": format_flops(max(scheme["flops_by_rank"])),
                "imbalance": format_ratio(scheme["imbalance"]),
                "over_mean": format_ratio(scheme["busiest_over_mean"]),
                "bytes_sent": format_bytes(scheme["bytes_sent_total"]),
                "bytes_ratio": bytes_ratio(scheme),
                "scratch": format_bytes(scheme["scratch_bytes_max"]),
                "seconds": format_seconds(scheme["predicted_step_seconds"]),
            }
        )
    return rows


def schemes_of(contents: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The values of the plan, and of the ways of distributing that it is compared with."""
    known = {"plan": contents, **contents["alternatives"]}
    return {name: known[name] for name in SCHEMES if name in known}


def print_plan(contents: Mapping[str, Any], console: Console) -> None:
    """Totals, the ways of distributing side by side, and one line per kind of matrix."""
    model, mesh, memory = contents["model"], contents["mesh"], contents["memory"]
    wire = contents["traffic"]
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if axis != "world_size")

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(
        f"{model['name']}: {model['num_parameters']:,} parameters, "
        f"{model['num_hidden_parameters']:,} of them in {model['num_matrices']:,} hidden "
        f"{'matrix' if model['num_matrices'] == 1 else 'matrices'}"
    )
    say(
        f"{counted(mesh['world_size'], 'rank')} ({axes}), planned in "
        f"{format_seconds(contents['plan_seconds'])}"
    )
    console.print(_schemes_table(contents))
    say(
        "Round-robin is the paper's; replicated: every rank computes everything; padded: matrices "
        "of one shape in groups of one per rank, the last filled up; all-reduce: shards stay where "
        "they are and every Newton-Schulz step reduces a Gram matrix."
    )
    say(imbalance_sentence(contents))
    say(traffic_sentence(wire))
    say(
        f"Optimizer state: {format_bytes(memory['state_bytes_max'])} on the fullest rank, AdamW's "
        f"would be {format_bytes(memory['adamw_state_bytes_max'])}."
    )
    console.print(_kinds_table(contents))


def verdict(contents: Mapping[str, Any]) -> str:
    """The plan in one sentence: the step's time, against every rank computing everything."""
    step = contents["predicted_step_seconds"]
    everywhere = contents["alternatives"]["replicate"]["predicted_step_seconds"]
    sentence = f"One optimizer step should take about {format_seconds(step)}"
    if contents["mesh"]["world_size"] > 1 and step > 0:
        ratio = everywhere / step
        sentence += (
            f", {significant(ratio, 2)} times faster than if every rank computed everything"
            if ratio > 1.05
            else ", no faster than if every rank computed everything"
        )
    busiest = contents["busiest_over_mean"]
    if busiest < 1.005:
        return f"{sentence}; the work is spread evenly over the ranks."
    return f"{sentence}; the busiest rank does {format_ratio(busiest)} times the mean work."


def imbalance_sentence(contents: Mapping[str, Any]) -> str:
    """The bound of the imbalance, and whether a better plan was possible."""
    text = (
        f"The mean is {format_flops(contents['mean_flops'])} a rank. No assignment of whole "
        "matrices gives the busiest rank less than the bound, "
        f"{format_flops(contents['makespan_bound'])}"
    )
    if contents["settings"]["teams"] == "auto":
        return f"{text}; teams, which divide matrices, can."
    if contents["num_orthogonalisations"] > contents["model"]["num_matrices"]:
        return f"{text}; replicas repeat some matrices, which is quicker here than sending them."
    if contents["imbalance"] > 1.0005 and contents["packing_imbalance"] < 1.0005:
        least = f"{contents['imbalance']:.3f} times that is the minimum"
        return f"{text}; a bin-packing bound proves that {least}."
    return f"{text}."


def traffic_sentence(traffic: Mapping[str, Any]) -> str:
    """The two ways to count what NorMuon adds to AdamW's traffic."""
    paper = traffic["paper_accounting"]["float32_weights"]
    counted = (
        f"As the paper counts: {paper['adamw_bytes_per_parameter']:g} bytes per parameter become "
        f"{paper['normuon_bytes_per_hidden_parameter']:g} "
        f"(+{paper['increase_percent']:.0f}%)."
    )
    if traffic["increase_percent"] is None:
        return f"{counted} On this mesh AdamW's data parallelism sends nothing."
    return (
        f"On the wire: {format_bytes(traffic['adamw_bytes_sent_total'])} a step with AdamW, "
        f"+{significant(traffic['increase_percent'], 2)}% with this plan. {counted}"
    )


def bytes_ratio(scheme: Mapping[str, Any]) -> str:
    """Bytes sent over the least that owners must send, in words."""
    least = scheme["bytes_least_total"]
    if not least:
        return "1.000" if not scheme["bytes_sent_total"] else "-"
    return format_ratio(scheme["bytes_sent_total"] / least)


def format_ratio(ratio: float) -> str:
    """Three decimals near 1, fewer far from it.

    >>> format_ratio(1.0004), format_ratio(37.25), format_ratio(1024.0)
    ('1.000', '37.2', '1,024')
    """
    if ratio < 10:
        return f"{ratio:.3f}"
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:,.0f}"


def format_flops(flops: float) -> str:
    """FLOPs with a prefix.

    >>> format_flops(4.4e13)
    '44 TFLOP'
    """
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size:
            return f"{significant(flops / size, 4)} {prefix}FLOP"
    return f"{flops:.0f} FLOP"


def format_seconds(seconds: float) -> str:
    """Seconds with a prefix.

    >>> format_seconds(0.2481), format_seconds(66.1)
    ('248 ms', '66.1 s')
    """
    if seconds >= 1:
        return f"{significant(seconds, 3)} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _schemes_table(contents: Mapping[str, Any]) -> Table:
    columns = {
        "busiest": "busiest",
        "over_mean": "/ mean",
        "imbalance": "/ bound",
        "bytes_sent": "sent",
        "scratch": "scratch",
        "seconds": "time",
    }
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("per step", no_wrap=True)
    for title in columns.values():
        table.add_column(title, justify="right", no_wrap=True)
    for row in scheme_rows(contents):
        style = "bold" if row["name"] == "plan" else None
        table.add_row(row["short"], *(row[name] for name in columns), style=style)
    return table


def _kinds_table(contents: Mapping[str, Any]) -> Table:
    table = Table(
        Column("matrices", justify="right"),
        Column("of", no_wrap=True),
        Column("shape", justify="right", no_wrap=True),
        Column("each", justify="right", no_wrap=True),
        Column("owners", justify="right"),
        "placed",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    for kind in contents["kinds"]:
        table.add_row(
            f"{kind['num_matrices']:,}",
            kind["parameter"],
            f"{kind['rows']} x {kind['cols']}",
            format_flops(kind["flops_each"]),
            owners_text(kind),
            kind["placements"] or "on one rank",
        )
    return table


def owners_text(kind: Mapping[str, Any]) -> str:
    """How many ranks own matrices of a kind, and whether as teams."""
    text = f"{kind['num_owners']:,}"
    return text if kind["team_size"] == 1 else f"{text}, teams of {kind['team_size']}"
