"""Addition mod p: pairs split by seed, the loss on answers alone, runs that end when they grok."""

from __future__ import annotations

import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn import functional

from normuon_lab.errors import InputError
from normuon_lab.study.evidence.protocol import cell_of
from normuon_lab.train.model import build_model, next_token_loss, next_token_scores
from normuon_lab.train.runs.config import (
    Experiment,
    ModelConfig,
    ModularAddition,
    RunSpec,
    TrainConfig,
)
from normuon_lab.train.runs.corpus import Corpus
from normuon_lab.train.runs.records import RunRecord, objective
from normuon_lab.train.runs.tasks import ModularTable, load_task
from normuon_lab.train.runs.train import train_run
from normuon_lab.train.runs.workers import Finished, Job, run_jobs

P = 7
NUM_TRAIN = 39  # 0.8 of 49 pairs

EXPERIMENT = Experiment(
    data=ModularAddition(modulus=P, train_share=0.8),
    model=ModelConfig(
        num_layers=1, width=32, num_heads=2, mlp_width=64, sequence_length=3, vocab_size=P + 1
    ),
    training=TrainConfig(
        steps=240, batch_size=20, num_evals=24, eval_tokens=3 * P * P, schedule="constant"
    ),
)
TASK = ModularTable(ModularAddition(modulus=P, train_share=0.8))
SPEC = RunSpec(arm="adamw", seed=0, learning_rate=0.01)


def with_training(**changes: object) -> Experiment:
    training = dataclasses.replace(EXPERIMENT.training, **changes)  # type: ignore[arg-type]
    return dataclasses.replace(EXPERIMENT, training=training)


def pairs(inputs: torch.Tensor) -> list[tuple[int, int]]:
    return [(a, b) for a, b, _ in inputs.tolist()]


@pytest.fixture(scope="module")
def full_run() -> RunRecord:
    """A run that goes to its end."""
    return train_run(SPEC, EXPERIMENT, TASK)


def test_every_pair_is_on_one_side_and_the_seed_says_on_which() -> None:
    train, held_out = TASK.split(3)
    assert len(train) == NUM_TRAIN
    both = [tuple(pair) for pair in [*train.tolist(), *held_out.tolist()]]
    assert sorted(both) == [(a, b) for a in range(P) for b in range(P)]
    assert np.array_equal(train, TASK.split(3)[0])
    assert not np.array_equal(train, TASK.split(4)[0])


def test_a_run_trains_on_every_training_pair_once_an_epoch_and_on_no_other() -> None:
    one_each = with_training(batch_size=13)  # three batches are an epoch
    batches, again = (
        [inputs for inputs, _ in islice(TASK.train_batches(one_each, seed=3), 6)] for _ in range(2)
    )
    drawn = [pair for inputs in batches[:3] for pair in pairs(inputs)]
    assert sorted(drawn) == sorted(map(tuple, TASK.split(3)[0].tolist()))
    assert torch.equal(again[5], batches[5])
    assert not torch.equal(batches[3], batches[0])


def test_evaluations_read_all_held_out_pairs_or_as_many_as_are_asked_for() -> None:
    held_out = [pair for inputs, _ in TASK.held_out(EXPERIMENT, seed=3) for pair in pairs(inputs)]
    assert held_out == list(map(tuple, TASK.split(3)[1].tolist()))
    few = TASK.held_out(with_training(eval_tokens=13), seed=3)
    assert [pair for inputs, _ in few for pair in pairs(inputs)] == held_out[:4]


def test_the_answer_is_the_only_target() -> None:
    inputs, targets = next(TASK.train_batches(EXPERIMENT, seed=0))
    assert inputs.shape == targets.shape == (20, 3)
    assert set(inputs[:, 2].tolist()) == {P}
    assert torch.equal(targets[:, 2], (inputs[:, 0] + inputs[:, 1]) % P)
    assert set(targets[:, :2].flatten().tolist()) == {-100}


def test_loss_and_accuracy_are_of_the_answers_alone() -> None:
    model = build_model(EXPERIMENT.model.to_transformers(), seed=0)
    inputs, targets = next(TASK.train_batches(EXPERIMENT, seed=0))
    with torch.no_grad():
        answers = model(input_ids=inputs).logits[:, -1]
        loss, accuracy = next_token_scores(model, inputs, targets)
        assert next_token_loss(model, inputs, targets) == loss
    # The same float32 numbers, summed in another order: a few units in the last place of about 2.
    torch.testing.assert_close(
        loss, functional.cross_entropy(answers, targets[:, -1]), atol=2e-6, rtol=0
    )
    assert accuracy == (answers.argmax(dim=-1) == targets[:, -1]).float().mean()


