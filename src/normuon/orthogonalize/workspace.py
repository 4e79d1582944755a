"""Scratch tensors that one step leaves for the next."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64
"""Bytes: of torch's own allocations on a CPU, and no less than any vector register."""


def is_aligned(x: Tensor) -> bool:
    """Whether every matrix of a batch begins at a multiple of `ALIGNMENT`.

    Example:
        >>> is_aligned(torch.empty(2, 4, 4)), is_aligned(torch.empty(2, 3, 3))
        (True, False)
    """
    starts = (x.storage_offset(), *x.stride()[:-2])
    return all(start * x.element_size() % ALIGNMENT == 0 for start in starts)


class Workspace:
    """Memory by name, grown to the largest tensor ever asked for under it.

    On a CPU, fresh memory of this size comes from the operating system page by page, which costs as
    much as several passes over it; on accelerators PyTorch's allocator already keeps memory, and
    holding it here would keep it from the forward pass, so there every call makes a new tensor.

    Example:
        >>> workspace = Workspace()
        >>> kind = dict(dtype=torch.float32, device=torch.device("cpu"))
        >>> first = workspace.empty("copy", (2, 3), **kind)
        >>> again = workspace.empty("copy", (3, 2), **kind)
        >>> first.data_ptr() == again.data_ptr(), workspace.num_bytes
        (True, 24)
    """

    def __init__(self) -> None:
        self._storage: dict[tuple[str, torch.dtype], Tensor] = {}

    def empty(
        self, name: str, shape: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """An uninitialised contiguous tensor, valid until the next call with the same name.

        Args:
            name: of the memory.
            shape: of the tensor.
            dtype: of the tensor.
            device: of the tensor.
        """
        if device.type != "cpu" or torch.compiler.is_compiling():
            return torch.empty(shape, dtype=dtype, device=device)
        num_elements = math.prod(shape)
        kept = self._storage.get((name, dtype))
        if kept is None or kept.numel() < num_elements:
            kept = torch.empty(num_elements, dtype=dtype, device=device)
            self._storage[name, dtype] = kept
        return kept[:num_elements].view(shape)

    @property
    def num_bytes(self) -> int:
        """Memory held, in bytes."""
        return sum(kept.numel() * kept.element_size() for kept in self._storage.values())

    def clear(self) -> None:
        """Gives the memory back; tensors handed out keep theirs."""
        self._storage.clear()
