"""Sequences of an array of tokens, and the orders in which they are read.

Sequence i is tokens ``[i * T, (i + 1) * T]`` of the array: its last token is the target of its last
input and the first input of sequence i + 1. Every token is predicted once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, count, islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normuon_lab.data.shards import TokenShards
from normuon_lab.errors import counted, require

_ROUNDS = 6


class EpochOrder:
    """The order of one epoch, a permutation of ``range(num_sequences)``.

    Args:
        num_sequences: sequences in the epoch, at least 1.
        seed: of the run.
        epoch: counted from 0.

    Example:
        >>> order = EpochOrder(5, seed=0, epoch=0)
        >>> sorted(order(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]
    """

    def __init__(self, num_sequences: int, *, seed: int, epoch: int) -> None:
        assert num_sequences >= 1
        self._num_sequences = num_sequences
        # Both halves are equally wide, so the network permutes at most 4 times as many numbers.
        self._half_bits = np.uint64(max(1, ((num_sequences - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = hashlib.shake_128(f"{seed},{epoch}".encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The sequences at these positions of the epoch."""
        values = self._permute(positions.astype(np.uint64))
        # Numbers beyond the end walk on along their cycle until they come back inside it.
        while True:
            outside = values >= np.uint64(self._num_sequences)
            if not outside.any():
                return values.astype(np.int64)
            values[outside] = self._permute(values[outside])

    def _permute(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right + key) & self._mask)
        return (left << self._half_bits) | right


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014): every input bit reaches every other."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def example_order(num_examples: int, *, batch_size: int, seed: int) -> Iterator[list[int]]:
    """The numbers of each step's examples: a fresh permutation of all examples per epoch.

    None comes twice within an epoch. A batch may straddle two epochs. The order depends on the seed
    alone, so every optimizer of a comparison sees the same batches.
    """
    epochs = (np.random.default_rng((seed, epoch)).permutation(num_examples) for epoch in count())
    numbers = chain.from_iterable(epoch.tolist() for epoch in epochs)
    while True:
        yield list(islice(numbers, batch_size))


def inputs_and_targets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the model reads of ``[batch, T + 1]`` tokens and what it predicts, ``[batch, T]``."""
    return tokens[:, :-1], tokens[:, 1:]


TokenArray = npt.NDArray[Any] | TokenShards
"""Tokens in memory, or in files; slices of either are arrays."""


@dataclass(frozen=True, slots=True)
class SequenceReader:
    """Sequences of an array of tokens."""

    tokens: TokenArray
    sequence_length: int = field(kw_only=True)
    vocab_size: int = field(kw_only=True)

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.sequence_length)

    def read(self, sequences: list[int]) -> Tensor:
        """``[len(sequences), T + 1]``, int64.

        Raises:
            InputError: a shard vanished, was cut, or holds a token outside the vocabulary.
        """
        length = self.sequence_length
        rows = np.stack([self.tokens[i * length : (i + 1) * length + 1] for i in sequences])
        largest = int(rows.max())
        require(
            largest < self.vocab_size,
            f"the shards hold token {largest}, and the vocabulary has {self.vocab_size}: they "
            "were written with another tokenizer; name it, or its vocab_size",
        )
        return torch.from_numpy(rows.astype(np.int64))


class ValidationBatches:
    """The same sequences at every evaluation, read anew each time."""

    def __init__(
        self,
        reader: SequenceReader,
        *,
        num_sequences: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        require(
            num_sequences >= 1,
            "an evaluation reads less than one sequence; give more --eval-tokens",
        )
        require(
            len(reader) >= num_sequences,
            f"the validation data has {counted(len(reader), 'sequence')}, but an evaluation reads "
            f"{num_sequences}: give more data, a larger "
            "--data.validation-fraction or fewer --eval-tokens",
        )
        chosen = [i * len(reader) // num_sequences for i in range(num_sequences)]
        bounds = [num_sequences * i // world_size for i in (rank, rank + 1)]
        self._reader = reader
        self._chosen = chosen[bounds[0] : bounds[1]]
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._chosen), self._batch_size):
            yield self._reader.read(self._chosen[start : start + self._batch_size])
