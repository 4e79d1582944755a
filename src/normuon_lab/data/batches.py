"""The batches of a training run: which sequences each rank gets, and where the run is.

A step's sequences are the same on any number of ranks, and a saved position says nothing of ranks.
Processes load ahead, and only the training process can end them: Ctrl-C and a scheduler's SIGTERM
reach every process of a job, and a loading process that obeyed would take away the batches of the
last steps before a checkpoint.
"""

from __future__ import annotations

import os
import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from typing import Any

import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from normuon_lab.errors import InputError, counted, require

# macOS does not say who sent a signal, and has no schedulers that preempt.
_KNOWS_SENDERS = hasattr(signal, "sigwaitinfo")


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start processes inside: they, and every thread of theirs, begin with SIGTERM held back.

    A library's thread that took the signal instead would end the process by it. What comes for this
    process meanwhile arrives afterwards.
    """
    if not _KNOWS_SENDERS:
        yield
        return
    # It would be started with the first process, and lets SIGTERM through again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent_only(worker: int) -> None:
    """Ignore SIGINT, and SIGTERM from all but the parent; a loader's ``worker_init_fn``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if _KNOWS_SENDERS:
        threading.Thread(target=_end_when_parent_asks, daemon=True).start()


def _end_when_parent_asks() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShare:
    """How a step's sequences are divided.

    Attributes:
        global_batch_size: sequences of a step, on all ranks together.
        micro_batch_size: sequences that a rank takes at once.
        rank: among the data-parallel ranks.
        world_size: number of data-parallel ranks.
    """

    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        require(self.global_batch_size >= 1, "the batch has no sequences; give at least 1")
        require(self.micro_batch_size >= 1, "the micro batch has no sequences; give at least 1")
        require(
            self.global_batch_size % (self.world_size * self.micro_batch_size) == 0,
            f"a batch of {counted(self.global_batch_size, 'sequence')} does not split over "
            f"{counted(self.world_size, 'data-parallel rank')} into micro batches of "
            f"{self.micro_batch_size}",
        )

    @property
    def sequences_per_rank(self) -> int:
        """Sequences of a step that this rank takes."""
        return self.global_batch_size // self.world_size

    @property
    def micro_batches_per_step(self) -> int:
        """Micro batches of a step that this rank takes."""
        return self.sequences_per_rank // self.micro_batch_size

    def micro_batches(self) -> Iterator[range]:
        """This rank's sequences of one step, as numbers within the step."""
        first = self.rank * self.sequences_per_rank
        for start in range(first, first + self.sequences_per_rank, self.micro_batch_size):
            yield range(start, start + self.micro_batch_size)


@dataclass(frozen=True, slots=True)
class LoadedBatch:
    """What a loading process sends.

    Attributes:
        tokens: ``[micro_batch, sequence + 1]``, int64; None with an error.
        error: why there are no tokens. It travels as a value, because an exception would arrive
            wrapped in the traceback of the process.
        source_state: where the source is after the last micro batch of a step, if it has to say.
    """

    tokens: Tensor | None
    error: str | None = None
    source_state: Any = None


