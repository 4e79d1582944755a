"""The training loop of one run on one rank, its learning rates, its clock, and evaluation."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from normuon_lab.train.ranks import Ranks

CPU = torch.device("cpu")

Batch = tuple[Tensor, Tensor]
"""Inputs and targets, both int64 ``[batch, sequence]``."""

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""From a model, inputs and targets to the mean loss, ``[]``."""


class Probe(Protocol):
    """Measures optimizer steps without changing them."""

    def before_step(self, step: int) -> None:
        """Called with gradients ready; `step` counts from 0."""

    def after_step(self, step: int) -> Mapping[str, float] | None:
        """Called with the same number after the optimizers have stepped; numbers to log."""


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """The results of a step.

    Attributes:
        number: finished steps, this one included.
        loss: mean over this rank's part of the batch, before the step, float32 `[]`.
        gradient_norm: global norm before clipping, float64 `[]`; None where it is not taken.
        measured: the probe's numbers, to be logged.
    """

    number: int
    loss: Tensor
    gradient_norm: Tensor | None
    measured: Mapping[str, float]


@dataclass(kw_only=True)
class TrainingLoop:
    """Takes optimizer steps, each over one or several micro batches.

    Attributes:
        model: spread over its ranks.
        optimizers: those that step together; their present learning rates are the peaks.
        batches: micro batches on the model's device, without end.
        loss: what is minimised.
        factor: from a step's number, counted from 0, to the factor on the peak learning rates.
        num_micro_batches: micro batches of a step; their gradients are averaged.
        max_grad_norm: bound on the global norm of gradients; 0 only measures, None does neither.
        probe: measures optimizer steps; None for nothing.
        step: finished steps.
        device: where steps run, for their times.
    """

    model: nn.Module
    optimizers: Sequence[Optimizer]
    batches: Iterator[Batch]
    loss: Loss
    factor: Callable[[int], float]
    num_micro_batches: int = 1
    max_grad_norm: float | None = None
    probe: Probe | None = None
    step: int = 0
    device: torch.device = CPU

    def __post_init__(self) -> None:
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self._peaks = [group["lr"] for group in self._groups]
        self.clock = StepClock(self.device)

    def run(
        self,
        until: int,
        *,
        after_step: Callable[[FinishedStep], object],
        should_stop: Callable[[], bool],
    ) -> bool:
        """Train up to a step.

        Returns:
            Whether the last step was reached.
        """
        self.model.train()
        while self.step < until:
            if should_stop():
                return False
            after_step(self.advance())
        return True

    def advance(self) -> FinishedStep:
        """Take one step."""
        self.clock.mark()
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for _ in range(self.num_micro_batches):
            inputs, targets = next(self.batches)
            loss = self.loss(self.model, inputs, targets) / self.num_micro_batches
            loss.backward()
            total += loss.detach()
        norm = None
        if self.max_grad_norm is not None:
            norm = clip_gradients_(self._parameters, max_norm=self.max_grad_norm)
        factor = self.factor(self.step)
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self.clock.mark()
        if self.probe is not None:
            self.probe.before_step(self.step)
        self.clock.mark()
        for optimizer in self.optimizers:
            optimizer.step()
        self.clock.mark()
        measured = self.probe.after_step(self.step) if self.probe is not None else None
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return FinishedStep(self.step, total, norm, measured or {})


