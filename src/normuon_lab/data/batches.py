"""The batches of a training run: each rank's sequences, and the position in the data.

A step's sequences are the same on any number of ranks, and a saved position does not depend on
ranks. Processes load ahead, and only the training process can end them: Ctrl-C and a scheduler's
SIGTERM reach every process of a job, and without a loading process the last steps before a
checkpoint would have no batches.
"""

from __future__ import annotations

import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from normuon_lab.data.config import DataConfig
from normuon_lab.data.sequences import SequenceReader, TokenArray, ValidationBatches
from normuon_lab.errors import InputError, counted, require

# macOS does not say who sent a signal, and has no schedulers that preempt.
_KNOWS_SENDERS = hasattr(signal, "sigwaitinfo")


@contextmanager
def starting_processes() -> Iterator[None]:
    """Processes that start inside, and all their threads, begin with SIGTERM blocked.

    Otherwise a library's thread that gets the signal would end the process. Signals to this process
    arrive afterwards.
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
        source_state: the source's position after the last micro batch of a step, if it has one.
    """

    tokens: Tensor | None
    error: str | None = None
    source_state: Any = None


@dataclass(eq=False)
class TrainBatches:
    """Micro batches of token numbers ``[micro_batch, sequence + 1]``, int64, without end.

    Input and target of a sequence are its first and its last ``sequence`` tokens. The sequences of
    step g are numbers ``[g * global_batch_size, (g + 1) * global_batch_size)`` of a global order;
    rank r takes the r-th of `world_size` equal, contiguous shares. Processes load ahead; the
    position is what has been taken, not what has been loaded.

    With several ranks `state_dict` of a stream is a collective of the default process group: each
    rank knows its own lanes.

    Attributes:
        share: how a step's sequences are divided.
        identity: plain values that must be equal in a saved position.
        micro_batches: loads this rank's, from a step's first sequence in the global order and the
            ``source_state`` of the micro batch before it; None at the start. Called in the loading
            processes, so it has to travel to them.
        workers: loading processes; 0 loads in this one.
        prefetch: batches that each process has ready.
        start_method: of the processes; None is the platform's.
    """

    share: BatchShare
    identity: dict[str, Any]
    micro_batches: Callable[[int, Any], Iterator[LoadedBatch]]
    workers: int
    prefetch: int
    start_method: str | None = None
    _sequences: int = field(default=0, init=False)
    _source_state: Any = field(default=None, init=False)
    _taken_in_step: int = field(default=0, init=False)
    _loaded: Iterator[LoadedBatch] | None = field(default=None, init=False)

    def __iter__(self) -> Iterator[Tensor]:
        return self

    def __next__(self) -> Tensor:
        """The next micro batch.

        Raises:
            InputError: the data cannot be read any more.
        """
        if self._loaded is None:
            loader = self._make_loader()
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

    def state_dict(self) -> dict[str, Any]:
        """The position, in plain values, for any number of ranks.

        Raises:
            RuntimeError: a step is not finished, so ranks differ.
        """
        if self._taken_in_step:
            raise RuntimeError(
                "the position of the data can be saved only between steps: "
                f"{self._taken_in_step} of "
                f"{self.share.micro_batches_per_step} micro batches of this one were taken"
            )
        source_state = self._source_state
        if self.share.world_size > 1 and source_state is not None:
            by_rank: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(by_rank, source_state)
            source_state = {lane: one for lanes in by_rank for lane, one in lanes.items()}
        return {
            "version": STATE_VERSION,
            **self.identity,
            "sequences": self._sequences,
            "source": source_state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position that `state_dict` gave on any number of ranks.

        Raises:
            InputError: it belongs to other data, another order or another sequence length.
        """
        for name, value in {"version": STATE_VERSION, **self.identity}.items():
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

    def _make_loader(self) -> DataLoader[LoadedBatch]:
        options: dict[str, Any] = {}
        if self.workers:
            options = {
                "prefetch_factor": self.prefetch,
                "worker_init_fn": obey_parent_only,
                "multiprocessing_context": self.start_method,
            }
        return DataLoader(
            _Loading(partial(self.micro_batches, self._sequences, self._source_state)),
            batch_size=None,
            num_workers=self.workers,
            # Its own: the loader would draw from the global one, whose state a run restores.
            generator=torch.Generator().manual_seed(0),
            **options,
        )


@dataclass(frozen=True, eq=False)
class _Loading(IterableDataset[LoadedBatch]):
    """Micro batches as a loader takes them; data that cannot be read is the last of them."""

    micro_batches: Callable[[], Iterator[LoadedBatch]]

    def __iter__(self) -> Iterator[LoadedBatch]:
        try:
            yield from self.micro_batches()
        except InputError as error:
            yield LoadedBatch(None, str(error))


class PretrainData(ABC):
    """Training and validation data of one run.

    Attributes:
        kind: "shards" or "stream".
        vocab_size: token numbers are below it.
        fingerprint: of all training data, also of parts that are not read.
        tokenizer_name: None for shards without a named one.
    """

    kind: str
    vocab_size: int
    fingerprint: str
    tokenizer_name: str | None

    def __init__(self, config: DataConfig, *, sequence_length: int, seed: int) -> None:
        self._config = config
        self._sequence_length = sequence_length
        self._seed = seed

    def describe(self) -> dict[str, Any]:
        """Plain values that a run records about its data."""
        return {
            "source": list(self._config.source),
            "kind": self.kind,
            "tokenizer": self.tokenizer_name,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "sequence_length": self._sequence_length,
        }

    @abstractmethod
    def _batches(self, share: BatchShare) -> TrainBatches:
        """The training batches of a share."""

    @abstractmethod
    def _validation_tokens(self, num_tokens: int) -> TokenArray:
        """Validation data of at least this many tokens."""

    def _identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "sequence_length": self._sequence_length,
            "seed": self._seed,
        }

    def _reader(self, tokens: TokenArray) -> SequenceReader:
        return SequenceReader(
            tokens, sequence_length=self._sequence_length, vocab_size=self.vocab_size
        )

    def train_batches(
        self, *, global_batch_size: int, micro_batch_size: int, rank: int, world_size: int
    ) -> TrainBatches:
        """This rank's share of the training batches, from the first; see `BatchShare`.

        Raises:
            InputError: the sizes do not divide, or the data is too short for one batch.
        """
        return self._batches(
            BatchShare(
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                rank=rank,
                world_size=world_size,
            )
        )

    def validation_batches(
        self, *, tokens: int, batch_size: int, rank: int, world_size: int
    ) -> Iterable[Tensor]:
        """The sequences that every evaluation reads, ``[<= batch_size, sequence + 1]``, int64.

        The ranks' shares together are the same sequences on any number of ranks; a rank may have
        one sequence less than another, or none.

        Raises:
            InputError: the validation data is shorter.
        """
        num_sequences = tokens // self._sequence_length
        return ValidationBatches(
            self._reader(self._validation_tokens(num_sequences * self._sequence_length + 1)),
            num_sequences=num_sequences,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
        )
