"""Momentum in 8 bits: codes from -127 to 127, each times the largest magnitude of its block / 127.

Rounding is stochastic, so that its mean is the value itself and small gradients add up instead of
being lost. The random numbers are hashes of the values that are rounded and of a count of
roundings: nothing is drawn, and no place in memory counts, so that equal values are rounded alike
on every layout and after a restart.

Shapes: K pieces of A lines of B elements; N blocks of a line. ``x_KAB`` are values, in at least
float32, ``codes_KAB`` int8, ``absmax_KAN`` the blocks' largest magnitudes in the values' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from normuon.models.blocks import BLOCK, BlockGrid

LARGEST = 127
"""The largest code. -128 is not used, so that a momentum and its negative have like codes."""

CHUNK_ELEMENTS = (2**24, 2**18)
"""Elements that are rounded at once, on accelerators and on CPUs, where they stay in the cache."""

# The multipliers of Wellons' lowbias32 (https://nullprogram.com/blog/2018/07/31/), as int32.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B - 2**32)
GOLDEN = 0x9E3779B9 - 2**32
"""2^32 over the golden ratio, as int32: spreads successive counts."""


class Blocks:
    """How the elements of lines of equal length fall into blocks."""

    def __init__(self, blocks_of_lines: Sequence[Sequence[int]], *, num_blocks: int) -> None:
        """Notes the blocks.

        Args:
            blocks_of_lines: for each piece the block of each element of a line; for one piece, if
                all are alike.
            num_blocks: N.
        """
        self.num_blocks = num_blocks
        self._length = len(blocks_of_lines[0])
        regular = tuple(index // BLOCK for index in range(self._length))
        has_all = num_blocks == -(-self._length // BLOCK)
        self.is_regular = has_all and all(tuple(blocks) == regular for blocks in blocks_of_lines)
        self._blocks = None if self.is_regular else torch.tensor(blocks_of_lines, device="cpu")
        self._index: Tensor | None = None

    @classmethod
    def regular(cls, length: int) -> Blocks:
        """Blocks that begin with the line, all but the last of `BLOCK` elements."""
        blocks = [index // BLOCK for index in range(length)]
        return cls([blocks], num_blocks=-(-length // BLOCK))

    def pairs(self, x_KAB: Tensor, each_KAN: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Views of elements, and for each a number per block that broadcasts with them."""
        if not self.is_regular:
            return [(x_KAB, each_KAN.gather(2, self._index_like(x_KAB)))]
        whole = self._length // BLOCK
        found = []
        if whole:
            found.append((_in_blocks(x_KAB, whole), each_KAN[..., :whole, None]))
        if self._length % BLOCK:
            found.append((x_KAB[..., whole * BLOCK :], each_KAN[..., whole:]))
        return found

    def absmax(self, x_KAB: Tensor) -> Tensor:
        """``[K, A, N]``: the largest magnitude of each block; infinite where one is NaN."""
        # Infinite, since what a maximum over ranks makes of NaN depends on their order.
        return self._absmax(x_KAB).nan_to_num_(nan=math.inf, posinf=math.inf)

    def _absmax(self, x_KAB: Tensor) -> Tensor:
        magnitude_KAB = x_KAB.abs()
        shape = (*x_KAB.shape[:2], self.num_blocks)
        if not self.is_regular:
            found_KAN = magnitude_KAB.new_zeros(shape)
            index = self._index_like(x_KAB)
            return found_KAN.scatter_reduce_(2, index, magnitude_KAB, "amax")
        whole = self._length // BLOCK
        parts = []
        if whole:
            parts.append(_in_blocks(magnitude_KAB, whole).amax(-1))
        if self._length % BLOCK:
            parts.append(magnitude_KAB[..., whole * BLOCK :].amax(-1, keepdim=True))
        return torch.cat(parts, -1) if parts else magnitude_KAB.new_zeros(shape)

    def _index_like(self, x_KAB: Tensor) -> Tensor:
        assert self._blocks is not None
        if self._index is None or self._index.device != x_KAB.device:
            self._index = self._blocks.to(x_KAB.device)
        index = self._index[:, None, :]
        return index.expand(x_KAB.shape)


def _in_blocks(x_KAB: Tensor, whole: int) -> Tensor:
    """The first blocks of every line, ``[K, A, whole, BLOCK]``."""
    return x_KAB[..., : whole * BLOCK].view(*x_KAB.shape[:2], whole, BLOCK)


def salts(roundings_K: Tensor) -> Tensor:
    """``[K]``, int32: what a piece's values are hashed with, from its count of roundings."""
    mixed_K = roundings_K * GOLDEN
    mixed_K ^= mixed_K >> 16
    mixed_K *= MULTIPLIERS[0]
    mixed_K ^= mixed_K >> 15
    return mixed_K


def round_stochastically_(y: Tensor, salt: Tensor) -> Tensor:
    """Rounds numbers from 0 to 127 up or down; the mean over salts is the number, to 2^-17.

    A whole number stays as it is.

    Args:
        y: float32, at most 127; written to.
        salt: int32, broadcasts with it.

    Example:
        >>> salt = salts(torch.arange(10_000, dtype=torch.int32))
        >>> rounded = round_stochastically_(torch.full((10_000,), 2.25), salt)
        >>> rounded.unique().tolist(), round(float(rounded.mean()), 2)
        ([2.0, 3.0], 2.25)
    """
    hashed = y.view(torch.int32) ^ salt
    hashed *= MULTIPLIERS[0]
    hashed ^= hashed >> 15
    hashed *= MULTIPLIERS[1]
    hashed >>= 16  # 16 bits, with which no sum below is rounded up to the next whole number.
    return y.add_(hashed, alpha=2**-16).add_(0.5 + 2**-17).floor_()