def learning_rate_factor(step: int, *, steps: int, warmup_steps: int, decay_steps: int) -> float:
    """The factor on the peak learning rate at `step`, counted from 0.

    It rises from 1/warmup_steps to 1 over the warmup, stays, and falls in equal parts over the last
    `decay_steps` towards zero, which it would reach one past the last step. It depends on the step
    alone, so it needs no state in checkpoints.

    Example:
        >>> [learning_rate_factor(t, steps=6, warmup_steps=2, decay_steps=4) for t in range(6)]
        [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
        >>> [learning_rate_factor(t, steps=6, warmup_steps=0, decay_steps=2) for t in range(6)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 0.5]
    """
    rise = (step + 1) / warmup_steps if step < warmup_steps else 1.0
    fall = (steps - step) / decay_steps if step > steps - decay_steps else 1.0
    return min(rise, fall)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    scores: Callable[[nn.Module, Tensor, Tensor], Sequence[Tensor]],
    *,
    ranks: Ranks,
    sequence_length: int,
) -> list[float]:
    """Means of scores over the sequences of all ranks' batches, the same on any number of ranks.

    Args:
        model: put into evaluation mode, and back.
        batches: this rank's. Ranks may have different numbers; together they have at least one.
        scores: means over the sequences of a batch, `[]` each.
        ranks: with whom to evaluate.
        sequence_length: of the batches.
    """
    was_training = model.training
    model.eval()
    # The sum of each score over sequences, and the number of sequences.
    totals = torch.zeros((), dtype=torch.float64, device=ranks.device)
    # A sharded model is called by all ranks or by none: one without a batch calls it for nothing.
    nothing = torch.zeros(1, sequence_length, dtype=torch.int64)
    waiting = iter(batches)
    while ranks.any((batch := next(waiting, None)) is not None):
        inputs, targets = (
            tensor.to(ranks.device, non_blocking=True) for tensor in batch or (nothing, nothing)
        )
        means = torch.stack([score.double() for score in scores(model, inputs, targets)])
        row = torch.cat([means, means.new_ones(1)]) * len(inputs)
        totals = totals + (row if batch is not None else torch.zeros_like(row))
    ranks.sum_over_data_(totals)
    model.train(was_training)
    *sums, num_sequences = totals.tolist()
    return [total / num_sequences for total in sums]


def clip_gradients_(parameters: Iterable[Tensor], *, max_norm: float) -> Tensor:
    """Scale all gradients by one factor so that their global norm is at most `max_norm`.

    torch's own `clip_grad_norm_` refuses gradients of several meshes, as tensor parallelism
    leaves them.

    Args:
        parameters: those of the model, the same on every rank and in the same order; plain tensors
            or DTensors. Where they have no gradient they are passed over.
        max_norm: the bound; 0 only measures.

    Returns:
        The norm before, float64 `[]`, the same on every rank. Does not wait for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    by_split: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        by_split.setdefault(_split_of(gradient), []).append(local_part(gradient))
    total = torch.zeros((), dtype=torch.float64, device=local_part(gradients[0]).device)
    for (mesh, axes), parts in by_split.items():
        squares = torch.stack(torch._foreach_norm(parts)).double().square().sum()
        for axis in axes:
            assert mesh is not None
            dist.all_reduce(squares, group=mesh.get_group(axis))
        total += squares
    norm = total.sqrt()
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parts in by_split.values():
            torch._foreach_mul_(parts, factor.to(parts[0].dtype))
    return norm


def has_nonfinite(parameters: Iterable[Tensor]) -> Tensor:
    """Whether this rank's part of any parameter holds a NaN or an infinity, bool `[]`."""
    norms = torch.stack(torch._foreach_norm([local_part(p.detach()) for p in parameters]))
    return ~norms.isfinite().all()


def _split_of(gradient: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    """The mesh of a gradient and the axes over which it is split; along others it is repeated."""
    if not isinstance(gradient, DTensor):
        return (None, ())
    axes = tuple(
        axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate()
    )
    return (gradient.device_mesh, axes)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of some steps, and of the optimizer within them."""

    steps: int
    seconds: float
    optimizer_seconds: float


class StepClock:
    """Times training steps, on CUDA by events, so that the host need not wait at every step.

    A step has four marks: where it and its data begin, where gradients are ready, where the
    optimizers begin, and where they end. Probes, evaluations and checkpoints do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # CUDA events, or the host's time.
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note the next of a step's four marks."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def take(self) -> StepTimes:
        """The times of the steps since the last call; waits for the device."""
        marks, self._marks = self._marks, []
        passes = sum(map(_seconds, marks[0::4], marks[1::4]))
        optimizer = sum(map(_seconds, marks[2::4], marks[3::4]))
        return StepTimes(len(marks) // 4, passes + optimizer, optimizer)


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
