"""A rank that dies in the middle of a step: the others end with an error, a restart goes on."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from normuon.step import sharded
from tests.distributed.parity import differing, values
from tests.distributed.test_checkpoints import (
    SAVED_AFTER,
    STEPS,
    built,
    content,
    load_content,
    train,
    uninterrupted,
)

NUM_RANKS = 3
COLLECTIVE_SECONDS = 20
JOIN_SECONDS = 120


def start_group(rank: int, folder: str, attempt: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(f"{folder}/store-{attempt}", NUM_RANKS),
        rank=rank,
        world_size=NUM_RANKS,
        timeout=timedelta(seconds=COLLECTIVE_SECONDS),
    )


def die(self, bucket):
    os.kill(os.getpid(), signal.SIGKILL)


def first_attempt(rank: int, folder: str) -> None:
    """Saves after three steps; rank 1 dies between gather and return of the fifth."""
    start_group(rank, folder, "first")
    params, optimizer = built("3 rows")
    train(params, optimizer, range(SAVED_AFTER))
    dcp.save(content(params, optimizer), checkpoint_id=f"{folder}/checkpoint")
    train(params, optimizer, [SAVED_AFTER])
    if rank == 1:
        with mock.patch.object(sharded.ShardedStep, "_compute", die):
            train(params, optimizer, [SAVED_AFTER + 1])
    started = time.monotonic()
    try:
        train(params, optimizer, [SAVED_AFTER + 1])
    except RuntimeError as error:
        seconds = time.monotonic() - started
        Path(f"{folder}/end-{rank}").write_text(f"{seconds} {str(error)[:200]}")
        os._exit(17)


def second_attempt(rank: int, folder: str) -> None:
    start_group(rank, folder, "second")
    params, optimizer = built("3 rows")
    found = content(params, optimizer)
    dcp.load(found, checkpoint_id=f"{folder}/checkpoint")
    load_content(params, optimizer, found)
    train(params, optimizer, range(SAVED_AFTER, STEPS))
    differences = differing(values(*uninterrupted(STEPS)), values(params, optimizer))
    Path(f"{folder}/differences-{rank}").write_text("\n".join(differences))
    dist.destroy_process_group()


def run(target, folder: Path) -> list[int | None]:
    """Exit codes of the ranks; a rank that does not end in time is killed and gives None."""
    context = mp.get_context("spawn")
    processes = [context.Process(target=target, args=(r, str(folder))) for r in range(NUM_RANKS)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + JOIN_SECONDS
    codes = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
        process.kill()
        process.join()
    return codes


def test_a_killed_rank_ends_the_others_and_a_restart_goes_on(tmp_path):
    assert run(first_attempt, tmp_path) == [17, -signal.SIGKILL, 17]
    for rank in (0, 2):
        seconds = float((tmp_path / f"end-{rank}").read_text().split()[0])
        assert seconds < COLLECTIVE_SECONDS + 5
    assert run(second_attempt, tmp_path) == [0, 0, 0]
    for rank in range(NUM_RANKS):
        assert (tmp_path / f"differences-{rank}").read_text() == ""
