"""The training loop: steps, evaluations, checkpoints and metrics of one run on one rank."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.data.batches import TrainBatches
from normuon_lab.errors import RunsFailedError
from normuon_lab.train.pretrain.checkpoint_tensors import tensors_to_save
from normuon_lab.train.pretrain.checkpoint_writer import CheckpointWriter, RunPosition
from normuon_lab.train.pretrain.clipping import clip_gradients_, has_nonfinite
from normuon_lab.train.pretrain.config import PretrainConfig
from normuon_lab.train.pretrain.evaluation import validation_loss
from normuon_lab.train.pretrain.metrics import MetricsLog, RunDisplay
from normuon_lab.train.pretrain.model import next_token_loss
from normuon_lab.train.pretrain.parallel import autocast, reduce_only_after_last_
from normuon_lab.train.pretrain.schedule import scheduled_factor
from normuon_lab.train.pretrain.stopping import StopRequest
from normuon_lab.train.pretrain.throughput import StepClock, memory_bytes
from normuon_lab.train.ranks import Ranks

if TYPE_CHECKING:
    from normuon_lab.train.pretrain.diagnostics import MatrixDiagnostics


@dataclass(slots=True, kw_only=True)
class Training:
    """All that a run consists of, built and restored.

    Attributes:
        config: resolved.
        ranks: who trains.
        model: spread over the ranks.
        optimizers: those that step together; each group has its peak rate as `initial_lr`.
        batches: training data, at its position.
        validation: validation data, read anew at each evaluation.
        writer: of checkpoints.
        model_config: transformers' configuration, for checkpoints.
        flops_per_token: of the model.
        peak_flops: of all devices together; None where it is not known.
        diagnostics: measures updates; None when not asked for.
        step: finished steps.
    """

    config: PretrainConfig
    ranks: Ranks
    model: nn.Module
    optimizers: Sequence[Optimizer]
    batches: TrainBatches
    validation: Iterable[Tensor]
    writer: CheckpointWriter
    model_config: Mapping[str, Any]
    flops_per_token: int
    peak_flops: float | None
    diagnostics: MatrixDiagnostics | None
    step: int


class Trainer:
    """Trains until the last step, or until asked to stop.

    Args:
        training: what to train.
        metrics: where numbers go; None on ranks that write none.
        display: what the terminal shows.
    """

    def __init__(
        self, training: Training, *, metrics: MetricsLog | None, display: RunDisplay
    ) -> None:
        self._run = training
        self._config = training.config
        self._metrics = metrics
        self._display = display
        self._clock = StepClock(training.ranks.device)
        self._parameters = [p for p in training.model.parameters() if p.requires_grad]
        self._num_micro_batches = training.batches.share.micro_batches_per_step
        self._saved_step = training.step
        self._diagnosed: dict[str, float] = {}

    def run(self, stop: StopRequest) -> bool:
        """Train; a checkpoint is written at the end, whichever it is.

        Returns:
            Whether the last step was reached.

        Raises:
            RunsFailedError: the loss stopped being a number, or a checkpoint cannot be written.
            InputError: the data cannot be read any more.
        """
        run, steps = self._run, self._config.batch.steps
        run.model.train()
        while run.step < steps:
            if stop.agreed(run.ranks):
                self._save()
                run.writer.wait()
                return False
            self.advance()
        self._save()
        run.writer.wait()
        return True

    def advance(self) -> None:
        """One step, and what is due after it.

        Raises:
            RunsFailedError: as `run`.
            InputError: as `run`.
        """
        loss, norm = self._step()
        self._after_step(loss, norm, is_last=self._run.step == self._config.batch.steps)

    def _step(self) -> tuple[Tensor, Tensor]:
        """One optimizer step.

        Returns:
            The mean loss of this rank's part of the batch, and the norm of the whole gradient.
        """
        run, clock = self._run, self._clock
        clock.begin()
        total = torch.zeros((), dtype=torch.float32, device=run.ranks.device)
        for number in range(1, self._num_micro_batches + 1):
            tokens = next(run.batches).to(run.ranks.device, non_blocking=True)
            reduce_only_after_last_(run.model, is_last=number == self._num_micro_batches)
            loss = self._loss(run.model, tokens) / self._num_micro_batches
            loss.backward()
            total += loss.detach()
        norm = clip_gradients_(self._parameters, max_norm=self._config.optimizer.max_grad_norm)
        self._set_learning_rates()
        if run.diagnostics is not None:
            run.diagnostics.before_step(run.step)
        clock.begin_optimizer()
        for optimizer in run.optimizers:
            optimizer.step()
        clock.end()
        if run.diagnostics is not None:
            self._diagnosed = run.diagnostics.after_step(run.step) or {}
            if self._diagnosed:
                self._diagnosed["diagnostics_seconds"] = run.diagnostics.last_seconds
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)
        run.step += 1
        return total, norm

    def _loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        with autocast(self._config.model, self._run.ranks):
            return next_token_loss(model, tokens)

    def _set_learning_rates(self) -> None:
        factor = self._factor(self._run.step)
        for optimizer in self._run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def _factor(self, step: int) -> float:
        config = self._config
        return scheduled_factor(step, steps=config.batch.steps, schedule=config.schedule)

    def _after_step(self, loss: Tensor, norm: Tensor, *, is_last: bool) -> None:
        """What is due at the border between two steps; the loss is checked before it is saved."""
        step, config = self._run.step, self._config
        saves = is_last or _is_due(step, config.checkpoint.save_every)
        evaluates = config.evaluation.eval_every > 0 and (
            is_last or _is_due(step, config.evaluation.eval_every)
        )
        if saves or evaluates or self._diagnosed or _is_due(step, config.metrics.log_every):
            self._log(loss, norm)
        if evaluates:
            self._evaluate()
        if saves:
            self._save()

    def _log(self, loss: Tensor, norm: Tensor) -> None:
        run = self._run
        mean = float(run.ranks.sum_over_data_(loss.clone()) / run.ranks.data_size)
        self._check_finite(train_loss=mean, gradient_norm=float(norm))
        times = self._clock.take()
        tokens_per_second = times.steps * self._config.batch.tokens_per_step / times.seconds
        in_use, peak = memory_bytes(run.ranks.device)
        row = {
            "tokens": self._tokens,
            "train_loss": mean,
            "gradient_norm": float(norm),
            "learning_rate": self._config.optimizer.lr * self._factor(run.step - 1),
            "step_seconds": times.seconds / times.steps,
            "tokens_per_second": tokens_per_second,
            "optimizer_time_share": times.optimizer_seconds / times.seconds,
            "memory_bytes": in_use,
            "peak_memory_bytes": peak,
            **self._diagnosed,
        }
        if run.peak_flops is not None:
            row["mfu"] = tokens_per_second * run.flops_per_token / run.peak_flops
        self._diagnosed = {}
        if self._metrics is not None:
            self._metrics.log(run.step, row)
        self._display.advance(run.step, row)

    def _evaluate(self) -> None:
        run = self._run
        value = validation_loss(
            run.model,
            run.validation,
            run.ranks,
            loss=self._loss,
            sequence_length=self._config.batch.sequence_length,
        )
        self._check_finite(validation_loss=value)
        if self._metrics is not None:
            self._metrics.log(run.step, {"tokens": self._tokens, "validation_loss": value})
        self._display.say(f"step {run.step}  validation loss {value:.4f}")

    def _check_finite(self, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                self._fail(f"{name.replace('_', ' ')} is {value}")

    def _fail(self, what: str) -> NoReturn:
        raise RunsFailedError(
            f"the {what} at step {self._run.step}: training stopped, and the checkpoints before it "
            "are as they were; try a lower --lr"
        )

    def _save(self) -> None:
        """Write a checkpoint, unless there is one of this step already."""
        run = self._run
        if run.step == self._saved_step:
            return
        if run.ranks.any(bool(has_nonfinite(self._parameters))):
            self._fail("weights are no longer finite")
        position = RunPosition(
            step=run.step,
            tokens=self._tokens,
            config=self._config.to_values(),
            model_config=dict(run.model_config),
            data_state=run.batches.state_dict(),
        )
        run.writer.save(tensors_to_save(run.model, run.optimizers, run.ranks), position)
        self._saved_step = run.step

    @property
    def _tokens(self) -> int:
        return self._run.step * self._config.batch.tokens_per_step


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
