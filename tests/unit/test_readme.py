"""The README's code runs, and the figures that it and other pages quote are the files'."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
BOTH_OPTIONS = "normuon-heads-equilibrated"


def test_the_readmes_code_runs():
    (code,) = CODE.findall(README)
    names: dict[str, Any] = {}
    exec(code, names)
    assert "momentum_buffer" in names["optimizer"].state[names["model"][0].weight]


def test_the_code_that_switches_optimizers_keeps_the_momentum():
    code = CODE.findall((DOCS / "how-to" / "switch.md").read_text())[0]
    names: dict[str, Any] = {}
    exec(code, names)
    momentum = names["optimizer"].state[names["model"][0].weight]["momentum_buffer"]
    assert torch.equal(momentum, names["adamw"].state[names["model"][0].weight]["exp_avg"])


def test_the_readmes_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readmes_evidence_is_the_published_tables():
    published = {
        (row["cell"], row["arm"], row["baseline"]): row
        for row in json.loads((ROOT / "results" / "table1.json").read_text())["rows"]
    }
    for label, cell in (
        ("Python source, bytes, 0.5M parameters", "bytes-small"),
        ("Python source, bytes, 4.1M parameters", "bytes-large"),
        ("Shakespeare, BPE, 0.6M parameters", "bpe-small"),
        ("a + b mod 97, to 99% accuracy", "modular-addition"),
    ):
        figures = [
            _figure(published[cell, arm, baseline]) if (cell, arm, baseline) in published else ""
            for arm in ("normuon", BOTH_OPTIONS)
            for baseline in ("adamw", "muon")
        ]
        row = " | ".join(figures).rstrip(" |")
        assert figures[0]
        assert f"| {label} | {row} |" in README


def test_the_page_about_the_quick_run_explains_its_larger_gap():
    """Its figures are the file's; the losses that explain the gap are those of the runs."""
    quick = json.loads((ROOT / "benchmarks" / "results" / "compare_default.json").read_text())
    by_pair = {(row["arm"], row["baseline"]): row for row in quick["analysis"]["comparisons"]}
    steps = by_pair["normuon", "adamw"]["fewer_steps_percent"]
    loss = by_pair["normuon", "muon"]["loss_difference"]
    words = " ".join((DOCS / "lab" / "compare.md").read_text().split())
    saved = f"{steps['mean']:.1f}% ({steps['low']:.1f} to {steps['high']:.1f})"
    assert f"{saved} on four" in words
    assert f"This quick run shows {saved} over AdamW" in " ".join(README.split())
    assert f"{loss['mean']:.3f} nats ({loss['low']:.3f} to {loss['high']:.3f})" in words
    assert loss["low"] < 0 < loss["high"]
    for arm, name, only in (("adamw", "loss falls", ""), ("normuon", "NorMuon's", "only ")):
        before = fmean(run["final_loss"] for run in quick["runs"] if run["arm"] == arm)
        runs = sorted((ROOT / "results" / "bytes-small" / "runs").glob(f"{arm}-n500-s*.json"))
        assert len(runs) == 6
        after = fmean(json.loads(run.read_text())["run"]["final_loss"] for run in runs)
        assert f"{name} {only}from {before:.3f} to {after:.3f}" in words


def test_the_readme_says_that_the_options_help_muon_too():
    table = json.loads((ROOT / "results" / "table1.json").read_text())
    rows = [row for row in table["rows"] if row["baseline"] == "muon-heads-equilibrated"]
    by_cell = {row["cell"]: row for row in rows if row["p_value"] is not None}
    assert by_cell.keys() == {"bytes-small", "bpe-small", "bytes-large"}
    behind = by_cell.pop("bytes-large")
    assert all(row["p_value"] > 0.05 for row in by_cell.values())
    assert behind["p_value"] < 0.05
    assert behind["loss_difference"] > 0
    words = " ".join(README.split())
    assert (
        "is not shown to be ahead, and with 4.1M parameters it is behind: "
        f"{_figure(behind)}." in words
    )


def test_the_quoted_plans_are_the_published_tables():
    table = json.loads((ROOT / "benchmarks" / "results" / "plan_table.json").read_text())
    rows = {(row["model"], row["world_size"]): row for row in table["rows"]}
    row = rows["llama-1.1b", 64]
    assert row["packing_imbalance"] == 1
    assert (
        f"For llama-1.1b the busiest of 64 ranks does {row['imbalance']:.3f} times the least "
        f"possible work (the paper's round-robin: {row['round_robin']:.3f})"
        in " ".join(README.split())
    )
    costs = (DOCS / "explanation" / "costs.md").read_text()
    for model, world_size in (("gpt2-124m", 16), ("gpt2-350m", 64), ("llama-1.1b", 64)):
        row = rows[model, world_size]
        balanced = [f"{row[name]:.3f}" for name in ("imbalance", "round_robin", "padding")]
        cells = [model, str(world_size), *balanced, f"{row['replicate']:.1f}"]
        assert f"| {' | '.join(cells)} |" in costs


def _figure(row: dict[str, Any]) -> str:
    low, high = row["ci95_t"]
    return f"{row['steps_saved_percent']:.1f}% ({low:.1f} to {high:.1f})"


def test_the_page_about_ranks_says_what_teams_do_to_the_busiest_one():
    table = json.loads((ROOT / "benchmarks" / "results" / "plan_table.json").read_text())
    found = {
        row["way"]: f"{row['busiest_over_mean']:.3f}"
        for row in table["teams"]
        if (row["model"], row["bytes_per_second"]) == ("llama3-8b", 4e11)
    }
    teams, owners = found["teams"], found["one owner each"]
    words = " ".join((DOCS / "distributed.md").read_text().split())
    assert f"then does {teams} times the mean, instead of {owners}." in words


def test_the_table_beside_other_optimizers_is_its_files():
    """Rows on steps of CPU ranks, operations of a device, and state (the GPU's: tests/docs)."""
    results = ROOT / "benchmarks" / "results"
    ranks = json.loads((results / "distributed_4.json").read_text())["median_step_ms"]
    times = [f"{ranks[name]:,.0f} ms" for name in ("normuon", "torch.optim.Muon", "dion NorMuon")]
    assert f"| {' | '.join(times)} |" in README
    launches = json.loads((results / "launches.json").read_text())["rows"]
    row = next(row for row in launches if row["case"] == "rank 0 of 64, 448 matrices")
    assert f"rank 0 of 64, 448 matrices | {row['normuon']} | | {row['theirs']} |" in README
    steps = json.loads((results / "step_gpt2.json").read_text())
    kept = {one["name"]: one["state_elements"] for one in steps["contenders"]}
    entries = sum(one["count"] * one["rows"] * one["cols"] for one in steps["matrices"])
    rows = sum(one["count"] * one["rows"] for one in steps["matrices"])
    assert kept["torch.optim.Muon"] == entries
    assert kept["NorMuon auto float32"] == kept["dion NorMuon"] == entries + rows
