"""Blocks of neighbouring elements of a parameter: 8-bit momentum has one scale for each.

Blocks depend on shapes alone, never on how a parameter is sharded. A parameter is cut into lines,
and every line into blocks of `BLOCK` elements, of which the last may have fewer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from normuon.models.view import MatrixView

BLOCK = 128
"""Elements of a block: what FP8 training scales together, and a divisor of most models' widths."""


@dataclass(frozen=True, slots=True)
class BlockGrid:
    """The lines and blocks of one parameter.

    Lines are a matrix's rows, and blocks follow its columns; the other way round in a matrix stored
    ``[in, out]``. So blocks run along the last dim of memory, and sharding the first dim, as
    FSDP2 does, never cuts one. No block spans two matrices.

    Args:
        line_dims: the parameter's dims that count lines.
        block_dims: the others, which blocks run along, flattened in order.
        blocks: for each element of a line its block, ascending.
        shape: one entry for each block of the parameter: its lines' dims, then the blocks.
        along_rows: whether blocks run along a matrix's rows dim.
    """

    line_dims: tuple[int, ...]
    block_dims: tuple[int, ...]
    blocks: tuple[int, ...]
    shape: tuple[int, ...]
    along_rows: bool

    @property
    def num_blocks(self) -> int:
        """Blocks of a line."""
        return self.shape[-1]


def block_grid(view: MatrixView, shape: tuple[int, ...]) -> BlockGrid:
    """The blocks of a parameter of this shape.

    Args:
        view: how it becomes matrices.
        shape: whole, not a shard's.

    Example:
        >>> grid = block_grid(MatrixView.linear(), (3, 300))
        >>> grid.line_dims, grid.shape, grid.blocks[127:129]
        ((0,), (3, 3), (0, 1))
        >>> block_grid(MatrixView.fused(192, 64, neuron_dim=1), (5, 256)).shape
        (5, 3)
    """
    if torch.compiler.is_compiling():
        return _grid(view, shape)  # A traced step runs this once, and caches confuse it.
    return _remembered_grid(view, shape)


def _grid(view: MatrixView, shape: tuple[int, ...]) -> BlockGrid:
    first = view.batch_dims
    line_dims: tuple[int, ...]
    block_dims: tuple[int, ...]
    along_rows = view.neuron_dim == first + 1 and len(shape) == first + 2
    if along_rows:
        line_dims, block_dims = tuple(range(first + 1)), (view.neuron_dim,)
        sizes = [part.m for part in view.parts(shape) for _ in range(part.heads)]
    else:
        line_dims = (*range(first), view.neuron_dim)
        block_dims = view.matrix_dims(len(shape), -1)
        sizes = [math.prod(shape[dim] for dim in block_dims)]
    blocks: list[int] = []
    num_blocks = 0
    for size in sizes:
        blocks += [num_blocks + index // BLOCK for index in range(size)]
        num_blocks += -(-size // BLOCK)
    lines = tuple(shape[dim] for dim in line_dims)
    return BlockGrid(line_dims, block_dims, tuple(blocks), (*lines, num_blocks), along_rows)


_remembered_grid = lru_cache(maxsize=4096)(_grid)


def blocks_of_region(
    grid: BlockGrid, shape: Sequence[int], offsets: Sequence[int], extent: Sequence[int]
) -> tuple[int, ...]:
    """The blocks of the elements of each line of a rectangle, in the order in which they lie.

    Args:
        grid: of the parameter.
        shape: the parameter's.
        offsets: where the rectangle begins in the whole parameter.
        extent: what it spans.

    Example:
        >>> grid = block_grid(MatrixView.linear(), (3, 300))
        >>> blocks_of_region(grid, (3, 300), (0, 126), (3, 4))
        (0, 0, 1, 1)
    """
    found = [0]
    for dim in grid.block_dims:
        span = range(offsets[dim], offsets[dim] + extent[dim])
        found = [index * shape[dim] + place for index in found for place in span]
    return tuple(grid.blocks[index] for index in found)
