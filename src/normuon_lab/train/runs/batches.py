"""Which examples each step of a run trains on.

The order depends on the seed and the step alone, so every arm sees the same batches.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

# The data is read and checked before anything slow starts, and importing torch takes seconds.
if TYPE_CHECKING:
    from torch import Tensor

    from normuon_lab.data.sequences import SequenceReader


class ExampleOrder:
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


class TextBatches:
    """Draws each step's sequences of a text in the order of `ExampleOrder`.

    Args:
        reader: the training text.
        batch_size: sequences per step.
        seed: together with the step, all that the choice depends on.
    """

    def __init__(self, reader: SequenceReader, *, batch_size: int, seed: int) -> None:
        self._reader = reader
        self.order = ExampleOrder(len(reader), batch_size=batch_size, seed=seed)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and next-token targets of batch `step`, both int64 `[batch, sequence]`."""
        from normuon_lab.data.sequences import inputs_and_targets

        return inputs_and_targets(self._reader.read(self.order.examples(step)))
