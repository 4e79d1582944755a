"""What is due between the steps of a run: metrics, evaluations, checkpoints, a request to stop."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.data.batches import TrainBatches
from normuon_lab.data.sequences import inputs_and_targets
from normuon_lab.errors import RunsFailedError
from normuon_lab.train.display import RunDisplay
from normuon_lab.train.loop import (
    Batch,
    FinishedStep,
    TrainingLoop,
    evaluate,
    has_nonfinite,
    learning_rate_factor,
)
from normuon_lab.train.model import next_token_loss
from normuon_lab.train.pretrain.checkpoint_tensors import tensors_to_save
from normuon_lab.train.pretrain.checkpoint_writer import CheckpointWriter, RunPosition
from normuon_lab.train.pretrain.config import PretrainConfig
from normuon_lab.train.pretrain.metrics import MetricsLog, memory_bytes
from normuon_lab.train.pretrain.parallel import autocast, reduce_only_after_last_
from normuon_lab.train.ranks import Ranks

if TYPE_CHECKING:
    from normuon_lab.train.pretrain.diagnostics import MatrixDiagnostics


INTERRUPT = "Ctrl-C"


class StopRequest:
    """A request to stop after the current step, which all ranks then do together.

    SIGTERM, which schedulers send before they take the machine away, counts while this is open;
    Ctrl-C within `interrupts_noted` alone, so that it ends at once what has no step to keep yet.
    The signal only sets a flag: a step, or a checkpoint that is being written, ends first.

    Attributes:
        by: what asked, for messages.
    """

    def __init__(self) -> None:
        self.by = ""

    def __enter__(self) -> StopRequest:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        signal.signal(signal.SIGTERM, self._before)

    @contextmanager
    def interrupts_noted(self, ranks: Ranks) -> Iterator[None]:
        """Note Ctrl-C too; a second one ends the process at once."""
        self._speaks = ranks.is_main
        before = signal.signal(signal.SIGINT, self._note_interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def agreed(self, ranks: Ranks) -> bool:
        """Whether any rank was asked to stop; all ranks call this together."""
        if not ranks.any(bool(self.by)):
            return False
        self.by = INTERRUPT if ranks.any(self.by == INTERRUPT) else "SIGTERM"
        return True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.by = "SIGTERM"

    def _note_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.by = INTERRUPT
        # By the system, since Python would wait for the end of a long operation.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self._speaks:
            # Unbuffered: the signal may have come while a line was being printed.
            text = "\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n"
            with suppress(OSError):
                os.write(2, text.encode())


@dataclass(slots=True, kw_only=True)
class Training:
    """All that a run consists of, built and restored.

    Attributes:
        config: resolved.
        title: what is trained on what, in a line.
        ranks: who trains.
        model: spread over the ranks.
        optimizers: those that step together, at their peak learning rates.
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
    title: str
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
        self._saved_step = training.step
        steps, schedule = self._config.batch.steps, self._config.schedule
        self._factor = partial(
            learning_rate_factor,
            steps=steps,
            warmup_steps=schedule.warmup_steps,
            decay_steps=schedule.decay_steps(steps),
        )
        self._loop = TrainingLoop(
            training.model,
            training.optimizers,
            batches=self._micro_batches(),
            loss=self._loss,
            factor=self._factor,
            num_micro_batches=training.batches.share.micro_batches_per_step,
            max_grad_norm=self._config.optimizer.max_grad_norm,
            probe=training.diagnostics,
            step=training.step,
            device=training.ranks.device,
        )

    def run(self, stop: StopRequest) -> bool:
        """Train; a checkpoint is written at the end, whichever it is.

        Returns:
            Whether the last step was reached.

        Raises:
            RunsFailedError: the loss stopped being a number, or a checkpoint cannot be written.
            InputError: the data cannot be read any more.
        """
        is_done = self._loop.run(
            self._config.batch.steps,
            after_step=self._after_step,
            should_stop=lambda: stop.agreed(self._run.ranks),
        )
        self._save()
        self._run.writer.wait()
        return is_done

    def advance(self) -> None:
        """One step, and what is due after it; `run` without a request to stop."""
        self._after_step(self._loop.advance())

    def _micro_batches(self) -> Iterator[Batch]:
        run = self._run
        for number in count(1):
            tokens = next(run.batches).to(run.ranks.device, non_blocking=True)
            is_last = number % run.batches.share.micro_batches_per_step == 0
            reduce_only_after_last_(run.model, is_last=is_last)
            yield inputs_and_targets(tokens)

    def _loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        with autocast(self._config.model, self._run.ranks):
            return next_token_loss(model, inputs, targets)

    def _after_step(self, step: FinishedStep) -> None:
        """What is due at the border between two steps; the loss is checked before it is saved."""
        number = self._run.step = step.number
        config, diagnostics = self._config, self._run.diagnostics
        is_last = number == config.batch.steps
        saves = is_last or _is_due(number, config.checkpoint.save_every)
        evaluates = config.evaluation.eval_every > 0 and (
            is_last or _is_due(number, config.evaluation.eval_every)
        )
        measured = dict(step.measured)
        if measured and diagnostics is not None:
            measured["diagnostics_seconds"] = diagnostics.last_seconds
        if saves or evaluates or measured or _is_due(number, config.metrics.log_every):
            self._log(step, measured)
        if evaluates:
            self._evaluate()
        if saves:
            self._save()

    def _log(self, step: FinishedStep, measured: Mapping[str, float]) -> None:
        run = self._run
        loss = float(run.ranks.sum_over_data_(step.loss.clone()) / run.ranks.data_size)
        assert step.gradient_norm is not None
        norm = float(step.gradient_norm)
        self._check_finite(train_loss=loss, gradient_norm=norm)
        times = self._loop.clock.take()
        tokens_per_second = times.steps * self._config.batch.tokens_per_step / times.seconds
        in_use, peak = memory_bytes(run.ranks.device)
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
        if run.peak_flops is not None:
            row["mfu"] = tokens_per_second * run.flops_per_token / run.peak_flops
        if self._metrics is not None:
            self._metrics.log(run.step, row)
        self._display.advance(run.step, row)

    def _evaluate(self) -> None:
        run = self._run
        (value,) = evaluate(
            run.model,
            map(inputs_and_targets, run.validation),
            lambda *batch: (self._loss(*batch),),
            ranks=run.ranks,
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
            f"the {what} at step {self._run.step}: training stopped, earlier checkpoints are "
            "intact; try a lower --lr"
        )

    def _save(self) -> None:
        """Write a checkpoint, unless there is one of this step already."""
        run = self._run
        if run.step == self._saved_step:
            return
        if run.ranks.any(bool(has_nonfinite(run.model.parameters()))):
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
