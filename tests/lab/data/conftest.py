"""Texts, shards and tokenizers for the tests of data."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from normuon_lab.data.shards import header

WORDS = ["neuron", "matrix", "momentum", "row", "step", "norm", "update", "weight", "é", "日本"]


def write_shard(path: Path, tokens: Sequence[int]) -> Path:
    """A shard in modded-nanogpt's format."""
    path.write_bytes(header(len(tokens)) + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def signal_from_elsewhere(pid: int) -> None:
    """Send what a scheduler and a terminal send; not from here, since a worker obeys its parent."""
    for name in ("TERM", "INT"):
        subprocess.run(["kill", f"-{name}", str(pid)], check=True)


def make_documents(count: int, *, seed: int = 0) -> list[str]:
    """Documents of 5 to 60 words, all different."""
    choose = random.Random(seed)
    return [
        f"{i} " + " ".join(choose.choices(WORDS, k=choose.randint(5, 60))) for i in range(count)
    ]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(300)


@pytest.fixture
def counted_shards(tmp_path: Path) -> Callable[[int, int], list[Path]]:
    """Shards whose tokens count upwards, so that a sequence shows where it is from."""

    def make(num_tokens: int, tokens_per_shard: int) -> list[Path]:
        return [
            write_shard(
                tmp_path / f"part-{start // tokens_per_shard:03d}.bin",
                range(start, min(start + tokens_per_shard, num_tokens)),
            )
            for start in range(0, num_tokens, tokens_per_shard)
        ]

    return make
