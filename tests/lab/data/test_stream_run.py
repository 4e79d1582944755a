"""A run on a stream: killed and resumed on two ranks, its weights are those of a run left alone."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch

from tests.lab.data.conftest import make_documents
from tests.lab.train.pretrain.kills import final_tensors, train_through_kills
from tests.lab.train.pretrain.processes import Job


@pytest.mark.slow
def test_a_run_on_a_stream_survives_kills_bit_by_bit(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_dict({"text": make_documents(400)})
    for number in range(4):
        rows.shard(num_shards=4, index=number).to_json(tmp_path / f"part-{number}.jsonl")
    values = {
        "data.source": f"stream:{tmp_path}/part-*.jsonl",
        "data.stream-shuffle": 9,
        "data.workers": 0,
        "data.cache": tmp_path / "cache",
        "steps": 30,
        "warmup-steps": 2,
        "batch-size": 4,
        "micro-batch-size": 1,
        "sequence-length": 32,
        "eval-every": 0,
        "save-every": 3,
        "diagnose": "every=5",
    }
    words = ["train", *(word for name, value in values.items() for word in (f"--{name}", value))]
    Job([*words, "--out", tmp_path / "whole"], tmp_path / "logs", world_size=2).wait().check()
    train_through_kills(
        words, tmp_path / "killed", tmp_path / "logs", world_size=2, num_kills=4, seed=0
    )
    expected, found = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
