"""Copies between the host, where parameters may lie, and the device that computes; none waits.

Host memory is pinned and used again at every step. Copies run on two streams beside the current
one, one in each direction, where the device has streams.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes at which every part of some memory begins."""

Sizes = Sequence[tuple[int, torch.dtype]]
"""Elements and dtypes of flat tensors."""


def bytes_of(sizes: Sizes) -> int:
    """What tensors of these sizes take one after another.

    Example:
        >>> bytes_of([(3, torch.float32), (70, torch.uint8)])
        192
    """
    return sum(_padded(size, dtype) for size, dtype in sizes)


def cut(memory: Tensor, sizes: Sizes) -> list[Tensor]:
    """Flat tensors of some sizes in one piece of memory, which is bytes."""
    starts = accumulate((_padded(size, dtype) for size, dtype in sizes), initial=0)
    return [
        memory[start : start + size * dtype.itemsize].view(dtype)
        for start, (size, dtype) in zip(starts, sizes, strict=False)
    ]


def _padded(size: int, dtype: torch.dtype) -> int:
    return -(-size * dtype.itemsize // ALIGNMENT) * ALIGNMENT


class Leg:
    """Work on a side stream, which begins after what the current stream has been given so far."""

    def __init__(self, streams: Any = None, side: Any = None) -> None:
        """Prepares a leg.

        Args:
            streams: the device's module, such as torch.cuda; None for a device without streams.
            side: the stream.
        """
        self._streams, self._side = streams, side
        self._context: Any = None
        self._end: Any = None

    def __enter__(self) -> Leg:
        """What follows is given to the side stream."""
        if self._side is not None:
            self._side.wait_stream(self._streams.current_stream(self._side.device))
            self._context = self._streams.stream(self._side)
            self._context.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Back to the stream that was current."""
        if self._side is not None:
            self._end = self._side.record_event()
            self._context.__exit__(kind, error, trace)

    def join(self) -> None:
        """Lets the current stream go on only when the leg has ended; the host does not wait."""
        if self._side is not None:
            self._streams.current_stream(self._side.device).wait_event(self._end)


class Loan:
    """Host memory lent for the copies of one bucket or batch.

    Attributes:
        parts: flat host tensors.
    """

    def __init__(self, staging: Staging, name: str, parts: list[Tensor]) -> None:
        self.parts = parts
        self._staging, self._name = staging, name

    def up(self, number: int) -> Tensor:
        """A part on the device, flat; it is not written to again before `give_back`."""
        part = self.parts[number]
        if not self._staging.is_needed:
            return part
        there = torch.empty(part.shape, dtype=part.dtype, device=self._staging.device)
        there.copy_(part, non_blocking=True)
        self._staging.note_copy(self._name)
        return there

    def down_(self, number: int, tensor: Tensor) -> None:
        """Copies a tensor of the device into a part, which is not read before `wait`."""
        self.parts[number].copy_(tensor.reshape(-1), non_blocking=True)
        self._staging.note_copy(self._name)

    def wait(self) -> None:
        """Lets the host go on only when all copies of this memory have ended."""
        self._staging.wait_for(self._name)

    def give_back(self) -> None:
        """Ends the loan: the host neither reads nor writes the parts any more."""
        self._staging.take_back(self._name, self.parts)


class Staging:
    """Copies between the host and one device.

    Where both are the same device `is_needed` is False: a loan is then fresh memory that is on the
    device already, and a leg is no stream of its own.
    """

    def __init__(self, host: torch.device, device: torch.device) -> None:
        """Prepares for copies.

        Args:
            host: where parameters, gradients and state are.
            device: where matrices are orthogonalised and what ranks exchange is.
        """
        self.host, self.device = host, device
        self.is_needed = host != device
        module = torch.get_device_module(device) if self.is_needed else None
        # torch.cpu has streams in name.
        has_streams = device.type != "cpu" and hasattr(module, "Stream")
        self._streams: Any = module if has_streams else None
        self._sides: dict[str, Any] = {}
        self._memory: dict[str, Tensor] = {}
        self._copied: dict[str, Any] = {}

    def going_up(self) -> Leg:
        """Work on the way to the device."""
        return self._leg("up")

    def coming_down(self) -> Leg:
        """Work on the way to the host."""
        return self._leg("down")

    def _leg(self, direction: str) -> Leg:
        if self._streams is None:
            return Leg()
        if direction not in self._sides:
            self._sides[direction] = self._streams.Stream(device=self.device)
        return Leg(self._streams, self._sides[direction])

    def lend(self, name: str, sizes: Sizes) -> Loan:
        """Uninitialised host memory, when earlier copies of the memory of this name have ended.

        Args:
            name: of the memory, which grows to the largest ever asked for under it.
            sizes: of the parts.
        """
        if not self.is_needed:
            fresh = [torch.empty(size, dtype=dtype, device=self.host) for size, dtype in sizes]
            return Loan(self, name, fresh)
        self.wait_for(name)
        needed, kept = bytes_of(sizes), self._memory.get(name)
        if kept is None or len(kept) < needed:
            kept = torch.empty(
                needed,
                dtype=torch.uint8,
                device=self.host,
                pin_memory=self._streams is not None,
            )
            self._memory[name] = kept
        return Loan(self, name, cut(kept, sizes))

    def note_copy(self, name: str) -> None:
        """Notes that a copy of some memory has been given to the current stream."""
        if self._streams is not None:
            stream = self._streams.current_stream(self.device)
            self._copied[name] = stream.record_event(self._copied.get(name))

    def wait_for(self, name: str) -> None:
        """Waits for the last copy of some memory."""
        if name in self._copied:
            self._copied[name].synchronize()

    def take_back(self, name: str, parts: list[Tensor]) -> None:
        """Memory whose loan has ended; `lend` waits for what still copies from it."""

    @property
    def num_bytes(self) -> int:
        """Host memory held, in bytes."""
        return sum(len(memory) for memory in self._memory.values())


class Stagings:
    """One `Staging` for each pair of devices, made when it is first asked for."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.device, torch.device], Staging] = {}

    def between(self, host: torch.device, device: torch.device) -> Staging:
        """The copies between two devices."""
        if (host, device) not in self._made:
            self._made[host, device] = Staging(host, device)
        return self._made[host, device]
