"""Which examples a step trains on, and which windows of a text every evaluation reads.

The order depends on the seed and the step alone, so every arm sees the same batches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Tokens = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
"""A text, ``[num_tokens]``."""


class EpochOrder:
    """The numbers of each step's examples: a fresh permutation of all examples per epoch.

    None comes twice within an epoch. A batch may straddle two epochs.

    Args:
        num_examples: numbers are below it.
        batch_size: examples per step.
        seed: together with the step, all that the choice depends on.
    """

    def __init__(self, num_examples: int, *, batch_size: int, seed: int) -> None:
        self._num_examples = num_examples
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def examples(self, step: int) -> list[int]:
        """The numbers of the examples of batch `step`, counted from 0."""
        first = step * self._batch_size
        return [self._example_at(position) for position in range(first, first + self._batch_size)]

    def _example_at(self, position: int) -> int:
        epoch, offset = divmod(position, self._num_examples)
        if epoch != self._epoch:
            # A generator per epoch, so that any step can be asked for without those before it.
            generator = np.random.default_rng((self._seed, epoch))
            self._order = generator.permutation(self._num_examples)
            self._epoch = epoch
        return int(self._order[offset])


class BatchSampler:
    """Draws each step's windows of a text, which do not overlap, in the order of `EpochOrder`.

    Args:
        tokens: the training text, `[num_tokens]`.
        sequence_length: tokens a window feeds to the model.
        batch_size: windows per step.
        seed: together with the step, all that the choice depends on.
    """

    def __init__(self, tokens: Tokens, *, sequence_length: int, batch_size: int, seed: int) -> None:
        self._tokens = tokens
        self._sequence_length = sequence_length
        self.num_windows = (tokens.size - 1) // sequence_length
        self._order = EpochOrder(self.num_windows, batch_size=batch_size, seed=seed)

    def window_indices(self, step: int) -> list[int]:
        """The numbers of the windows of batch `step`, counted from 0."""
        return self._order.examples(step)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets of batch `step`, both int64 `[batch, sequence]`."""
        return _gather(self._tokens, self.window_indices(step), self._sequence_length)


def validation_batches(
    tokens: Tokens, *, sequence_length: int, eval_tokens: int, batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """The windows that every evaluation of every run reads, spread evenly over the text.

    Returns:
        Pairs of inputs and targets, int64 `[<= batch_size, sequence_length]`.
    """
    num_windows = (tokens.size - 1) // sequence_length
    num_read = eval_tokens // sequence_length
    chosen = [i * num_windows // num_read for i in range(num_read)]
    return [
        _gather(tokens, chosen[i : i + batch_size], sequence_length)
        for i in range(0, num_read, batch_size)
    ]


def _gather(tokens: Tokens, windows: list[int], length: int) -> tuple[Tensor, Tensor]:
    rows = np.stack([tokens[w * length : w * length + length + 1] for w in windows])
    batch = torch.from_numpy(rows.astype(np.int64))
    return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
