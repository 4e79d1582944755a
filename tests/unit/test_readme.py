"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_the_readmes_code_runs(code):
    names: dict[str, object] = {}
    exec(code, names)
    assert "optimizer" in names


def test_the_readmes_files_exist():
    root = Path(__file__).parents[2]
    links = re.findall(r"\]\((?!http)([^)#]+)", README)
    assert links
    assert [link for link in links if not (root / link).exists()] == []
