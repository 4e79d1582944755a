"""What the README shows runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BOTH_OPTIONS = "normuon-heads-equilibrated"


def test_the_readmes_code_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for code in blocks:
        exec(code, names)
    momentum = names["optimizer"].state[names["model"][0].weight]["momentum_buffer"]
    assert torch.equal(momentum, names["old"].state[names["model"][0].weight]["exp_avg"])


def test_the_readmes_files_exist():
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_readmes_evidence_is_the_published_tables():
    published = {
        (row["cell"], row["arm"], row["baseline"]): row
        for row in json.loads((ROOT / "results" / "table1.json").read_text())["rows"]
    }
    for label, cell, arm in (
        ("NorMuon, Python source by bytes", "bytes-small", "normuon"),
        ("NorMuon, the same with 4.1M parameters", "bytes-large", "normuon"),
        ("NorMuon, Shakespeare by a BPE", "bpe-small", "normuon"),
        ("NorMuon, a + b mod 97, to 99% accuracy", "modular-addition", "normuon"),
        ("with both options, Python source by bytes", "bytes-small", BOTH_OPTIONS),
        ("with both options, the same with 4.1M parameters", "bytes-large", BOTH_OPTIONS),
        ("with both options, Shakespeare by a BPE", "bpe-small", BOTH_OPTIONS),
    ):
        figures = [_figure(published[cell, arm, baseline]) for baseline in ("adamw", "muon")]
        assert f"| {label} | {' | '.join(figures)} |" in README


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
        f"| {row['imbalance']:.3f}, which no assignment betters (the paper's round-robin: "
        f"{row['round_robin']:.3f}) |" in README
    )
    costs = (ROOT / "docs" / "explanation" / "costs.md").read_text()
    for model, world_size in (("gpt2-124m", 16), ("gpt2-350m", 64), ("llama-1.1b", 64)):
        row = rows[model, world_size]
        balanced = [f"{row[name]:.3f}" for name in ("imbalance", "round_robin", "padding")]
        cells = [model, str(world_size), *balanced, f"{row['replicate']:.1f}"]
        assert f"| {' | '.join(cells)} |" in costs


def _figure(row: dict[str, Any]) -> str:
    low, high = row["ci95_t"]
    return f"{row['steps_saved_percent']:.1f}% ({low:.1f} to {high:.1f})"


def test_the_readme_says_what_teams_do_to_the_busiest_rank():
    table = json.loads((ROOT / "benchmarks" / "results" / "plan_table.json").read_text())
    found = {
        row["way"]: f"{row['busiest_over_mean']:.3f}"
        for row in table["teams"]
        if (row["model"], row["bytes_per_second"]) == ("llama3-8b", 4e11)
    }
    assert f'| {found["teams"]} with `teams="auto"`, {found["one owner each"]} with one' in README
