"""A dry run as text for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_dry_run(contents: Mapping[str, Any], console: Console) -> None:
    """Print what `dry_run.dry_run` found."""
    console.print(_run_table(contents))
    state = Table(
        "optimizer", "elements of state", "per hidden weight", title="State of hidden matrices"
    )
    for name, count in contents["state_elements"].items():
        ratio = contents["state_elements_per_hidden_weight"][name]
        state.add_row(name, f"{count:,}", f"{ratio:.4f}")
    console.print(state)
    memory = Table("memory of one rank", "GiB")
    for name, size in contents["memory_per_rank"].items():
        memory.add_row(name.removesuffix("_bytes").replace("_", " "), f"{size / 2**30:.2f}")
    console.print(memory)
    for line in (_plan_line(contents), _expected_line(contents)):
        console.print(line, highlight=False, soft_wrap=True)


def _plan_line(contents: Mapping[str, Any]) -> str:
    plan = contents["plan"]
    return (
        f"NorMuon's plan: {plan['num_orthogonalisations']} orthogonalisations, "
        f"{plan['num_buckets']} buckets, imbalance {plan['imbalance']:.3f}, "
        f"{plan['bytes_sent_total'] / 1e9:.2f} GB sent a step; normuon plan shows it."
    )


def _expected_line(contents: Mapping[str, Any]) -> str:
    hardware, expected = contents["hardware"], contents["expected"]
    return (
        f"Expected on {hardware['num_ranks']} devices of {hardware['device_tflops']:g} TFLOP/s at "
        f"MFU {hardware['mfu']:g} and {hardware['bandwidth']:g} GB/s: "
        f"{expected['step_seconds']:.3f} s a step, {expected['optimizer_seconds_per_step']:.3f} s "
        f"of it NorMuon's; {expected['tokens_per_second']:,.0f} tokens/s; "
        f"{expected['total_seconds'] / 86_400:.2f} days."
    )


def _run_table(contents: Mapping[str, Any]) -> Table:
    flops = contents["flops_per_token"]
    table = Table(title=f"{contents['preset']}: {contents['model']} with {contents['arm']}")
    table.add_column("of the run")
    table.add_column("", justify="right")
    for label, value in (
        ("parameters", f"{contents['parameters']:,}"),
        ("of hidden matrices", f"{contents['hidden_matrix_parameters']:,}"),
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in contents["mesh"].items())),
        ("steps", f"{contents['steps']:,}"),
        ("tokens a step", f"{contents['tokens_per_step']:,}"),
        ("tokens", f"{contents['tokens']:,}"),
        ("FLOPs a token", f"{flops['total']:.3e} (attention {flops['attention']:.2e})"),
        ("FLOPs", f"{contents['flops']:.3e}"),
    ):
        table.add_row(label, value)
    return table
