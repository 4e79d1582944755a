"""One contender made ready, its step counted and profiled, and the clocks that time it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.measure import (
    Built,
    Gradients,
    build_and_step,
    counted_flops,
    profile_step,
    synchronize,
    tracked_memory,
)
from normuon_lab.errors import in_words

TOP_KERNELS = 5
KERNEL_NAME_LENGTH = 160
CAPTURE_WARMUPS = 3


@dataclass(slots=True)
class Runner:
    """A contender ready to be timed.

    Attributes:
        contender: who.
        step: takes one step.
        built: the optimizer whose step it is, kept alive.
        figures: what was measured besides time, as plain values.
        step_ms: one per round.
        host_ms: until the step returned, one per round; equal to the step's on a CPU.
    """

    contender: Contender
    step: Callable[[], object]
    built: Built
    figures: dict[str, Any]
    step_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    def take_round(self, device: torch.device) -> None:
        """Times one step."""
        step_ms, host_ms = timed_step(self.step, device)
        self.step_ms.append(step_ms)
        self.host_ms.append(host_ms)

    def forget_rounds(self) -> None:
        """Drops the times of all rounds."""
        self.step_ms.clear()
        self.host_ms.clear()


class UnusableStepError(RuntimeError):
    """A step left weights that are not finite."""


def timed_step(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds of one step, on the device and until it returned to the host.

    On CUDA by events around it, with nothing queued before, so that slow launches by the host
    count.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        spent = 1e3 * (time.perf_counter() - started)
        return spent, spent
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    begin.record()
    started = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - started)
    end.record()
    synchronize(device)
    return begin.elapsed_time(end), host


def prepare(
    contender: Contender,
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    device: torch.device,
    *,
    may_diverge: bool = False,
) -> Runner:
    """Builds the optimizer, takes its first steps and measures all but its time.

    Args:
        contender: who.
        params: stepped.
        gradients: of every step.
        device: where.
        may_diverge: weights that are not finite are no failure.

    Raises:
        UnusableStepError: its first step left weights that are not finite.
    """
    check = no_check if may_diverge else check_finite
    started = time.perf_counter()
    notes = []

    def count(step: Callable[[], object]) -> int:
        try:
            flops = counted_flops(step)
        except Exception as error:  # Kernels of one's own may not bear the counter.
            notes.append(f"not counted: {in_words(error)}")
            step()
            return 0
        if not flops and contender.ns_dtype is not None:
            notes.append("the counter sees none of its products")
        return flops

    built = build_and_step(contender.build, params, gradients, device, count=count)
    step: Callable[[], object] = built.optimizer.step
    check(params)
    if contender.compiles:
        gradients.hand_out(params)
        step()
        synchronize(device)
        check(params)
    first_seconds = time.perf_counter() - started
    gradients.hand_out(params)
    with tracked_memory(device) as use:
        step()
    scratch_kept, scratch_peak = built.scratch_kept_bytes, use.peak
    if contender.captured:
        with tracked_memory(device) as pool:
            step = captured(step, params, gradients, device)
        # The graph keeps what its step allocates; a replay allocates nothing.
        scratch_kept, scratch_peak = scratch_kept + pool.peak, 0
    gradients.hand_out(params)
    figures = {
        "flops": built.flops or None,
        "flops_note": notes[0] if notes else None,
        "first_step_seconds": first_seconds,
        "state_bytes": built.state_bytes,
        "scratch_kept_bytes": scratch_kept,
        "scratch_peak_bytes": scratch_peak,
        **profiled(step, device),
    }
    return Runner(contender, step, built, figures)


def captured(
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


def profiled(step: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """Launches, milliseconds and the longest kernels of one step.

    On a CPU operators stand in for kernels, and there are no launches.
    """
    kernels = profile_step(step, device).kernels
    on_cuda = device.type == "cuda"
    return {
        "launches": sum(one.count for one in kernels) if on_cuda else None,
        "device_ms": sum(one.ms for one in kernels) if on_cuda else None,
        "top_kernels": [
            {"name": one.name[:KERNEL_NAME_LENGTH], "ms": one.ms, "count": one.count}
            for one in sorted(kernels, reverse=True)[:TOP_KERNELS]
        ],
    }


def no_check(_: Sequence[nn.Parameter]) -> None:
    """Accepts any weights."""


def check_finite(params: Sequence[nn.Parameter]) -> None:
    """Raises `UnusableStepError` for weights that are not finite."""
    if not all(bool(torch.isfinite(param).all()) for param in params):
        raise UnusableStepError("its step made weights that are not finite")
