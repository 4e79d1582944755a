"""What pretraining asks of its data, wherever its tokens come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from normuon_lab.data.batches import TrainBatches
from normuon_lab.data.sequences import SequenceReader
from normuon_lab.errors import require


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


class ValidationBatches:
    """The same sequences at every evaluation, read anew each time.

    Args:
        reader: the validation data.
        num_sequences: how many to read, spread evenly over the data.
        batch_size: sequences of one tensor.
        rank: among the data-parallel ranks.
        world_size: number of data-parallel ranks.
    """

    def __init__(
        self,
        reader: SequenceReader,
        *,
        num_sequences: int,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        require(num_sequences >= 1, "an evaluation reads less than one sequence; give more tokens")
        require(
            len(reader) >= num_sequences,
            f"the validation data has {len(reader)} sequences and an evaluation reads "
            f"{num_sequences}: give more data, a larger validation_fraction or fewer tokens",
        )
        chosen = [i * len(reader) // num_sequences for i in range(num_sequences)]
        bounds = [num_sequences * i // world_size for i in (rank, rank + 1)]
        self._reader = reader
        self._chosen = chosen[bounds[0] : bounds[1]]
        self._batch_size = batch_size

    def __iter__(self) -> Iterator[Tensor]:
        for start in range(0, len(self._chosen), self._batch_size):
            yield self._reader.read(self._chosen[start : start + self._batch_size])
