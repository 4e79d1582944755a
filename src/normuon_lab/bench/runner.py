"""A contender made ready: built, its first steps taken, and all measured but its time."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.optim import Optimizer

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.measure import (
    Gradients,
    StepProfile,
    counted_flops,
    profile_step,
    synchronize,
    tensor_bytes,
    tensor_elements,
    tracked_memory,
)
from normuon_lab.errors import in_words

CAPTURE_WARMUPS = 3


@dataclass(slots=True, kw_only=True)
class Runner:
    """A contender ready to be timed, and what was measured of it.

    Attributes:
        contender: who.
        params: stepped.
        step: takes one step.
        optimizer: whose step it is, kept alive.
        flops: of the matrix products of one step, counted; 0 where none was seen.
        flops_note: why there are none; None where they are known.
        first_step_seconds: until all was built and compiled.
        state_bytes: of its optimizer state.
        state_elements: of the same, step counts apart.
        scratch_kept_bytes: what it holds between steps besides parameters, gradients and state.
        scratch_peak_bytes: the most that a step allocates beyond all that is held between steps.
        profile: of one step.
        polar: errors of its direction, by shape; empty when they were not asked for.
        step_ms: one per round.
        host_ms: until the step returned, one per round, where that was timed.
    """

    contender: Contender
    params: Sequence[nn.Parameter]
    step: Callable[[], object]
    optimizer: Optimizer
    flops: int
    flops_note: str | None
    first_step_seconds: float
    state_bytes: int
    state_elements: int
    scratch_kept_bytes: int
    scratch_peak_bytes: int
    profile: StepProfile
    polar: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    step_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    @property
    def scratch_bytes(self) -> int:
        """All memory it needs besides parameters, gradients and state."""
        return self.scratch_kept_bytes + self.scratch_peak_bytes


class TooSlowError(Exception):
    """A contender would take more time than it was given."""


def prepare(
    contender: Contender,
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    device: torch.device,
    *,
    limit: AbstractContextManager[object] | None = None,
) -> Runner:
    """Builds the optimizer, takes its first steps and measures all but its time.

    Args:
        contender: who.
        params: stepped.
        gradients: of every step.
        device: where.
        limit: entered for the first step, which nothing compiles; may raise `TooSlowError`.
    """
    started = time.perf_counter()
    gradients.hand_out(params)
    with tracked_memory(device) as memory:
        optimizer = contender.build(params)
        with limit or nullcontext():
            flops, note = _counted(optimizer.step, contender)
        gc.collect()
    step: Callable[[], object] = optimizer.step
    if contender.compiles:
        gradients.hand_out(params)
        step()
        synchronize(device)
    first_step_seconds = time.perf_counter() - started
    gradients.hand_out(params)
    profile = profile_step(step, device)
    kept, peak = 0, profile.memory.peak
    if contender.captured:
        with tracked_memory(device) as pool:
            step = _captured(step, params, gradients, device)
        # The graph keeps what its step allocates; a replay allocates nothing.
        kept, peak = pool.peak, 0
        gradients.hand_out(params)
        profile = profile_step(step, device)
    state = list(optimizer.state.values())
    state_bytes = tensor_bytes(state)
    return Runner(
        contender=contender,
        params=params,
        step=step,
        optimizer=optimizer,
        flops=flops,
        flops_note=note,
        first_step_seconds=first_step_seconds,
        state_bytes=state_bytes,
        state_elements=tensor_elements(state),
        scratch_kept_bytes=kept + max(0, memory.net - state_bytes),
        scratch_peak_bytes=peak,
        profile=profile,
    )


def _counted(step: Callable[[], object], contender: Contender) -> tuple[int, str | None]:
    """Takes a step; its FLOPs, and why there are none."""
    try:
        flops = counted_flops(step)
    except TooSlowError:
        raise
    except Exception as error:  # Kernels of one's own may not bear the counter.
        step()
        return 0, f"not counted: {in_words(error)}"
    is_blind = not flops and contender.ns_dtype is not None
    return flops, "the counter sees none of its products" if is_blind else None


def _captured(
    step: Callable[[], object],
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    device: torch.device,
) -> Callable[[], object]:
    """The step as a CUDA graph, which reads gradients where `gradients` puts them."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(CAPTURE_WARMUPS):
            gradients.hand_out(params)
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay
