"""Which windows of the text a step trains on, and which every evaluation reads.

The order depends on the seed and the step alone, so every arm sees the same batches.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normuon_lab.runs.corpus import Tokens


class BatchSampler:
    """Draws each step's windows: a fresh permutation of all windows per epoch.

    Windows do not overlap, and none comes twice within an epoch. A batch may straddle two epochs.

    Args:
        tokens: the training text, `[num_tokens]`.
        sequence_length: tokens a window feeds to the model.
        batch_size: windows per step.
        seed: together with the step, all that the choice depends on.
    """

    def __init__(self, tokens: Tokens, *, sequence_length: int, batch_size: int, seed: int) -> None:
        self._tokens = tokens
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._seed = seed
        self.num_windows = (tokens.size - 1) // sequence_length
        self._epoch = -1
        self._order: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def window_indices(self, step: int) -> list[int]:
        """The numbers of the windows of batch `step`, counted from 0."""
        first = step * self._batch_size
        return [self._window_at(position) for position in range(first, first + self._batch_size)]

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets of batch `step`, both int64 `[batch, sequence]`."""
        return _gather(self._tokens, self.window_indices(step), self._sequence_length)

    def _window_at(self, position: int) -> int:
        epoch, offset = divmod(position, self.num_windows)
        if epoch != self._epoch:
            # A generator per epoch, so that any step can be asked for without those before it.
            generator = np.random.default_rng((self._seed, epoch))
            self._order = generator.permutation(self.num_windows)
            self._epoch = epoch
        return int(self._order[offset])


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