def test_a_run_learns_what_it_was_not_shown(full_run: RunRecord) -> None:
    assert len(full_run.train_losses) == 240
    assert len(full_run.eval_accuracies) == len(full_run.eval_steps) == 25
    assert full_run.eval_accuracies[0] < 0.5
    assert full_run.eval_accuracies[-1] >= 0.5


def test_a_run_stops_at_the_first_evaluation_that_is_good_enough(full_run: RunRecord) -> None:
    accuracies = full_run.eval_accuracies
    wanted = max(accuracies)
    first = accuracies.index(wanted)
    assert 0 < first < 24
    training = with_training(stop_at_accuracy=wanted)
    stopped = train_run(SPEC, training, TASK)
    assert stopped.eval_accuracies == accuracies[: first + 1]
    assert stopped.eval_losses == full_run.eval_losses[: first + 1]
    assert len(stopped.train_losses) == stopped.eval_steps[-1] == full_run.eval_steps[first]
    assert stopped.final_loss == stopped.eval_losses[-1]
    assert stopped.steps == 240
    reached = objective(stopped, training.training)
    assert reached is not None
    assert full_run.eval_steps[first - 1] < reached <= full_run.eval_steps[first]


def test_a_worker_does_the_same_run(full_run: RunRecord) -> None:
    events = list(run_jobs([Job(SPEC)], EXPERIMENT, load_task(EXPERIMENT), num_workers=1))
    records = [event.record for event in events if isinstance(event, Finished)]
    assert [record.eval_losses for record in records] == [full_run.eval_losses]
    assert [record.eval_accuracies for record in records] == [full_run.eval_accuracies]


def test_what_is_minimised_is_the_steps_to_the_accuracy() -> None:
    record = RunRecord(arm="muon", seed=0, learning_rate=1.0, num_parameters=1, steps=30)
    record.eval_steps, record.eval_accuracies = [0, 10, 20, 30], [0.1, 0.5, 0.9, 0.7]
    record.final_loss = 2.5
    assert objective(record, TrainConfig(steps=30)) == 2.5
    # Three quarters of the way from 0.5 to 0.9.
    assert objective(record, TrainConfig(steps=30, stop_at_accuracy=0.8)) == pytest.approx(17.5)
    assert objective(record, TrainConfig(steps=30, stop_at_accuracy=0.05)) == 0.0
    assert objective(record, TrainConfig(steps=30, stop_at_accuracy=0.99)) == 45.0
    record.final_loss = None
    assert objective(record, TrainConfig(steps=30)) is None
    assert objective(record, TrainConfig(steps=30, stop_at_accuracy=0.99)) == 45.0


def test_a_text_has_its_accuracy_taken_too(corpus: Corpus, experiment: Experiment) -> None:
    record = train_run(SPEC, experiment, corpus)
    assert len(record.eval_accuracies) == len(record.eval_losses)
    assert record.eval_accuracies[0] < 0.1 < record.eval_accuracies[-1] < 1.0


def test_what_decides_the_numbers_is_stored_and_text_is_stored_as_before(
    experiment: Experiment,
) -> None:
    stored = EXPERIMENT.to_json()
    assert stored["data"] == {"task": "modular-addition", "modulus": P, "train_share": 0.8}
    assert stored["training"]["schedule"] == "constant"
    fields_before = {"steps", "batch_size", "warmup_fraction", "num_evals", "eval_tokens"}
    assert set(experiment.to_json()["training"]) == fields_before
    described = TASK.to_json()
    assert described["train_tokens"] == 3 * NUM_TRAIN
    other = ModularTable(ModularAddition(modulus=P, train_share=0.7))
    assert other.digest != described["sha256"] == load_task(EXPERIMENT).digest


def test_the_cell_of_the_evidence_has_a_task_and_an_accuracy_to_reach() -> None:
    experiment = cell_of("modular-addition").experiment
    task = load_task(experiment)
    assert isinstance(task, ModularTable)
    num_read = sum(len(inputs) for inputs, _ in task.held_out(experiment, seed=0))
    assert num_read == 2000 < 97**2 - task.config.num_train_pairs
    assert experiment.training.stop_at_accuracy == 0.99


def test_an_impossible_task_is_refused() -> None:
    with pytest.raises(InputError, match="vocab_size 8 and sequence_length 3, not of 256 and 128"):
        Experiment(data=ModularAddition(modulus=P))
    with pytest.raises(InputError, match=r"train_share 1\.0 leaves no pair on one side"):
        ModularAddition(train_share=1.0)
    with pytest.raises(InputError, match="unknown schedule 'cosine'"):
        TrainConfig(schedule="cosine")
    with pytest.raises(InputError, match="stop_at_accuracy must be in"):
        TrainConfig(stop_at_accuracy=1.5)
