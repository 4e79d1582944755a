"""How fast a run is: FLOPs per token, peaks of devices, and the time steps take."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

# Dense bfloat16 from NVIDIA's data sheets, in 1e12 FLOPs per second, by a part of the device's
# name. The first that fits counts.
_PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
}


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """FLOPs of forward and backward for one token.

    Attributes:
        weights: 6 for each parameter that a token is multiplied with: all but the embedding, which
            is looked up (a tied one is multiplied with as the head).
        attention: 12 x layers x width of all query heads x sequence length, as if every token saw
            all others (Chowdhery et al. 2022, appendix B); recomputed activations do not count.
    """

    weights: int
    attention: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.attention


def flops_per_token(
    model: nn.Module, config: PretrainedConfig, *, sequence_length: int
) -> TokenFlops:
    """FLOPs of training on one token.

    Args:
        model: whole or on the meta device; tied parameters are one.
        config: its configuration.
        sequence_length: tokens per sequence.
    """
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    known: Any = model
    embedding, head = known.get_input_embeddings(), known.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    looked_up = 0 if is_tied else embedding.weight.numel()
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return TokenFlops(
        weights=6 * (num_parameters - looked_up),
        attention=12 * config.num_hidden_layers * heads * head_width * sequence_length,
    )


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """The peak of one device in FLOPs per second; None where it is neither given nor known."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in _PEAK_TFLOPS.items() if part in name), None)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds of some steps, and of the optimizer within them."""

    steps: int
    seconds: float
    optimizer_seconds: float


class StepClock:
    """Times training steps, on CUDA by events, so that the host need not wait at every step.

    Evaluations and checkpoints, which come between steps, do not count.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[_Mark, _Mark, _Mark]] = []

    def begin(self) -> None:
        """A step begins, its data included."""
        self._begin = _Mark(self._device)

    def begin_optimizer(self) -> None:
        """Gradients are ready."""
        self._optimizer = _Mark(self._device)

    def end(self) -> None:
        """The step is done."""
        self._marks.append((self._begin, self._optimizer, _Mark(self._device)))

    def take(self) -> StepTimes:
        """The times of the steps since the last call; waits for the device."""
        marks, self._marks = self._marks, []
        return StepTimes(
            steps=len(marks),
            seconds=sum(end.seconds_since(begin) for begin, _, end in marks),
            optimizer_seconds=sum(end.seconds_since(optimizer) for _, optimizer, end in marks),
        )


class _Mark:
    """A point in the device's work."""

    def __init__(self, device: torch.device) -> None:
        self._host = time.perf_counter()
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()

    def seconds_since(self, earlier: _Mark) -> float:
        if self._event is None or earlier._event is None:
            return self._host - earlier._host
        self._event.synchronize()
        return earlier._event.elapsed_time(self._event) / 1e3


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes in use now and at most: of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statm = Path("/proc/self/statm")
    if not statm.exists():  # Not on Linux: only the peak is known.
        return peak, peak
    return int(statm.read_text().split()[1]) * resource.getpagesize(), peak