def encode_(
    codes_KAB: Tensor, x_KAB: Tensor, absmax_KAN: Tensor, *, blocks: Blocks, salt_K: Tensor | None
) -> None:
    """Writes the codes of values.

    Args:
        codes_KAB: written to.
        x_KAB: the values.
        absmax_KAN: at least each block's largest magnitude. A block whose largest is not finite
            decodes to NaN.
        blocks: how elements fall into blocks.
        salt_K: from `salts`; None: to the nearest.
    """
    y_KAB = x_KAB.abs()
    divisor_KAN = absmax_KAN + (absmax_KAN == 0)
    for magnitudes, divisors in blocks.pairs(y_KAB, divisor_KAN):
        magnitudes.div_(divisors)  # Exactly 1 at most.
    y_KAB.mul_(LARGEST)
    if salt_K is None:
        y_KAB.round_()
    else:
        y_KAB = round_stochastically_(y_KAB.to(torch.float32), salt_K[:, None, None])
    codes_KAB.copy_(y_KAB.copysign_(x_KAB))


def encode_in_chunks_(
    codes_KAB: Tensor, x_KAB: Tensor, absmax_KAN: Tensor, *, blocks: Blocks, salt_K: Tensor
) -> None:
    """`encode_`, some lines at a time: its scratch is 12 bytes for each element of a chunk."""
    pieces, lines, length = x_KAB.shape
    # An index of blocks is for all pieces at once.
    num_pieces = 1 if blocks.is_regular else max(1, pieces)
    allowed = CHUNK_ELEMENTS[x_KAB.device.type == "cpu"] // max(1, length * num_pieces)
    num_lines = max(1, min(lines, allowed))
    if blocks.is_regular:
        num_pieces = max(1, allowed // num_lines)
    for k in range(0, pieces, num_pieces):
        for a in range(0, lines, num_lines):
            part = (slice(k, k + num_pieces), slice(a, a + num_lines))
            encode_(
                codes_KAB[part],
                x_KAB[part],
                absmax_KAN[part],
                blocks=blocks,
                salt_K=salt_K[part[0]],
            )


def decode_(x_KAB: Tensor, codes_KAB: Tensor, absmax_KAN: Tensor, *, blocks: Blocks) -> Tensor:
    """Writes the values of codes, ``code absmax / 127``.

    Returns:
        ``x_KAB``.
    """
    x_KAB.copy_(codes_KAB)
    for values, units in blocks.pairs(x_KAB, absmax_KAN / LARGEST):
        values.mul_(units)
    return x_KAB


def encoded(whole: Tensor, grid: BlockGrid) -> tuple[Tensor, Tensor]:
    """A whole parameter's momentum as codes, rounded to the nearest, and its blocks' maxima.

    Args:
        whole: of the parameter's shape, in at least float32.
        grid: its blocks.

    Example:
        >>> from normuon.models.blocks import block_grid
        >>> from normuon.models.view import MatrixView
        >>> grid = block_grid(MatrixView.linear(), (2, 3))
        >>> encoded(torch.tensor([[1.0, -0.5, 0.0], [0.0, 0.0, 0.0]]), grid)
        (tensor([[127, -64,   0],
                [  0,   0,   0]], dtype=torch.int8), tensor([[1.],
                [0.]]))
    """
    codes = torch.empty_like(whole, dtype=torch.int8)
    blocks = Blocks([grid.blocks], num_blocks=grid.num_blocks)
    x_1AB = _lines(whole, grid)
    absmax_1AN = blocks.absmax(x_1AB)
    codes_1AB = torch.empty(x_1AB.shape, dtype=torch.int8, device=whole.device)
    encode_(codes_1AB, x_1AB, absmax_1AN, blocks=blocks, salt_K=None)
    moved = codes.permute(*grid.line_dims, *grid.block_dims)
    moved.copy_(codes_1AB.view(moved.shape))
    return codes, absmax_1AN.view(grid.shape)


def decoded(codes: Tensor, absmax: Tensor, grid: BlockGrid) -> Tensor:
    """The whole momentum whose codes and maxima `encoded` gave.

    Args:
        codes: int8, of the parameter's shape.
        absmax: of the grid's shape.
        grid: the parameter's blocks.
    """
    blocks = Blocks([grid.blocks], num_blocks=grid.num_blocks)
    codes_1AB = _lines(codes, grid)
    absmax_1AN = absmax.reshape(1, -1, grid.num_blocks)
    x_1AB = torch.empty(codes_1AB.shape, dtype=absmax.dtype, device=codes.device)
    decode_(x_1AB, codes_1AB, absmax_1AN, blocks=blocks)
    whole = torch.empty_like(codes, dtype=absmax.dtype)
    moved = whole.permute(*grid.line_dims, *grid.block_dims)
    moved.copy_(x_1AB.view(moved.shape))
    return whole


def _lines(whole: Tensor, grid: BlockGrid) -> Tensor:
    """``[1, A, B]``."""
    moved = whole.permute(*grid.line_dims, *grid.block_dims)
    lines = moved.shape[: len(grid.line_dims)].numel()
    return moved.reshape(1, lines, len(grid.blocks))
