"""Trains a run through many kill -9, each followed by `--resume auto`, and says where they fell.

$ python -m tests.lab.train.pretrain.kills --world-size 2 --kills 20 --folder /tmp/kills
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from normuon_lab.train.pretrain.checkpoint import newest_complete
from normuon_lab.train.pretrain.checkpoint_tensors import TensorReader, load_tensors_
from normuon_lab.train.pretrain.metrics import read_metrics
from tests.lab.train.pretrain.processes import Job

_PATIENCE_SECONDS = 60


def train_through_kills(
    words: Sequence[object], out: Path, logs: Path, *, world_size: int, num_kills: int, seed: int
) -> Counter[str]:
    """Start a run, kill it, resume it, and so on; let it end after the last kill.

    Every other kill waits for a checkpoint that is being written; the rest fall at any moment of
    training. Each attempt first gets to a new step, so that the run advances.

    Args:
        words: the command without --out and --resume.
        out: the run's folder.
        logs: a folder for what the processes print.
        world_size: ranks, all of which are killed.
        num_kills: how often.
        seed: of the moments.

    Returns:
        How many kills fell in a save, and how many in steps.
    """
    choose = random.Random(seed)
    fell: Counter[str] = Counter()
    full = [*words, "--out", out, "--resume", "auto"]
    for number in range(num_kills):
        rows, saves = _metrics_inode(out), _saves(out)
        job = Job(full, logs / str(number), world_size=world_size)
        try:
            # A run that goes on writes its metrics anew, and then a row for each step.
            _wait_for(job, lambda rows=rows: _metrics_inode(out) != rows and _has_advanced(out))
            if number % 2:
                _wait_for(job, lambda saves=saves: bool(_saves(out) - saves))
                time.sleep(choose.uniform(0.0, 0.01))
            else:
                time.sleep(choose.uniform(0.0, 0.3))
            assert job.is_alive(), f"the run ended before kill {number + 1} of {num_kills}"
        finally:
            job.kill()
        fell["save" if _saves(out) - saves else "steps"] += 1
    Job(full, logs / "last", world_size=world_size).wait(600).check()
    return fell


def _metrics_inode(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.stat().st_ino if metrics.exists() else 0


def _has_advanced(out: Path) -> bool:
    rows = read_metrics(out / "metrics.jsonl")
    newest = newest_complete(out)
    step = 0 if newest is None else int(newest.name.removeprefix("step-"))
    return bool(rows) and rows[-1]["step"] > step


def _saves(out: Path) -> set[int]:
    """The checkpoints that are being written, or were when a kill came."""
    found = set()
    for path in (out / "checkpoints").glob(".step-*"):
        with suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


def _wait_for(job: Job, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while not condition():
        assert job.is_alive(), job.wait(1).stderr
        assert time.monotonic() < deadline, "the run does not advance"
        time.sleep(0.001)


def final_tensors(out: Path) -> dict[str, Tensor]:
    """Every tensor of a run's last checkpoint, whole, whatever wrote it; RNG states too."""
    path = newest_complete(out)
    assert path is not None
    entries = TensorReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
    }
    load_tensors_(tensors, path)
    return tensors


def main() -> None:
    """Compare a killed run with one that is not, on the given number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("words", nargs="*", help="further options of normuon train, after --")
    given = parser.parse_args()
    words = ["train", *given.words]
    whole, killed, logs = (given.folder / name for name in ("whole", "killed", "logs"))
    world_size = given.world_size
    started = time.monotonic()
    Job([*words, "--out", whole], logs / "whole", world_size=world_size).wait(600).check()
    print(f"uninterrupted: {time.monotonic() - started:.0f} s", flush=True)
    fell = train_through_kills(
        words, killed, logs, world_size=world_size, num_kills=given.kills, seed=given.seed
    )
    expected, found = final_tensors(whole), final_tensors(killed)
    assert expected.keys() == found.keys()
    differing = [name for name in expected if not torch.equal(expected[name], found[name])]
    print(f"{given.kills} kills on {world_size} ranks: {dict(fell)}; {len(expected)} tensors")
    print(f"differing: {differing or 'none'}")


if __name__ == "__main__":
    main()
