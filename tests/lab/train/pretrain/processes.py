"""Real processes that run the `normuon` command, alone or as ranks, and can be killed.

They are forked from one server that has imported torch already, since importing takes longer than
the small runs of these tests.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.distributed.ranks import free_port

_SECONDS = 120
# The server inherits it: no test may wait for the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "normuon_lab.cli",
        "normuon_lab.train.pretrain.training",
        "torch.utils.tensorboard",
        "transformers.models.gpt2.modeling_gpt2",
        "transformers.models.llama.modeling_llama",
    ]
)


@dataclass(frozen=True)
class Outcome:
    """How a command ended on every rank.

    Attributes:
        codes: exit codes; negative for signals.
        stdout: of rank 0.
        stderr: of each rank.
    """

    codes: tuple[int, ...]
    stdout: str
    stderr: tuple[str, ...]

    def check(self) -> Outcome:
        """Fail with what was said unless all went well."""
        assert set(self.codes) == {0}, f"exit codes {self.codes}: {self.stderr[-1][-3000:]}"
        return self


class Job:
    """A command that is running on some ranks.

    Args:
        words: of the command.
        folder: for what the ranks print.
        world_size: number of ranks; 1 is a process that knows of no others.
        file_bytes: no file may grow beyond it, as on a disk that fills up.
    """

    def __init__(
        self,
        words: Sequence[object],
        folder: Path,
        *,
        world_size: int = 1,
        file_bytes: int | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._outputs = [(folder / f"{r}.out", folder / f"{r}.err") for r in range(world_size)]
        port = free_port() if world_size > 1 else None
        self._processes: list[BaseProcess] = []
        for rank in range(world_size):
            arguments = ([str(word) for word in words], self._outputs[rank], rank, world_size, port)
            process = _CONTEXT.Process(target=_run, args=(*arguments, file_bytes), daemon=True)
            process.start()
            self._processes.append(process)

    def is_alive(self) -> bool:
        """Whether every rank is running."""
        return all(process.is_alive() for process in self._processes)

    def send(self, number: signal.Signals, *, ranks: Sequence[int]) -> None:
        """Send a signal to some ranks."""
        for rank in ranks:
            pid = self._processes[rank].pid
            assert pid is not None
            os.kill(pid, number)

    def kill(self) -> None:
        """Kill -9 every rank, and wait until all are gone."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def wait(self, seconds: float = _SECONDS, *, grace: float = 1.0) -> Outcome:
        """Wait for the end. When one rank fails the others are ended, as torchrun does.

        Args:
            seconds: after which all are ended.
            grace: seconds that the others have when one has failed.
        """
        deadline = time.monotonic() + seconds
        while any(process.is_alive() for process in self._processes):
            failed = any(process.exitcode not in (None, 0) for process in self._processes)
            if failed or time.monotonic() > deadline:
                for process in self._processes:
                    process.join(grace)
                    process.kill()
            time.sleep(0.02)
        for process in self._processes:
            process.join()
        return Outcome(
            tuple(process.exitcode or 0 for process in self._processes),
            self._outputs[0][0].read_text(),
            tuple(err.read_text() for _, err in self._outputs),
        )


def _run(
    words: list[str],
    outputs: tuple[Path, Path],
    rank: int,
    world_size: int,
    port: int | None,
    file_bytes: int | None,
) -> None:
    """A process' life: become a rank, and the command."""
    import torch

    from normuon_lab.cli import main

    for path, descriptor in zip(outputs, (1, 2), strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    torch.set_num_threads(1)
    if port is not None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if file_bytes is not None:
        import resource

        # Writing beyond the limit is an error instead of a signal that ends the process.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    code = main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
