"""benchmarks/step.py: what it says of the figures asked for, and sizes measured again."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "step.py"


@pytest.fixture(scope="module")
def step() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_step", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def contender(name: str, step_ms: list[float], error: float) -> dict[str, Any]:
    return {
        "name": name,
        "step_ms": step_ms,
        "polar": [{"direction_error": 0.5 * error}, {"direction_error": error}],
        "time_over_bound": 1.2,
        "scratch_bytes": 300,
        "state_elements": 40,
    }


def test_what_was_asked_is_compared_round_by_round(step):
    contents = {
        "contenders": [
            contender(step.OURS, [2.0, 3.0, 6.0], 0.2),
            contender(step.TORCH, [4.0, 4.0, 4.0], 0.1),
        ],
        "largest_class_bytes": 100,
        "normuon_state_elements": 40,
    }
    found = {line["what"]: line["measured"] for line in step.asked_of(contents)}
    assert found == {
        "step time over torch.optim.Muon": 0.75,
        f"polar error of {step.OURS} over that of {step.TORCH}": 2.0,
        "time over its FLOP bound": 1.2,
        "scratch over the largest class": 3.0,
        "state over m (n + 1)": 1.0,
    }


def test_growth_keeps_the_sizes_that_are_not_measured_again(step, tmp_path, monkeypatch):
    figure = tmp_path / "growth.svg"
    given = ("growth", "--repeats", "1", "--threads", "1", "--out", tmp_path, "--figure", figure)
    rows = {}
    for sizes in (("8", "12"), ("12",)):
        monkeypatch.setattr(
            sys, "argv", [str(word) for word in (SCRIPT, *given, "--sizes", *sizes)]
        )
        step.main()
        values = json.loads((tmp_path / "step_growth.json").read_text())
        rows[sizes] = {(row["size"], row["aspect"]): row["bench"] for row in values["rows"]}
    first, second = rows.values()
    assert list(first) == list(second) == [(8, "4:1"), (8, "square"), (12, "4:1"), (12, "square")]
    assert first[8, "square"] == second[8, "square"]
    assert first[12, "square"] != second[12, "square"]
    assert second[12, "4:1"]["matrices"] == [{"rows": 48, "cols": 12, "count": 1}]
    assert "PATH" in second[12, "4:1"]["command"]
    assert "</svg>" in figure.read_text()
