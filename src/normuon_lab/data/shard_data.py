"""Sequences from shards: every token of an epoch is predicted once, in a shuffled order.

Sequence i is tokens ``[i * T, (i + 1) * T]`` of all shards as one array: its last token is the
target of its last input and the first input of sequence i + 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchdata.stateful_dataloader import StatefulDataLoader

from normuon_lab.data.batches import BatchShare, LoadedBatch, TrainBatches, make_loader
from normuon_lab.data.order import EpochOrder
from normuon_lab.errors import InputError, require


class TokenArray(Protocol):
    """Tokens that are read in runs."""

    def __len__(self) -> int: ...

    def read(self, start: int, length: int) -> npt.NDArray[Any]:
        """``[length]`` tokens from `start`."""
        ...


class ArrayTokens:
    """A `TokenArray` in memory."""

    def __init__(self, tokens: npt.NDArray[np.int64]) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, length: int) -> npt.NDArray[np.int64]:
        """``[length]`` tokens from `start`."""
        return self._tokens[start : start + length]


class SequenceReader:
    """Sequences of an array of tokens.

    Args:
        tokens: the array.
        sequence_length: T, the tokens a sequence feeds to the model.
        vocab_size: tokens must be below it.
    """

    def __init__(self, tokens: TokenArray, *, sequence_length: int, vocab_size: int) -> None:
        self._tokens = tokens
        self._length = sequence_length
        self._vocab_size = vocab_size

    def __len__(self) -> int:
        return max(0, (len(self._tokens) - 1) // self._length)

    def read(self, sequences: list[int]) -> Tensor:
        """``[len(sequences), T + 1]``, int64.

        Raises:
            InputError: a shard vanished, was cut, or holds a token outside the vocabulary.
        """
        rows = np.stack([self._tokens.read(i * self._length, self._length + 1) for i in sequences])
        largest = int(rows.max())
        require(
            largest < self._vocab_size,
            f"the shards hold token {largest}, and the vocabulary has {self._vocab_size}: they "
            "were written with another tokenizer; name it, or its vocab_size",
        )
        return torch.from_numpy(rows.astype(np.int64))


class ShuffledSequences(torch.utils.data.Dataset[LoadedBatch]):
    """Sequences by their position in the endless global order: epoch after epoch, each shuffled."""

    def __init__(self, reader: SequenceReader, *, seed: int) -> None:
        self._reader = reader
        self._seed = seed
        self._order: tuple[int, EpochOrder] | None = None

    def __getitems__(self, positions: range) -> LoadedBatch:
        """A micro batch; the loader's batched form of ``__getitem__``."""
        epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), len(self._reader))
        sequences = np.empty_like(offsets)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            sequences[chosen] = self._epoch_order(int(epoch))(offsets[chosen])
        try:
            return LoadedBatch(self._reader.read(sequences.tolist()))
        except InputError as error:
            return LoadedBatch(None, str(error))

    def _epoch_order(self, epoch: int) -> EpochOrder:
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, EpochOrder(len(self._reader), seed=self._seed, epoch=epoch)
        return self._order[1]


class ShardBatches(TrainBatches):
    """Training batches from shards."""

    def __init__(
        self,
        reader: SequenceReader,
        share: BatchShare,
        *,
        seed: int,
        identity: dict[str, Any],
        workers: int,
        prefetch: int,
    ) -> None:
        super().__init__(share, identity)
        self._dataset = ShuffledSequences(reader, seed=seed)
        self._workers = workers
        self._prefetch = prefetch

    def _make_loader(self, first_sequence: int, source_state: Any) -> StatefulDataLoader[Any]:
        return make_loader(
            self._dataset,
            workers=self._workers,
            prefetch=self._prefetch,
            batch_sampler=_Positions(self.share, first_sequence),
            collate_fn=_as_it_is,
        )


class _Positions:
    """Positions of this rank's micro batches, step after step."""

    def __init__(self, share: BatchShare, first_sequence: int) -> None:
        self._share = share
        self._first_sequence = first_sequence

    def __iter__(self) -> Iterator[range]:
        first = self._first_sequence
        while True:
            for batch in self._share.micro_batches():
                yield range(first + batch.start, first + batch.stop)
            first += self._share.global_batch_size


def _as_it_is(batch: LoadedBatch) -> LoadedBatch:
    return batch
