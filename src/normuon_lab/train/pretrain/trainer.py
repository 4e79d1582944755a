"""A run step by step, with metrics, evaluations and checkpoints between the steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.data.batches import PretrainData
from normuon_lab.data.sequences import inputs_and_targets
from normuon_lab.errors import RunsFailedError, counted, require
from normuon_lab.train.arms.options import ArmOptions
from normuon_lab.train.arms.registry import PRETRAINING_ARMS
from normuon_lab.train.display import RunDisplay
from normuon_lab.train.loop import (
    Batch,
    FinishedStep,
    TrainingLoop,
    evaluate,
    has_nonfinite,
    learning_rate_factor,
)
from normuon_lab.train.model import (
    config_values,
    flops_per_token,
    next_token_loss,
)
from normuon_lab.train.pretrain.checkpoint import CheckpointDescription
from normuon_lab.train.pretrain.checkpoint_tensors import restore_, tensors_to_save
from normuon_lab.train.pretrain.checkpoint_writer import CheckpointWriter
from normuon_lab.train.pretrain.config import BatchConfig, OptimizerConfig, PretrainConfig
from normuon_lab.train.pretrain.metrics import MetricsLog, memory_bytes, peak_flops
from normuon_lab.train.pretrain.parallel import (
    autocast,
    compute_dtype,
    reduce_only_after_last_,
    spread,
)
from normuon_lab.train.ranks import Ranks


class Trainer:
    """Trains until the last step, or until asked to stop; writes nothing before the first step.

    The model, whole and on the CPU, is spread over the ranks. `point` is a checkpoint to continue
    from.

    Attributes:
        batches: training data, at its position.
        writer: of checkpoints.
        metrics: the log of numbers; None on ranks that write none.

    Raises:
        InputError: model, data, ranks and checkpoint do not fit together.
    """

    def __init__(
        self,
        config: PretrainConfig,
        out: Path,
        ranks: Ranks,
        model: nn.Module,
        data: PretrainData,
        display: RunDisplay,
        point: tuple[Path, CheckpointDescription] | None = None,
    ) -> None:
        self._config, self._ranks, self._display = config, ranks, display
        batch, schedule, metrics = config.batch, config.schedule, config.metrics
        micro_size = micro_batch_size(batch, data_ranks=ranks.data_size)
        self._flops_per_token = flops_per_token(model, sequence_length=batch.sequence_length).total
        self._peak_flops = peak_flops(ranks.device, metrics.device_tflops)
        self._model_config = config_values(model)
        self._model = spread(model, config.model, ranks)
        forward_dtype = compute_dtype(config.model, ranks.device)
        self._optimizers = build_optimizers(
            self._model, config.optimizer, forward_dtype=forward_dtype
        )
        share = {"rank": ranks.data_rank, "world_size": ranks.data_size}
        self.batches = data.train_batches(
            global_batch_size=batch.batch_size, micro_batch_size=micro_size, **share
        )
        self._validation: Iterable[Tensor] = ()
        if config.evaluation.eval_every:
            self._validation = data.validation_batches(
                tokens=config.evaluation.eval_tokens, batch_size=micro_size, **share
            )
        self.writer = CheckpointWriter(out, config.checkpoint, ranks)
        self.metrics: MetricsLog | None = None
        self._saved_step = 0
        # First, because a restored optimizer has other param groups than it had.
        if point is not None:
            path, then = point
            self._saved_step = then.step
            self.batches.load_state_dict(then.data_state)
            restore_(path, self._model, self._optimizers, ranks, world_size_then=then.world_size)
        self._diagnostics = None
        if metrics.diagnose_every:
            from normuon_lab.train.pretrain.diagnostics import MatrixDiagnostics

            # The first optimizer is the one of the hidden matrices.
            self._diagnostics = MatrixDiagnostics(
                self._model, self._optimizers[0], every=metrics.diagnose_every
            )
        self._factor = partial(
            learning_rate_factor,
            steps=batch.steps,
            warmup_steps=schedule.warmup_steps,
            decay_steps=schedule.decay_steps(batch.steps),
        )
        self._loop = TrainingLoop(
            model=self._model,
            optimizers=self._optimizers,
            batches=self._micro_batches(),
            loss=self._loss,
            factor=self._factor,
            num_micro_batches=self.batches.share.micro_batches_per_step,
            max_grad_norm=config.optimizer.max_grad_norm,
            probe=self._diagnostics,
            step=self._saved_step,
            device=ranks.device,
        )

    @property
    def step(self) -> int:
        """Finished steps."""
        return self._loop.step

    def run(self, should_stop: Callable[[], bool]) -> bool:
        """Train, and write a checkpoint at the end, even if stopped early.

        Returns:
            Whether the last step was reached.

        Raises:
            RunsFailedError: the loss is not finite, or a checkpoint cannot be written.
            InputError: the data cannot be read any more.
        """
        is_done = self._loop.run(
            self._config.batch.steps, after_step=self._after_step, should_stop=should_stop
        )
        self._save()
        self.writer.wait()
        return is_done

    def advance(self) -> None:
        """One step and the work after it; `run` without a request to stop."""
        self._after_step(self._loop.advance())

    def _micro_batches(self) -> Iterator[Batch]:
        for number in count(1):
            tokens = next(self.batches).to(self._ranks.device, non_blocking=True)
            is_last = number % self.batches.share.micro_batches_per_step == 0
            reduce_only_after_last_(self._model, is_last=is_last)
            yield inputs_and_targets(tokens)

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(self._config.model, self._ranks):
            return next_token_loss(model, inputs, targets)

    def _after_step(self, step: FinishedStep) -> None:
        """The work between two steps; the loss is checked before a checkpoint is saved."""
        number, config = step.number, self._config
        is_last = number == config.batch.steps
        saves = is_last or _is_due(number, config.checkpoint.save_every)
        evaluates = config.evaluation.eval_every > 0 and (
            is_last or _is_due(number, config.evaluation.eval_every)
        )
        measured = dict(step.measured)
        if measured and self._diagnostics is not None:
            measured["diagnostics_seconds"] = self._diagnostics.last_seconds
        if saves or evaluates or measured or _is_due(number, config.metrics.log_every):
            self._log(step, measured)
        if evaluates:
            self._evaluate()
        if saves:
            self._save()

    def _log(self, step: FinishedStep, measured: Mapping[str, float]) -> None:
        loss = float(self._ranks.sum_over_data_(step.loss.clone()) / self._ranks.data_size)
        assert step.gradient_norm is not None
        norm = float(step.gradient_norm)
        self._check_finite(train_loss=loss, gradient_norm=norm)
        times = self._loop.clock.take()
        tokens_per_second = times.steps * self._config.batch.tokens_per_step / times.seconds
        in_use, peak = memory_bytes(self._ranks.device)
        row = {
            "tokens": self._tokens,
            "train_loss": loss,
            "gradient_norm": norm,
            "learning_rate": self._config.optimizer.lr * self._factor(step.number - 1),
            "step_seconds": times.seconds / times.steps,
            "tokens_per_second": tokens_per_second,
            "optimizer_time_share": times.optimizer_seconds / times.seconds,
            "memory_bytes": in_use,
            "peak_memory_bytes": peak,
            **measured,
        }
        if self._peak_flops is not None:
            peak_of_all = self._peak_flops * self._ranks.world_size
            row["mfu"] = tokens_per_second * self._flops_per_token / peak_of_all
        if self.metrics is not None:
            self.metrics.log(self.step, row)
        self._display.advance(self.step, row)

    def _evaluate(self) -> None:
        (value,) = evaluate(
            self._model,
            map(inputs_and_targets, self._validation),
            lambda *batch: (self._loss(*batch),),
            ranks=self._ranks,
            sequence_length=self._config.batch.sequence_length,
        )
        self._check_finite(validation_loss=value)
        if self.metrics is not None:
            self.metrics.log(self.step, {"tokens": self._tokens, "validation_loss": value})
        self._display.say(f"step {self.step}  validation loss {value:.4f}")

    def _check_finite(self, **values: float) -> None:
        for name, value in values.items():
            if not math.isfinite(value):
                self._fail(f"{name.replace('_', ' ')} is {value}")

    def _fail(self, what: str) -> NoReturn:
        raise RunsFailedError(
            f"the {what} at step {self.step}: training stopped, earlier checkpoints are "
            "intact; try a lower --lr"
        )

    def _save(self) -> None:
        """Write a checkpoint, unless there is one of this step already."""
        if self.step == self._saved_step:
            return
        if self._ranks.any(bool(has_nonfinite(self._model.parameters()))):
            self._fail("weights are no longer finite")
        description = CheckpointDescription(
            step=self.step,
            tokens=self._tokens,
            world_size=self._ranks.world_size,
            config=self._config.to_values(),
            model_config=self._model_config,
            data_state=self.batches.state_dict(),
        )
        self.writer.save(tensors_to_save(self._model, self._optimizers, self._ranks), description)
        self._saved_step = self.step

    @property
    def _tokens(self) -> int:
        return self.step * self._config.batch.tokens_per_step


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, *, forward_dtype: torch.dtype = torch.bfloat16
) -> list[Optimizer]:
    """The optimizers of an arm, at their peak learning rates."""
    shared = {field.name for field in fields(ArmOptions)} & {field.name for field in fields(config)}
    values = {name: getattr(config, name) for name in shared}
    values["ns_dtype"] = (
        forward_dtype if config.ns_dtype == "auto" else getattr(torch, config.ns_dtype)
    )
    normuon: list[tuple[str, Any]] = [("equilibrate", True)] if config.equilibrate else []
    if config.momentum_dtype != "auto":
        normuon.append(("momentum_dtype", config.momentum_dtype))
    options = ArmOptions(**values, normuon=tuple(normuon))
    return PRETRAINING_ARMS[config.arm].build(model, config.lr, options)


def micro_batch_size(batch: BatchConfig, *, data_ranks: int) -> int:
    """Sequences that a rank takes at once: as many as asked, at most its share.

    Raises:
        InputError: the batch does not divide.

    Example:
        >>> micro_batch_size(BatchConfig(batch_size=16, micro_batch_size=16), data_ranks=4)
        4
    """
    require(
        batch.batch_size % data_ranks == 0,
        f"--batch-size {batch.batch_size} does not split over "
        f"{counted(data_ranks, 'data-parallel rank')}",
    )
    share = batch.batch_size // data_ranks
    size = min(batch.micro_batch_size, share)
    require(
        share % size == 0,
        f"a rank's {counted(share, 'sequence')} of a step do not split into micro batches of "
        f"{size}: give another --micro-batch-size",
    )
    return size
