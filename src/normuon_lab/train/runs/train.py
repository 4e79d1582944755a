"""One training run: from an experiment, a run's specification and a task to a record.

Single-process and deterministic: the same inputs in the same environment give the same record,
bit for bit, but for its times. Which runs there are, and in which process, is `workers.py`'s
business.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from normuon_lab.machine import denormals_flushed
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.models import (
    build_model,
    hidden_matrix_kinds,
    next_token_loss,
    next_token_scores,
)
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.schedule import learning_rate_factor
from normuon_lab.train.runs.tasks import Task
from normuon_lab.train.runs.update_probe import UpdateProbe, choose_matrices

ProgressCallback = Callable[[int, float], None]


def train_run(
    spec: RunSpec,
    experiment: Experiment,
    task: Task,
    *,
    probe_updates: bool = False,
    on_step: ProgressCallback | None = None,
) -> RunRecord:
    """Train one model with one arm.

    Args:
        spec: arm, seed and peak learning rate.
        experiment: what the runs of a comparison share.
        task: its data, see `tasks.load_task`.
        probe_updates: also measure update matrices, which changes nothing else.
        on_step: called after every step with its number, from 1, and its training loss.

    Returns:
        The record. A run whose loss is no longer finite stops there, as does one that has reached
        the accuracy it was to reach.
    """
    started = time.perf_counter()
    run = _Run(spec, experiment, task, probe_updates=probe_updates)
    with _deterministic():
        run.evaluate(finished_steps=0)
        for step in range(run.steps):
            loss = run.train_step(step)
            if not math.isfinite(loss):
                break
            if on_step is not None:
                on_step(step + 1, loss)
            if step + 1 in run.eval_steps:
                run.evaluate(finished_steps=step + 1)
                if run.has_reached_accuracy:
                    break
    record = run.finish()
    record.total_seconds = round(time.perf_counter() - started, 3)
    return record


class _Run:
    """The moving parts of one run."""

    def __init__(
        self, spec: RunSpec, experiment: Experiment, task: Task, *, probe_updates: bool
    ) -> None:
        self._training = spec.training(experiment)
        self.steps = self._training.steps
        self.eval_steps = frozenset(self._training.eval_steps)
        model = build_model(experiment.model, seed=spec.seed)
        self._model = model.to(getattr(torch, experiment.weights))
        self._optimizers = ARMS[spec.arm].build(self._model, spec.learning_rate, spec.options)
        self._peaks = [[group["lr"] for group in o.param_groups] for o in self._optimizers]
        self._loss = torch.compile(next_token_loss) if experiment.compile else next_token_loss
        self._scores = torch.compile(next_token_scores) if experiment.compile else next_token_scores
        matrix_names = choose_matrices(
            self._model, hidden_matrix_kinds(experiment.model), experiment.model.num_layers
        )
        self._probe = UpdateProbe(
            self._model,
            self._optimizers,
            matrix_names=matrix_names if probe_updates else [],
            steps=self._training.steps,
        )
        self._batches = task.train_batches(experiment, seed=spec.seed)
        self._held_out = task.held_out(experiment, seed=spec.seed)
        self._record = RunRecord(
            arm=spec.arm,
            seed=spec.seed,
            learning_rate=spec.learning_rate,
            num_parameters=sum(parameter.numel() for parameter in self._model.parameters()),
            options=spec.options.to_json(),
            steps=self.steps,
        )

    def train_step(self, step: int) -> float:
        """Do step `step`, counted from 0, and return its training loss; no step if not finite."""
        started = time.perf_counter()
        loss = self._loss(self._model, *self._batches.batch(step))
        value = loss.item()
        self._record.train_losses.append(round(value, 6))
        if not math.isfinite(value):
            return value
        loss.backward()
        self._set_learning_rate(step)
        self._record.train_seconds += time.perf_counter() - started
        self._probe.before_step(step)
        started = time.perf_counter()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self._record.train_seconds += time.perf_counter() - started
        self._probe.after_step(step)
        return value

    def evaluate(self, *, finished_steps: int) -> None:
        """Take the validation loss and the accuracy: means over all that is held out."""
        total_loss, total_accuracy, num_rows = 0.0, 0.0, 0
        with torch.no_grad():
            for inputs, targets in self._held_out:
                loss, accuracy = self._scores(self._model, inputs, targets)
                total_loss += loss.item() * len(inputs)
                total_accuracy += accuracy.item() * len(inputs)
                num_rows += len(inputs)
        self._record.eval_steps.append(finished_steps)
        self._record.eval_losses.append(total_loss / num_rows)
        self._record.eval_accuracies.append(round(total_accuracy / num_rows, 6))
        self._record.eval_seconds.append(round(self._record.train_seconds, 4))

    @property
    def has_reached_accuracy(self) -> bool:
        """Whether the last evaluation was as good as the run was to become."""
        wanted = self._training.stop_at_accuracy
        return wanted is not None and self._record.eval_accuracies[-1] >= wanted

    def finish(self) -> RunRecord:
        """The record; where a loss stopped being a number, the curves end before it."""
        record = self._record
        losses = [*record.train_losses, *record.eval_losses]
        if all(map(math.isfinite, losses)):
            record.final_loss = record.eval_losses[-1]
        record.train_losses = [loss for loss in record.train_losses if math.isfinite(loss)]
        kept = [i for i, loss in enumerate(record.eval_losses) if math.isfinite(loss)]
        record.eval_steps = [record.eval_steps[i] for i in kept]
        record.eval_losses = [record.eval_losses[i] for i in kept]
        record.eval_seconds = [record.eval_seconds[i] for i in kept]
        record.eval_accuracies = [record.eval_accuracies[i] for i in kept]
        record.train_seconds = round(record.train_seconds, 4)
        record.updates = self._probe.measurements
        return record

    def _set_learning_rate(self, step: int) -> None:
        factor = learning_rate_factor(
            step,
            steps=self._training.steps,
            warmup_steps=self._training.warmup_steps,
            schedule=self._training.schedule,
        )
        for optimizer, peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor


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
