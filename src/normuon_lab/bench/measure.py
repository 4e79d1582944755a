"""What one optimizer step takes: seconds, FLOPs, memory and where its time goes.

Counting and timing are separate steps, so that no figure is taken under another's instrument.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from operator import truediv
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from normuon_lab.bench.matrices import MatrixClass

PRODUCTS = frozenset(f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "matmul"))
"""The operators that multiply matrices."""

PEAK_SIDES = (1024, 4096)
"""Least and greatest side of the square product that measures the machine."""


WEIGHT_SCALE = 0.02


def normal_matrices(
    matrices: Sequence[MatrixClass], *, seed: int, device: torch.device
) -> tuple[list[Tensor], list[Tensor]]:
    """Normal float32 weights and gradients, one of each for every matrix."""
    torch.manual_seed(seed)
    shapes = [one.shape for one in matrices for _ in range(one.count)]
    weights = [torch.randn(shape, device=device) * WEIGHT_SCALE for shape in shapes]
    return weights, [torch.randn(shape, device=device) for shape in shapes]


class Gradients:
    """The same gradients for every step of every contender, some of whom overwrite theirs."""

    def __init__(self, values: Sequence[Tensor]) -> None:
        self._values = list(values)
        self._handed_out = [torch.empty_like(value) for value in values]

    def hand_out(self, params: Sequence[nn.Parameter]) -> None:
        """Puts fresh copies into `params`, always in the same memory."""
        for param, value, copy in zip(params, self._values, self._handed_out, strict=True):
            param.grad = copy.copy_(value)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that `run` takes, its work on the device included."""
    synchronize(device)
    started = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Waits for an accelerator; a CPU has nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def counted_flops(run: Callable[[], object]) -> int:
    """FLOPs of the matrix products in `run`; compiled functions run eagerly to be seen.

    Example:
        >>> x, out = torch.ones(2, 3), torch.empty(2, 2)
        >>> counted_flops(lambda: torch.mm(x, x.mT, out=out))
        24
    """
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def matmul_peak(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """What measures the FLOP/s of one product of square matrices, whenever it is called."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    # One product on an accelerator is over before the next could be launched.
    count = 1 if device.type == "cpu" else 20

    def multiply() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    timed(multiply, device)
    return lambda: count * 2 * side**3 / timed(multiply, device)


def peak_side(shapes: Sequence[tuple[int, int]]) -> int:
    """Side of the product that measures the machine: the longest short side, within limits.

    Example:
        >>> peak_side([(768, 768), (3072, 768)]), peak_side([(2048, 8192)])
        (1024, 2048)
    """
    least, greatest = PEAK_SIDES
    return min(max(least, *(min(shape) for shape in shapes)), greatest)


@dataclass(slots=True)
class MemoryUse:
    """Bytes allocated while a `tracked_memory` block ran.

    Attributes:
        peak: the most at once, beyond what there was.
        net: left at the end, beyond what there was.
    """

    peak: int = 0
    net: int = 0


@dataclass(order=True, slots=True)
class Timed:
    """An operator or a kernel of a profiled step."""

    ms: float
    count: int
    name: str


@dataclass(slots=True)
class StepProfile:
    """Where one step's time went.

    Attributes:
        wall_ms: the step under the profiler, somewhat slower than without.
        operators: that took time, each apart from those it called.
        kernels: of an accelerator; on a CPU, the operators.
        memory: what it allocated.
    """

    wall_ms: float = 0.0
    operators: list[Timed] = field(default_factory=list)
    kernels: list[Timed] = field(default_factory=list)
    memory: MemoryUse = field(default_factory=MemoryUse)


@contextmanager
def tracked_memory(device: torch.device) -> Iterator[MemoryUse]:
    """Counts what the allocator hands out inside the block; ready after it."""
    use = MemoryUse()
    if device.type == "cuda":
        with _tracked_on_cuda(use, device):
            yield use
        return
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield use
    _replay_allocations(profiler, use)


def profile_step(run: Callable[[], object], device: torch.device) -> StepProfile:
    """Runs one step under the profiler."""
    found = StepProfile()
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    tracking = _tracked_on_cuda(found.memory, device) if on_cuda else nullcontext()
    with profile(activities=activities, profile_memory=not on_cuda) as profiler, tracking:
        found.wall_ms = 1e3 * timed(run, device)
    if not on_cuda:
        _replay_allocations(profiler, found.memory)
    for event in profiler.key_averages():
        spent = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        one = Timed(1e-3 * spent, event.count, event.key)
        if event.device_type != DeviceType.CPU:
            if not _is_annotation(event):
                found.kernels.append(one)
        elif spent and "::" in event.key:  # Other events are annotations, not operators.
            found.operators.append(one)
    if not on_cuda:
        found.kernels = found.operators
    return found


def _is_annotation(event: Any) -> bool:
    """Whether a profiler's event only spans others, such as ``Optimizer.step#NorMuon.step``."""
    spans = ("#", "Torch-Compiled Region", "ProfilerStep", "CompiledFunction")
    return bool(getattr(event, "is_user_annotation", False)) or any(
        span in event.key for span in spans
    )


def median_ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median of the ratios round by round, because a machine's speed drifts."""
    return statistics.median(map(truediv, values, others))


def quartiles(values: Sequence[float]) -> list[float]:
    """First and third."""
    if len(values) == 1:
        return [values[0], values[0]]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return [first, third]


def tensor_bytes(values: Any) -> int:
    """Bytes of all tensors in nested containers, each storage once; of DTensors the local part."""
    leaves = (leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor))
    parts = (leaf.to_local() if isinstance(leaf, DTensor) else leaf for leaf in leaves)
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts
    }
    return sum(storages.values())


def tensor_elements(values: Any) -> int:
    """Elements of all tensors of one dim or more in nested containers; step counts are none.

    Example:
        >>> tensor_elements({"momentum": torch.ones(2, 3), "step": torch.tensor(1.0)})
        6
    """
    leaves = (leaf for leaf in tree_iter(values) if isinstance(leaf, Tensor))
    return sum(leaf.numel() for leaf in leaves if leaf.ndim)


@contextmanager
def _tracked_on_cuda(use: MemoryUse, device: torch.device) -> Iterator[None]:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    use.peak = torch.cuda.max_memory_allocated(device) - before
    use.net = torch.cuda.memory_allocated(device) - before


def _replay_allocations(profiler: profile, use: MemoryUse) -> None:
    """The CPU allocator has no peak counter, but the profiler sees each of its calls in order."""
    recorded: Any = profiler.profiler  # Its results are torch's own, without types.
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        use.peak = max(use.peak, live)
    use.net = live