class TrainBatches(ABC):
    """Micro batches of token numbers ``[micro_batch, sequence + 1]``, int64, without end.

    Input and target of a sequence are its first and its last ``sequence`` tokens. The sequences of
    step g are numbers ``[g * global_batch_size, (g + 1) * global_batch_size)`` of a global order;
    rank r takes the r-th of `world_size` equal, contiguous shares. Processes load ahead; the
    position is what has been taken, not what has been loaded.

    Args:
        share: how a step's sequences are divided.
        identity: what must be equal in a saved position, in plain values.
    """

    def __init__(self, share: BatchShare, identity: dict[str, Any]) -> None:
        self.share = share
        self._identity = identity
        self._sequences = 0
        self._source_state: Any = None
        self._taken_in_step = 0
        self._loaded: Iterator[LoadedBatch] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The next micro batch.

        Raises:
            InputError: the data cannot be read any more.
        """
        if self._loaded is None:
            loader = self._make_loader(self._sequences, self._source_state)
            with starting_processes():
                self._loaded = iter(loader)
        batch = next(self._loaded)
        if batch.tokens is None:
            raise InputError(str(batch.error))
        self._taken_in_step += 1
        if self._taken_in_step == self.share.micro_batches_per_step:
            self._taken_in_step = 0
            self._sequences += self.share.global_batch_size
            self._source_state = batch.source_state
        return batch.tokens

    @property
    def sequences(self) -> int:
        """Sequences taken by all ranks, whole steps only."""
        return self._sequences

    def state_dict(self) -> dict[str, Any]:
        """The position, in plain values, for any number of ranks.

        Raises:
            RuntimeError: in the middle of a step, where ranks differ.
        """
        if self._taken_in_step:
            raise RuntimeError(
                "the position of the data can be saved only between steps: "
                f"{self._taken_in_step} of "
                f"{self.share.micro_batches_per_step} micro batches of this one were taken"
            )
        return {
            "version": STATE_VERSION,
            **self._identity,
            "sequences": self._sequences,
            "source": self._source_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave on any number of ranks.

        Raises:
            InputError: it belongs to other data, another order or another sequence length.
        """
        for name, value in {"version": STATE_VERSION, **self._identity}.items():
            require(
                state.get(name) == value,
                f"the checkpoint's data is different: its {name} is {state.get(name)!r} and this "
                f"run's is {value!r}; resume with the original data and seed",
            )
        self.close()
        self._sequences = int(state["sequences"])
        self._taken_in_step = 0
        self._source_state = state["source"]

    def close(self) -> None:
        """End the loading processes. The next batch starts them again."""
        self._loaded = None

    @abstractmethod
    def _make_loader(self, first_sequence: int, source_state: Any) -> StatefulDataLoader[Any]:
        """A loader of `LoadedBatch`, from a step's first sequence on.

        Args:
            first_sequence: its number in the global order.
            source_state: what the last micro batch before it said of the source; None at the start.
        """


def make_loader(
    dataset: Any, *, workers: int, prefetch: int, start_method: str | None = None, **options: Any
) -> StatefulDataLoader[Any]:
    """torchdata's loader with the settings that all our data share.

    Args:
        dataset: gives `LoadedBatch`.
        workers: loading processes; 0 loads in this one.
        prefetch: batches that each process has ready.
        start_method: of the processes; None is the platform's.
        **options: passed on.
    """
    if workers:
        options |= {
            "prefetch_factor": prefetch,
            "worker_init_fn": obey_parent_only,
            "multiprocessing_context": start_method,
        }
    with warnings.catch_warnings():
        # torchdata 0.11 calls what torch 2.13 deprecates; nothing that we could call otherwise.
        warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
        return StatefulDataLoader(
            dataset,
            num_workers=workers,
            # Its own: the loader would draw from the global one, whose state a run restores.
            generator=torch.Generator().manual_seed(0),
            **options,
        )


class PretrainData(ABC):
    """Training and validation data of one run.

    Attributes:
        vocab_size: token numbers are below it.
    """

    vocab_size: int

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What a run records of its data, in plain values."""

    @abstractmethod
    def train_batches(
        self, *, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> TrainBatches:
        """This rank's share of the training batches, from the first.

        Args:
            global_batch_size: sequences of an optimizer step, on all ranks together.
            micro_batch_size: sequences of one tensor.
            rank: among the data-parallel ranks.
            world_size: number of data-parallel ranks.

        Raises:
            InputError: the sizes do not divide, or the data is too short for one batch.
        """

    @abstractmethod
    def validation_batches(
        self, *, tokens: int, batch_size: int, rank: int, world_size: int
    ) -> Iterable[Tensor]:
        """The sequences that every evaluation reads, ``[<= batch_size, sequence + 1]``, int64.

        The ranks' shares together are the same sequences on any number of ranks; a rank may have
        one sequence less than another, or none.

        Args:
            tokens: how many targets to read, in whole sequences, spread evenly over the data.
            batch_size: sequences of one tensor.
            rank: among the data-parallel ranks.
            world_size: number of data-parallel ranks.

        Raises:
            InputError: the validation data is shorter.
        """
