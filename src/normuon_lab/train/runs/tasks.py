"""The tasks of runs: a text, or the table of a + b mod p.

A small model first learns the training pairs of the table by heart and much later, all at once, the
rule: it groks (arXiv 2201.02177).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from normuon_lab.train.runs.config import Experiment, ModularAddition
from normuon_lab.train.runs.corpus import Corpus, check_lengths, load_corpus

# The data is read and checked before anything slow starts, and importing torch takes seconds.
if TYPE_CHECKING:
    from torch import Tensor

# Distinct from the epochs' numbers, which with the seed decide the order of the batches.
_SPLIT_STREAM = (0, 1)
_EVAL_BATCH_SIZE = 512

Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ModularTable:
    """All pairs, split anew for every seed."""

    config: ModularAddition

    @property
    def digest(self) -> str:
        """SHA-256 of what decides the table."""
        return hashlib.sha256(json.dumps(self.config.to_json()).encode()).hexdigest()

    def split(self, seed: int) -> tuple[Pairs, Pairs]:
        """The pairs to train on and those held out, `[n, 2]` each, by the seed alone.

        Example:
            >>> train, held_out = ModularTable(ModularAddition(modulus=5)).split(seed=0)
            >>> train.shape, held_out.shape
            ((10, 2), (15, 2))
        """
        p = self.config.modulus
        order = np.random.default_rng((seed, *_SPLIT_STREAM)).permutation(p * p)
        pairs = np.stack(np.divmod(order, p), axis=1)
        num_train = self.config.num_train_pairs
        return pairs[:num_train], pairs[num_train:]

    def train_batches(
        self, experiment: Experiment, *, seed: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of training pairs, int64 `[batch, 3]`, by the seed, without end."""
        from normuon_lab.data.sequences import example_order

        pairs, _ = self.split(seed)
        order = example_order(len(pairs), batch_size=experiment.training.batch_size, seed=seed)
        return (_sequences(self.config, pairs[chosen]) for chosen in order)

    def held_out(self, experiment: Experiment, *, seed: int) -> list[tuple[Tensor, Tensor]]:
        """As many held-out pairs as `eval_tokens` has room for."""
        _, pairs = self.split(seed)
        pairs = pairs[: experiment.training.eval_tokens // self.config.sequence_length]
        return [
            _sequences(self.config, pairs[i : i + _EVAL_BATCH_SIZE])
            for i in range(0, len(pairs), _EVAL_BATCH_SIZE)
        ]

    def to_json(self) -> dict[str, Any]:
        """What results record of the task."""
        length, num_train = self.config.sequence_length, self.config.num_train_pairs
        return {
            "name": f"a + b mod {self.config.modulus}",
            "sha256": self.digest,
            "tokenizer": "numbers",
            "vocab_size": self.config.vocab_size,
            "train_tokens": length * num_train,
            "validation_tokens": length * (self.config.modulus**2 - num_train),
        }


def _sequences(config: ModularAddition, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """``a b =`` and, under the last sign, the answer."""
    import torch

    from normuon_lab.train.model import NO_TARGET

    p = config.modulus
    inputs = np.column_stack([pairs, np.full(len(pairs), p)])
    targets = np.full_like(inputs, NO_TARGET)
    targets[:, -1] = pairs.sum(axis=1) % p
    return torch.from_numpy(inputs), torch.from_numpy(targets)


Task = Corpus | ModularTable
"""The training and test data of a run, pickled for worker processes."""


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
