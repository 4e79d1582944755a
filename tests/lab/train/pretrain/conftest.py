"""Finished runs: checkpoints of two ranks and of one, with Llama's and with GPT-2's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.lab.train.pretrain.processes import Job

GPT2 = {
    "model_type": "gpt2",
    "n_layer": 1,
    "n_embd": 32,
    "n_head": 2,
    "n_positions": 64,
    "vocab_size": 300,
    "tie_word_embeddings": True,
}


def words_for(data: Path, cache: Path, **options: object) -> list[object]:
    """A run of four steps."""
    values = {
        "data.source": data,
        "data.cache": cache,
        "data.workers": 0,
        "steps": 4,
        "warmup-steps": 1,
        "batch-size": 4,
        "micro-batch-size": 2,
        "sequence-length": 32,
        "eval-every": 0,
        **options,
    }
    return ["train", *(word for name, value in values.items() for word in (f"--{name}", value))]


@pytest.fixture(scope="session")
def llama_run(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """A Llama over bytes, trained by two ranks of FSDP2."""
    folder = tmp_path_factory.mktemp("llama")
    words = words_for(text_file, folder / "cache")
    Job([*words, "--out", folder / "run"], folder / "logs", world_size=2).wait().check()
    return folder / "run"


@pytest.fixture(scope="session")
def gpt2_run(
    tmp_path_factory: pytest.TempPathFactory, text_file: Path, tokenizer_file: Path
) -> Path:
    """A GPT-2, whose head is its embedding, over a tokenizer's tokens in a prepared folder."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = folder / "config.json"
    config.write_text(json.dumps(GPT2))
    prepare = ["data", "prepare", text_file, "--out", folder / "data"]
    Job([*prepare, "--tokenizer", tokenizer_file], folder / "logs").wait().check()
    words = words_for(folder / "data", folder / "cache", model=config, arm="adamw", lr=1e-3)
    Job([*words, "--out", folder / "run"], folder / "logs").wait().check()
    return folder / "run"
