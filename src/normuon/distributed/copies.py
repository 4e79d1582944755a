"""Many small copies between flat tensors as few large strided ones, laid out once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Elements of a flat tensor: where the first lies, and how the others follow."""

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The elements, as a view."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.offset)


def contiguous(offset: int, shape: Sequence[int]) -> Block:
    """A block without gaps.

    Example:
        >>> contiguous(7, (2, 3))
        Block(offset=7, shape=(2, 3), strides=(3, 1))
    """
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return Block(offset, tuple(shape), tuple(strides))


FlatTensors = Sequence[Tensor] | Mapping[int, Tensor]
"""Flat tensors by place."""


class Copy(NamedTuple):
    """A copy from a block of one tensor into a block of another, both named by their places."""

    source: int
    taken: Block
    target: int
    put: Block


class CopyPlan:
    """Copies from some flat tensors into others, in one multi-tensor operation.

    Args:
        copies: in an order in which those that continue one another follow one another.

    Example:
        >>> rows = [Copy(0, contiguous(2 * i, (2,)), 0, contiguous(3 * i, (2,))) for i in range(3)]
        >>> plan = CopyPlan(rows)
        >>> target = torch.zeros(9)
        >>> plan.run_([torch.arange(6.0)], [target])
        >>> plan.num_blocks, target.tolist()
        (1, [0.0, 1.0, 0.0, 2.0, 3.0, 0.0, 4.0, 5.0, 0.0])
    """

    def __init__(self, copies: Iterable[Copy]) -> None:
        merged = [_simplified(copy) for copy in copies]
        while True:
            fewer = _merged(merged)
            if len(fewer) == len(merged):
                break
            merged = fewer
        self._copies = merged

    @property
    def num_blocks(self) -> int:
        """Strided copies that are left."""
        return len(self._copies)

    def run_(
        self,
        sources: FlatTensors,
        targets: FlatTensors,
        *,
        source: int | None = None,
        target: int | None = None,
    ) -> None:
        """Copies, converting dtypes.

        Args:
            sources: flat tensors.
            targets: flat tensors, written to.
            source: copies from this tensor only.
            target: copies into this tensor only.
        """
        copies = [
            copy
            for copy in self._copies
            if source in (None, copy.source) and target in (None, copy.target)
        ]
        if copies:
            torch._foreach_copy_(
                [copy.put.of(targets[copy.target]) for copy in copies],
                [copy.taken.of(sources[copy.source]) for copy in copies],
            )


def _merged(copies: Sequence[Copy]) -> list[Copy]:
    """Neighbours that repeat one another at constant distances, as one copy with a dim more."""
    found: list[Copy] = []
    index = 0
    while index < len(copies):
        first = copies[index]
        steps: tuple[int, int] | None = None
        count = 1
        while index + count < len(copies):
            last, following = copies[index + count - 1], copies[index + count]
            step = _distance(last, following)
            # Strides cannot be negative.
            if step is None or min(step) < 0 or (steps is not None and step != steps):
                break
            steps = step
            count += 1
        if steps is None:
            found.append(first)
        else:
            taken = _repeated(first.taken, count, steps[0])
            put = _repeated(first.put, count, steps[1])
            found.append(_simplified(Copy(first.source, taken, first.target, put)))
        index += count
    return found


def _distance(one: Copy, two: Copy) -> tuple[int, int] | None:
    """How far apart two copies of one form lie, or None if their forms differ."""
    if (one.source, one.target, one.taken[1:], one.put[1:]) != (
        two.source,
        two.target,
        two.taken[1:],
        two.put[1:],
    ):
        return None
    return two.taken.offset - one.taken.offset, two.put.offset - one.put.offset


def _repeated(block: Block, count: int, step: int) -> Block:
    return Block(block.offset, (count, *block.shape), (step, *block.strides))


def _simplified(copy: Copy) -> Copy:
    """The same copy without dims of size 1, and with neighbouring dims joined where both allow."""
    dims: list[tuple[int, int, int]] = []
    zipped = zip(copy.taken.shape, copy.taken.strides, copy.put.strides, strict=True)
    for size, taken, put in zipped:
        if size == 1:
            continue
        if dims and dims[-1][1] == taken * size and dims[-1][2] == put * size:
            dims[-1] = (dims[-1][0] * size, taken, put)
        else:
            dims.append((size, taken, put))
    shape = tuple(size for size, _, _ in dims)
    return Copy(
        copy.source,
        Block(copy.taken.offset, shape, tuple(taken for _, taken, _ in dims)),
        copy.target,
        Block(copy.put.offset, shape, tuple(put for _, _, put in dims)),
    )
