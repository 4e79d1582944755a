"""Rectangles of a global tensor, and which rank of a group stores which of them."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")
Interval = tuple[int, int]
"""``(start, stop)`` along one dim."""


class Region(NamedTuple):
    """A rectangle of a tensor: dim d spans ``[offsets[d], offsets[d] + shape[d])``.

    Args:
        offsets: first index along every dim.
        shape: extent along every dim; a 0 anywhere makes the region empty.

    Example:
        >>> Region((2, 0), (3, 4)).slices()
        (slice(2, 5, None), slice(0, 4, None))
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Region:
        """The region that is all of a tensor of `shape`."""
        extent = tuple(shape)
        return cls((0,) * len(extent), extent)

    @property
    def numel(self) -> int:
        """How many elements the region holds."""
        return math.prod(self.shape)

    def slices(self) -> tuple[slice, ...]:
        """The index that cuts this region out of the tensor."""
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.shape, strict=True))

    def shifted(self, by: tuple[int, ...]) -> Region:
        """The region moved by an offset along every dim."""
        return Region(tuple(a + b for a, b in zip(self.offsets, by, strict=True)), self.shape)

    def along(self, dims: tuple[int, ...]) -> Region:
        """The projection on `dims`: what of these dims the region spans.

        Example:
            >>> Region((4, 1), (1, 2)).along((1,))
            Region(offsets=(1,), shape=(2,))
        """
        return Region(tuple(self.offsets[d] for d in dims), tuple(self.shape[d] for d in dims))


class Segment(NamedTuple):
    """A stretch of one dim that no rank's shard cuts; bit r of `ranks` says that rank r has it."""

    start: int
    stop: int
    ranks: int


@dataclass(frozen=True, eq=False)
class ShardLayout:
    """What every rank of a group stores of a tensor: some intervals of each dim, and their product.

    Args:
        global_shape: the tensor's whole shape.
        intervals_by_rank: ``[rank][dim]``: the stored intervals, ascending and apart; none where
            the rank stores nothing.
        replicas: for each rank, which copy of the tensor it belongs to.

    Example:
        >>> rows = lambda *intervals: (intervals, ((0, 4),))
        >>> layout = ShardLayout((8, 4), (rows((0, 2), (6, 7)), rows()), (0, 0))
        >>> layout.local_slices(0, Region((6, 0), (1, 4)))
        (slice(2, 3, None), slice(0, 4, None))
    """

    global_shape: tuple[int, ...]
    intervals_by_rank: tuple[tuple[tuple[Interval, ...], ...], ...]
    replicas: tuple[int, ...]
    _memory: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of `compute()`, kept with the layout under `key` after the first call."""
        if key not in self._memory:
            self._memory[key] = compute()
        value: T = self._memory[key]
        return value

    @property
    def world_size(self) -> int:
        """How many ranks the group has, those with empty shards included."""
        return len(self.intervals_by_rank)

    def local_shape(self, rank: int) -> tuple[int, ...]:
        """Shape of the rank's local tensor: the stored intervals of every dim, side by side."""
        return tuple(
            sum(stop - start for start, stop in intervals)
            for intervals in self.intervals_by_rank[rank]
        )

    @cached_property
    def storing_ranks(self) -> tuple[int, ...]:
        """The ranks that store at least one element, in ascending order."""
        return tuple(r for r in range(self.world_size) if math.prod(self.local_shape(r)))

    @cached_property
    def full_replicas(self) -> tuple[int, ...]:
        """The replicas that store the tensor, ascending; just one when nothing is replicated."""
        return tuple(sorted({self.replicas[rank] for rank in self.storing_ranks}))

    @cached_property
    def replica_masks(self) -> dict[int, int]:
        """For each replica, its ranks as bits."""
        masks = dict.fromkeys(self.replicas, 0)
        for rank, replica in enumerate(self.replicas):
            masks[replica] |= 1 << rank
        return masks

    def regions(self, rank: int) -> Iterator[Region]:
        """What `rank` stores, as rectangles of the global tensor."""
        for box in product(*self.intervals_by_rank[rank]):
            yield Region(tuple(a for a, _ in box), tuple(b - a for a, b in box))

    def local_slices(self, rank: int, region: Region) -> tuple[slice, ...]:
        """Where a region that `rank` stores lies in its local tensor."""
        found = []
        intervals_by_dim = self.intervals_by_rank[rank]
        for intervals, first, size in zip(intervals_by_dim, *region, strict=True):
            local = 0
            for start, stop in intervals:
                if start <= first and first + size <= stop:
                    local += first - start
                    break
                local += stop - start
            else:
                raise AssertionError(f"rank {rank} does not store {region}")
            found.append(slice(local, local + size))
        return tuple(found)

    @cached_property
    def _segments(self) -> tuple[tuple[list[int], list[Segment]], ...]:
        """For each dim its segments, and where they start."""
        found = []
        for dim, size in enumerate(self.global_shape):
            ranks_of: dict[Interval, int] = {}
            for rank, intervals_by_dim in enumerate(self.intervals_by_rank):
                for interval in intervals_by_dim[dim]:
                    ranks_of[interval] = ranks_of.get(interval, 0) | 1 << rank
            cuts = sorted({0, size, *(end for interval in ranks_of for end in interval)})
            segments = [Segment(a, b, 0) for a, b in pairwise(cuts)]
            starts = cuts[:-1]
            for (start, stop), ranks in ranks_of.items():
                for index in range(bisect_left(starts, start), bisect_left(starts, stop)):
                    segments[index] = segments[index]._replace(ranks=segments[index].ranks | ranks)
            found.append((starts, segments))
        return tuple(found)

    def segments(self, dim: int, start: int, stop: int) -> tuple[Segment, ...]:
        """How the shards cut `[start, stop)` of a dim, counted from `start`."""
        starts, segments = self._segments[dim]
        return tuple(
            Segment(max(s.start, start) - start, min(s.stop, stop) - start, s.ranks)
            for s in segments[bisect_right(starts, start) - 1 : bisect_left(starts, stop)]
        )


@lru_cache(maxsize=65536)
def ranks_in(mask: int) -> tuple[int, ...]:
    """The ranks whose bits are set, ascending.

    Example:
        >>> ranks_in(0b1011)
        (0, 1, 3)
    """
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return tuple(found)
