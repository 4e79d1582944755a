"""One contender made ready, its step counted and profiled, and the clocks that time it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from normuon_lab.bench.measure import (
    Gradients,
    counted_flops,
    synchronize,
    tensor_bytes,
    tracked_memory,
)
from normuon_lab.bench.suite.record import in_words
from normuon_lab.bench.suite.step_contenders import StepContender

TOP_KERNELS = 5
KERNEL_NAME_LENGTH = 160
CAPTURE_WARMUPS = 3


@dataclass(slots=True)
class Runner:
    """A contender ready to be timed.

    Attributes:
        contender: who.
        step: takes one step.
        optimizer: whose step it is, kept alive.
        figures: what was measured besides time, as plain values.
        step_ms: one per round.
        host_ms: until the step returned, one per round; equal to the step's on a CPU.
    """

    contender: StepContender
    step: Callable[[], object]
    optimizer: Optimizer
    figures: dict[str, Any]
    step_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)

    def take_round(self, device: torch.device) -> None:
        """Times one step."""
        step_ms, host_ms = timed_step(self.step, device)
        self.step_ms.append(step_ms)
        self.host_ms.append(host_ms)


class UnusableStepError(RuntimeError):
    """A step left weights that are not finite."""


def timed_step(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds of one step, on the device and until it returned to the host.

    On CUDA by events around it, with nothing queued before, so that a step that the host cannot
    launch fast enough is charged for that.
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
    contender: StepContender,
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    device: torch.device,
) -> Runner:
    """Builds the optimizer, takes its first steps and measures all but its time.

    Raises:
        UnusableStepError: its first step left weights that are not finite.
    """
    started = time.perf_counter()
    gradients.hand_out(params)
    counted: dict[str, Any] = {"flops": None, "flops_note": None}
    with tracked_memory(device) as kept:
        optimizer = contender.build(params)
        step: Callable[[], object] = optimizer.step
        try:
            counted["flops"] = counted_flops(step)
        except Exception as error:  # Kernels of one's own may not bear the counter.
            counted["flops_note"] = f"not counted: {in_words(error)}"
            step()
        gc.collect()
    if not counted["flops"]:
        counted["flops"] = None
        if contender.ns_dtype is not None and counted["flops_note"] is None:
            counted["flops_note"] = "the counter sees none of its products"
    check_finite(params)
    if contender.compiles:
        gradients.hand_out(params)
        step()
        synchronize(device)
        check_finite(params)
    first_seconds = time.perf_counter() - started
    gradients.hand_out(params)
    with tracked_memory(device) as use:
        step()
    state_bytes = tensor_bytes(list(optimizer.state.values()))
    scratch = {"kept": max(0, kept.net - state_bytes), "peak": use.peak}
    if contender.captured:
        with tracked_memory(device) as pool:
            step = captured(step, params, gradients, device)
        # The graph keeps what its step allocates; a replay allocates nothing.
        scratch = {"kept": scratch["kept"] + pool.peak, "peak": 0}
    gradients.hand_out(params)
    figures = {
        **counted,
        "first_step_seconds": first_seconds,
        "state_bytes": state_bytes,
        "scratch_kept_bytes": scratch["kept"],
        "scratch_peak_bytes": scratch["peak"],
        **profiled(step, device),
    }
    return Runner(contender, step, optimizer, figures)


def captured(
    step: Callable[[], object],
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    device: torch.device,
) -> Callable[[], object]:
    """The step as a CUDA graph, which reads gradients where `gradients` always lays them."""
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
    on_cuda = device.type == "cuda"
    wanted = DeviceType.CUDA if on_cuda else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        step()
        synchronize(device)
    kernels = []
    for event in profiler.key_averages():
        if event.device_type != wanted or is_annotation(event):
            continue
        spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        kernels.append((1e-3 * spent, event.count, event.key))
    kernels.sort(reverse=True)
    return {
        "launches": sum(count for _, count, _ in kernels) if on_cuda else None,
        "device_ms": sum(spent for spent, _, _ in kernels) if on_cuda else None,
        "top_kernels": [
            {"name": name[:KERNEL_NAME_LENGTH], "ms": spent, "count": count}
            for spent, count, name in kernels[:TOP_KERNELS]
        ],
    }


def is_annotation(event: Any) -> bool:
    """Whether a profiler's event only spans others, such as ``Optimizer.step#NorMuon.step``."""
    spans = ("#", "Torch-Compiled Region", "ProfilerStep", "CompiledFunction")
    return bool(getattr(event, "is_user_annotation", False)) or any(
        span in event.key for span in spans
    )


def check_finite(params: Sequence[nn.Parameter]) -> None:
    """Raises `UnusableStepError` for weights that are not finite."""
    if not all(bool(torch.isfinite(param).all()) for param in params):
        raise UnusableStepError("its step made weights that are not finite")
