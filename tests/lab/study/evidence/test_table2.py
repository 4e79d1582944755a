"""Table 2's measurements on a tiny model: counts exactly, times only that they are there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from normuon_lab.study.evidence.protocol import Cell
from normuon_lab.study.evidence.table2 import expected_hidden_state, read_table2, write_table2
from normuon_lab.train.runs.config import Experiment
from tests.lab.study.evidence import synthetic


@pytest.fixture
def tiny(experiment: Experiment) -> Cell:
    return replace(synthetic.cell(other_arms=["adam-mini"]), experiment=experiment)


def test_counts_are_those_of_the_formulas(tiny: Cell, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    said: list[str] = []
    write_table2(tmp_path, [tiny], rounds=2, say=said.append)
    assert said == ["bytes-small: 4 arms"]
    assert torch.get_num_threads() == threads
    contents = read_table2(tmp_path)
    assert contents is not None
    found = contents["cells"]["bytes-small"]
    expected = expected_hidden_state(found["hidden_matrices"])
    for arm, elements in expected.items():
        assert found["arms"][arm]["hidden_state_elements"] == elements
    for measured in found["arms"].values():
        assert measured["state_bytes"] >= 4 * measured["hidden_state_elements"]
        assert 0 < measured["share_percent"] < 100
        assert measured["step_ms_quartiles"][0] <= measured["step_ms"]
        assert measured["scratch_bytes"] >= 0


def test_other_cells_are_kept(tiny: Cell, tmp_path: Path) -> None:
    write = {"rounds": 1, "say": lambda text: None}
    write_table2(tmp_path, [tiny], **write)
    write_table2(tmp_path, [replace(tiny, name="other", other_arms=())], **write)
    contents = read_table2(tmp_path)
    assert contents is not None
    assert list(contents["cells"]) == ["bytes-small", "other"]


def test_no_file_is_no_table(tmp_path: Path) -> None:
    assert read_table2(tmp_path) is None
