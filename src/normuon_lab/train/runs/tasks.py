"""What an experiment learns from: finds its data and checks that there is enough of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from normuon_lab.train.runs.config import Experiment, ModularAddition
from normuon_lab.train.runs.corpus import check_lengths, load_corpus
from normuon_lab.train.runs.modular import ModularTable

# As in corpus.py.
if TYPE_CHECKING:
    from torch import Tensor


class TrainBatches(Protocol):
    """What the steps of a run train on."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of batch `step`, counted from 0; both int64 `[batch, sequence]`."""


class Task(Protocol):
    """What a run learns and is tested on; a worker process gets it pickled."""

    @property
    def digest(self) -> str:
        """SHA-256 of the data."""

    def train_batches(self, experiment: Experiment, *, seed: int) -> TrainBatches:
        """What a run trains on; it depends on the seed alone, so that arms see the same."""

    def held_out(self, experiment: Experiment, *, seed: int) -> list[tuple[Tensor, Tensor]]:
        """The batches that every evaluation of a run reads, as many targets in every row."""

    def to_json(self) -> dict[str, Any]:
        """What results record of the data."""


def load_task(experiment: Experiment) -> Task:
    """The data of an experiment, long enough for its batches and evaluations.

    Raises:
        InputError: it cannot be read, or is too short.
    """
    if isinstance(experiment.data, ModularAddition):
        return ModularTable(experiment.data)
    corpus = load_corpus(
        experiment.data, tokenizer=experiment.tokenizer, vocab_size=experiment.model.vocab_size
    )
    check_lengths(corpus, experiment)
    return corpus
