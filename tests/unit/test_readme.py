"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readmes_code_runs_from_top_to_bottom():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, Any] = {}
    for code in blocks:
        exec(code, names)
    momentum = names["optimizer"].state[names["model"][0].weight]["momentum_buffer"]
    assert torch.equal(momentum, names["old"].state[names["model"][0].weight]["exp_avg"])


def test_the_readmes_files_exist():
    root = Path(__file__).parents[2]
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
