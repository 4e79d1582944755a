"""Where in memory the pieces of a batch begin, as a table that one kernel reads for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Layout = tuple[int, int, int, int]
"""In elements: where a run's first piece begins in its local tensor, how far the next piece, the
next row and the next column are."""


ALIGNMENT = 16
"""Bytes that a device reads at once."""


class Run(Protocol):
    """Pieces that follow one another in a local tensor."""

    count: int

    def layout_in(self, local: Tensor, rows: int, cols: int) -> Layout | None:
        """How they lie there, or None where no strides say it."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """The pieces of a batch in one kind of tensor.

    Args:
        table_K: ``[K]``, int64: addresses in bytes; 0 for a piece without a tensor.
        dtype: of the elements.
        row_stride: elements from row to row, alike in all pieces.
        col_stride: elements from column to column.
        is_aligned: whether all addresses are multiples of `ALIGNMENT`.
    """

    table_K: Tensor
    dtype: torch.dtype
    row_stride: int
    col_stride: int
    is_aligned: bool


class AddressBook:
    """The addresses of runs of equal pieces, found anew when tensors have moved.

    Args:
        runs: the pieces, run by run.
        rows: of each piece.
        cols: of each piece.
    """

    def __init__(self, runs: Sequence[Run], rows: int, cols: int) -> None:
        self._runs, self._rows, self._cols = runs, rows, cols
        self._layouts: dict[object, Layout | None] = {}
        self._found: dict[str, tuple[object, Addresses | None]] = {}

    def of(self, kind: str, tensors: Sequence[Tensor | None]) -> Addresses | None:
        """The addresses of the pieces in some tensors.

        Args:
            kind: a name for what is asked about, such as ``"grad"``.
            tensors: one per run, the local tensors that its pieces are part of; None for none.

        Returns:
            None where the pieces' dtypes or strides differ or no strides describe them, and where
            no run has a tensor.
        """
        key = [None if t is None else (t.data_ptr(), t.stride(), t.dtype) for t in tensors]
        kept_key, found = self._found.get(kind, (None, None))
        # A graph replays with the table of its capture, which must therefore be the graph's own.
        capturing = any(t is not None and t.is_cuda for t in tensors) and (
            torch.cuda.is_current_stream_capturing()
        )
        if kept_key == key and not capturing:
            return found
        found = self._find(tensors)
        if not capturing:
            self._found[kind] = (key, found)
        return found

    def _find(self, tensors: Sequence[Tensor | None]) -> Addresses | None:
        present = next((tensor for tensor in tensors if tensor is not None), None)
        if present is None:
            return None
        addresses: list[int] = []
        strides: set[tuple[int, int]] = set()
        for number, (run, tensor) in enumerate(zip(self._runs, tensors, strict=True)):
            if tensor is None:
                addresses += [0] * run.count
                continue
            layout = self._layout(number, tensor)
            if layout is None or tensor.dtype != present.dtype:
                return None
            first, step, row_stride, col_stride = layout
            strides.add((row_stride, col_stride))
            start, size = tensor.data_ptr(), tensor.element_size()
            addresses += [start + (first + piece * step) * size for piece in range(run.count)]
        if len(strides) != 1:
            return None
        table_K = torch.zeros(len(addresses), dtype=torch.int64, device=present.device)
        # As arguments of a kernel: a copy from the host would be repeated by every replay.
        torch._foreach_add_(list(table_K.unbind()), addresses)
        is_aligned = not any(address % ALIGNMENT for address in addresses)
        return Addresses(table_K, present.dtype, *strides.pop(), is_aligned)

    def _layout(self, number: int, tensor: Tensor) -> Layout | None:
        key = (number, tensor.stride())
        if key not in self._layouts:
            self._layouts[key] = self._runs[number].layout_in(tensor, self._rows, self._cols)
        return self._layouts[key]
