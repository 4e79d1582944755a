"""Batches and schedule: every window once an epoch, the same for every arm; warmup and decay."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest
import torch

from normuon_lab.data.sequences import example_order
from normuon_lab.errors import InputError
from normuon_lab.train.loop import learning_rate_factor
from normuon_lab.train.runs.config import Experiment, ModelConfig, TrainConfig
from normuon_lab.train.runs.corpus import Corpus, check_lengths

EXPERIMENT = Experiment(
    model=ModelConfig(sequence_length=10), training=TrainConfig(batch_size=4, eval_tokens=50)
)


def drawn(num_steps: int, *, seed: int = 0) -> list[list[int]]:
    """Batches of four of ten examples."""
    return list(islice(example_order(10, batch_size=4, seed=seed), num_steps))


def test_an_epoch_covers_every_window_exactly_once() -> None:
    windows = [window for batch in drawn(5) for window in batch]
    assert sorted(windows[:10]) == list(range(10))
    assert sorted(windows[10:]) == list(range(10))
    assert windows[:10] != windows[10:]


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    steps = drawn(6, seed=3)
    assert drawn(6, seed=3) == steps
    assert drawn(6, seed=4) != steps


def test_targets_are_the_next_tokens(make_corpus: Callable[..., Corpus]) -> None:
    """Of a text that counts up, of which ten windows fit."""
    inputs, targets = next(make_corpus(101).train_batches(EXPERIMENT, seed=0))
    assert inputs.shape == targets.shape == (4, 10)
    assert inputs.dtype == torch.int64
    # The text counts up, so that the next token is one more.
    assert torch.equal(targets, inputs + 1)
    assert set((inputs[:, 0] % 10).tolist()) == {0}


def test_validation_reads_the_asked_number_of_tokens_spread_over_the_text(
    make_corpus: Callable[..., Corpus],
) -> None:
    batches = make_corpus(101, 201).held_out(EXPERIMENT, seed=0)
    inputs = torch.cat([inputs for inputs, _ in batches])
    assert [len(inputs) for inputs, _ in batches] == [4, 1]
    assert inputs[:, 0].tolist() == [0, 40, 80, 120, 160]


@pytest.mark.parametrize(
    ("num_train", "num_validation", "missing"),
    [(41, 21, None), (40, 21, "training part"), (41, 20, "validation part")],
)
def test_a_text_must_fill_a_batch_and_an_evaluation(
    make_corpus: Callable[..., Corpus], num_train: int, num_validation: int, missing: str | None
) -> None:
    experiment = Experiment(
        model=ModelConfig(sequence_length=10),
        training=TrainConfig(batch_size=4, eval_tokens=20),
    )
    corpus = make_corpus(num_train, num_validation)
    if missing is None:
        check_lengths(corpus, experiment)
    else:
        with pytest.raises(InputError, match=missing):
            check_lengths(corpus, experiment)


def test_schedule_rises_and_falls_linearly_and_never_steps_by_zero() -> None:
    factors = [
        learning_rate_factor(t, steps=100, warmup_steps=5, decay_steps=95) for t in range(100)
    ]
    assert factors[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert np.allclose(np.diff(factors[5:]), -1 / 95, rtol=0, atol=1e-15)
    assert factors[-1] == pytest.approx(1 / 95)


def test_a_constant_schedule_stays_after_its_warmup() -> None:
    training = TrainConfig(steps=100, warmup_fraction=0.04, schedule="constant")
    assert training.decay_steps == 0
    factors = [
        learning_rate_factor(t, steps=100, warmup_steps=4, decay_steps=0) for t in range(100)
    ]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(factors[4:]) == {1.0}


def test_schedule_without_warmup_and_of_one_step() -> None:
    assert learning_rate_factor(0, steps=4, warmup_steps=0, decay_steps=4) == 1.0
    one = TrainConfig(steps=1)
    assert (one.warmup_steps, one.decay_steps) == (0, 1)
    assert learning_rate_factor(0, steps=1, warmup_steps=0, decay_steps=1) == 1.0


@pytest.mark.parametrize("steps", [1, 2, 7, 240])
def test_evaluations_include_start_and_end(steps: int) -> None:
    marks = TrainConfig(steps=steps, num_evals=20).eval_steps
    assert marks[0] == 0
    assert marks[-1] == steps
    assert list(marks) == sorted(set(marks))
