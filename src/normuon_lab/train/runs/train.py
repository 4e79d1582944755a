"""One training run: from an experiment, a run's specification and a task to a record.

Single-process and deterministic: the same inputs in the same environment give the same record,
bit for bit, but for its times.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from normuon_lab.machine import denormals_flushed
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.train.loop import FinishedStep, TrainingLoop, evaluate, learning_rate_factor
from normuon_lab.train.model import (
    build_model,
    next_token_loss,
    next_token_scores,
    num_parameters,
)
from normuon_lab.train.ranks import Ranks
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import Task
from normuon_lab.train.runs.update_probe import UpdateProbe


class _DivergedError(Exception):
    """The loss is not finite."""


def train_run(
    spec: RunSpec,
    experiment: Experiment,
    task: Task,
    *,
    probe_updates: bool = False,
    on_step: Callable[[int, float], object] = lambda step, loss: None,
) -> RunRecord:
    """Train one model with one arm.

    A run stops early when its loss is not finite or when it reaches its target accuracy.

    Args:
        spec: arm, seed and hyperparameters.
        experiment: what the runs of a comparison share.
        task: the experiment's data.
        probe_updates: also measure update matrices, which changes nothing else.
        on_step: called after every step with its number, from 1, and its training loss.
    """
    started = time.perf_counter()
    run = _Run(spec, experiment, task, probe_updates=probe_updates, on_step=on_step)
    with _deterministic():
        record = run.train()
    record.total_seconds = round(time.perf_counter() - started, 3)
    return record


class _Run:
    """The moving parts of one run."""

    def __init__(
        self,
        spec: RunSpec,
        experiment: Experiment,
        task: Task,
        *,
        probe_updates: bool,
        on_step: Callable[[int, float], object],
    ) -> None:
        training = self._training = spec.training(experiment)
        model = build_model(experiment.model.to_transformers(), seed=spec.seed)
        self._model = model.to(getattr(torch, experiment.weights))
        self._wrapped_loss, self._scores = next_token_loss, next_token_scores
        if experiment.compile:
            self._wrapped_loss = torch.compile(next_token_loss)
            self._scores = torch.compile(next_token_scores)
        self._sequence_length = experiment.model.sequence_length
        self._held_out = task.held_out(experiment, seed=spec.seed)
        self._on_step = on_step
        optimizers = ARMS[spec.arm].build(self._model, spec.learning_rate, spec.options)
        self._probe = (
            UpdateProbe(self._model, optimizers, steps=training.steps) if probe_updates else None
        )
        self._diverged = False
        self._record = RunRecord(
            arm=spec.arm,
            seed=spec.seed,
            learning_rate=spec.learning_rate,
            num_parameters=num_parameters(self._model),
            options=spec.options.to_json(),
            steps=training.steps,
        )
        self._loop = TrainingLoop(
            model=self._model,
            optimizers=optimizers,
            batches=task.train_batches(experiment, seed=spec.seed),
            loss=self._loss,
            factor=partial(
                learning_rate_factor,
                steps=training.steps,
                warmup_steps=training.warmup_steps,
                decay_steps=training.decay_steps,
            ),
            probe=self._probe,
        )

    def train(self) -> RunRecord:
        """Train until the last step, the target accuracy, or a loss that is not finite."""
        self._evaluate(0)
        try:
            self._loop.run(
                self._training.steps,
                after_step=self._after_step,
                should_stop=self._has_reached_accuracy,
            )
        except _DivergedError:
            self._diverged = True
        record = self._record
        if not self._diverged:
            record.final_loss = record.eval_losses[-1]
        record.train_seconds = round(record.train_seconds + self._loop.clock.take().seconds, 4)
        record.updates = self._probe.measurements if self._probe is not None else []
        return record

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        loss: Tensor = self._wrapped_loss(model, inputs, targets)
        value = loss.item()
        if not math.isfinite(value):
            # Before the optimizers see it: some refuse gradients that are not finite.
            raise _DivergedError
        self._record.train_losses.append(round(value, 6))
        return loss

    def _after_step(self, step: FinishedStep) -> None:
        self._on_step(step.number, step.loss.item())
        if step.number in self._training.eval_steps:
            self._evaluate(step.number)

    def _evaluate(self, finished_steps: int) -> None:
        """Take the validation loss and the accuracy: means over all that is held out."""
        record = self._record
        loss, accuracy = evaluate(
            self._model,
            self._held_out,
            self._scores,
            ranks=Ranks(),
            sequence_length=self._sequence_length,
        )
        record.train_seconds += self._loop.clock.take().seconds
        if not math.isfinite(loss):
            self._diverged = True
            return
        record.eval_steps.append(finished_steps)
        record.eval_losses.append(loss)
        record.eval_accuracies.append(round(accuracy, 6))
        record.eval_seconds.append(round(record.train_seconds, 4))

    def _has_reached_accuracy(self) -> bool:
        wanted, reached = self._training.stop_at_accuracy, self._record.eval_accuracies
        return wanted is not None and bool(reached) and reached[-1] >= wanted


@contextmanager
def _deterministic() -> Iterator[None]:
    """Deterministic kernels, and no denormal numbers; undone at the end."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with denormals_flushed():
            yield
    finally:
        torch.use_deterministic_algorithms(before)
