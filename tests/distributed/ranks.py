"""Real processes that form Gloo groups: reused for a while, never waited for forever.

A case is a top-level function ``case(rank, world_size, **kwargs)``; it runs on every rank inside a
fresh process group, and what it returns (picklable) comes back by rank.
"""

from __future__ import annotations

import importlib
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.multiprocessing as mp

CASE_SECONDS = 240
"""After this long a case has hung: its ranks are ended and the test fails with a message."""

CASES_PER_PROCESS = 12
"""torch's caches keep the process groups of earlier cases alive, and every one of them wakes some
threads a hundred times a second: after hundreds of cases that is all that a machine does."""

PRELOADED = [
    *("torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp"),
    *("torch.distributed.checkpoint.state_dict", "normuon.step.sharded"),
]
"""What a new process need not import: it is forked from one that has."""

COLLECTIVE_SECONDS = 90
"""Gloo's own timeout; shorter than a case's, so that a lone rank says what it waited for."""

SECONDS_AFTER_A_FAILURE = 20
"""The others may fail too and say why; most of them wait for the one that failed."""


def _serve(rank: int, pipe: Connection) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    while True:
        order = pipe.recv()
        if order is None:
            return
        module, name, world_size, store_path, kwargs = order
        try:
            store = dist.FileStore(store_path, world_size)
            dist.init_process_group(
                "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=COLLECTIVE_SECONDS),
            )
            case = getattr(importlib.import_module(module), name)
            torch.manual_seed(0)
            pipe.send((True, case(rank, world_size, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
        finally:
            pipe.recv()  # Nobody leaves the group while another may still be joining it.
            if dist.is_initialized():
                dist.destroy_process_group()


class Ranks:
    """A pool of processes; `run` uses as many of them as a case needs."""

    def __init__(self) -> None:
        self._context = mp.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._workers: list[tuple[Any, Connection]] = []
        self._num_cases = 0

    def _ensure(self, world_size: int) -> None:
        while len(self._workers) < world_size:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(len(self._workers), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def run(self, case: Callable[..., Any], world_size: int, **kwargs: Any) -> list[Any]:
        """Runs a case on ``world_size`` ranks and returns what each of them returned.

        Raises:
            AssertionError: a rank raised, died, or did not answer in time; shows every rank's end.
        """
        self._num_cases += 1
        if self._num_cases % CASES_PER_PROCESS == 0:
            self.close()
        self._ensure(world_size)
        with tempfile.TemporaryDirectory() as folder:
            order = (case.__module__, case.__name__, world_size, f"{folder}/store", kwargs)
            for _, pipe in self._workers[:world_size]:
                pipe.send(order)
            answers = self._answers(world_size)
        failed = {rank: text for rank, (good, text) in enumerate(answers) if not good}
        if failed:
            self.close()  # What a failed rank leaves behind is no start for the next case.
            lines = "\n".join(f"--- rank {rank}:\n{text}" for rank, text in failed.items())
            raise AssertionError(f"{case.__name__} on {world_size} ranks failed\n{lines}")
        for _, pipe in self._workers[:world_size]:
            pipe.send(None)
        return [value for _, value in answers]

    def _answers(self, world_size: int) -> list[tuple[bool, Any]]:
        """What every rank answered; after a failure the others have a little time left."""
        waiting = {self._workers[rank][1]: rank for rank in range(world_size)}
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + CASE_SECONDS
        while waiting and (left := deadline - time.monotonic()) > 0:
            for pipe in wait(list(waiting), timeout=left):
                assert isinstance(pipe, Connection)
                rank = waiting.pop(pipe)
                answers[rank] = self._answer(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + SECONDS_AFTER_A_FAILURE)
        has_failed = any(not good for good, _ in answers.values())
        reason = (
            "was ended: another rank had failed"
            if has_failed
            else f"no answer within {CASE_SECONDS} s: it hangs"
        )
        return [answers.get(rank, (False, reason)) for rank in range(world_size)]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        """What a rank sent; the end of its pipe is that of a process that died."""
        process, pipe = self._workers[rank]
        try:
            answer: tuple[bool, Any] = pipe.recv()
        except EOFError:
            process.join(5)
            return False, f"died with exit code {process.exitcode}"
        return answer

    def close(self) -> None:
        """Ends every process of the pool."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers = []


def free_port() -> int:
    """A port of the loopback address that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
