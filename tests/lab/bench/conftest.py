"""One dry run of the suite of one GPU, for all of its tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from normuon_lab.bench.suite.options import SuiteOptions
from normuon_lab.bench.suite.part import run_part
from normuon_lab.bench.suite.run import run_suite


def in_this_process(
    part: str, options: SuiteOptions, device: torch.device, budget: float, limit: float
) -> None:
    run_part(part, options, device=device, budget_seconds=budget)


@pytest.fixture(scope="session")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a dry run in this process found, but for the tests, and its folder."""
    out = tmp_path_factory.mktemp("suite")
    options = SuiteOptions(out=out, seconds=240, device="cpu", tests=False, command="normuon bench")
    return run_suite(options, start=in_this_process), out
