"""Sequences of an array of tokens: every token is predicted once.

Sequence i is tokens ``[i * T, (i + 1) * T]`` of the array: its last token is the target of its last
input and the first input of sequence i + 1.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normuon_lab.errors import require


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
