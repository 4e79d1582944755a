"""What the README shows runs."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


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
    rows = json.loads((ROOT / "results" / "table1.json").read_text())["rows"]
    tasks = {"bytes-small": "Python source by bytes", "bpe-small": "Shakespeare by a BPE"}
    for (cell, task), baseline in itertools.product(tasks.items(), ("AdamW", "Muon")):
        (row,) = (
            row
            for row in rows
            if (row["cell"], row["arm"], row["baseline"]) == (cell, "normuon", baseline.lower())
        )
        low, high = row["ci95_t"]
        figure = f"{row['steps_saved_percent']:.1f}% ({low:.1f} to {high:.1f})"
        assert re.search(
            rf"fewer steps to the loss of {baseline},.*{task}.*\| {re.escape(figure)} \|", README
        )
