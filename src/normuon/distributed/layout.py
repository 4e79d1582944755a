"""Which rank of a group stores which rectangle of a tensor: read from a mesh and placements."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise, product
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

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


Placement: TypeAlias = (
    tuple[Literal["replicate"]]
    | tuple[Literal["shard"], int]
    | tuple[Literal["strided_shard"], int, int]
)
StridedOrder: TypeAlias = Literal["fsdp2", "dtensor"]
Intervals: TypeAlias = tuple[Interval, ...]


def layout_from_placements(
    global_shape: Sequence[int],
    *,
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    strided_order: StridedOrder = "fsdp2",
) -> ShardLayout:
    """The layout of a parameter on a mesh; ranks are numbered row-major over the mesh.

    A shard axis of size k splits like `torch.chunk`: ceil(size / k) indices per coordinate, the
    last ones fewer or none. `strided_shard` is what FSDP2 over TP leaves on the FSDP axis. FSDP2
    splits TP's chunk, so the tensor is cut right to left; DTensor's own reading of `_StridedShard`
    cuts it left to right, taking a part of each of `split_factor` chunks. The two agree when sizes
    divide evenly and may differ when they do not: the local tensors of `fully_shard` follow FSDP2
    even where DTensor's metadata says otherwise (17 rows on a 4 x 2 mesh, measured on torch 2.13).

    Args:
        global_shape: the parameter's whole shape.
        mesh_shape: size of every mesh axis.
        placements: one per mesh axis; negative dims count from the end.
        strided_order: "fsdp2" for parameters of `fully_shard`, "dtensor" for tensors that were
            distributed with `_StridedShard` itself. A strided axis whose split factor is not the
            product of the later axes on its dim was not made by FSDP2 and is read as DTensor does.

    Returns:
        The shared layout: equal arguments give the same object.

    Raises:
        ValueError: mesh and placements differ in length, or a placement is not one of the three.

    Example:
        >>> layout = layout_from_placements((5, 2), mesh_shape=(4,), placements=[("shard", 0)])
        >>> [layout.local_shape(rank) for rank in range(4)]
        [(2, 2), (2, 2), (1, 2), (0, 2)]
        >>> hsdp = [("replicate",), ("shard", 0)]
        >>> layout_from_placements((4, 2), mesh_shape=(2, 2), placements=hsdp).replicas
        (0, 0, 1, 1)
    """
    if len(mesh_shape) != len(placements):
        raise ValueError(f"mesh {list(mesh_shape)} has {len(mesh_shape)} axes, but {placements=}")
    if strided_order not in ("fsdp2", "dtensor"):
        raise ValueError(f"strided_order must be 'fsdp2' or 'dtensor', not {strided_order!r}")
    shape = tuple(int(size) for size in global_shape)
    normalised = tuple(_normalise(placement, len(shape)) for placement in placements)
    return _layout(shape, tuple(int(size) for size in mesh_shape), normalised, strided_order)


def _normalise(placement: Placement, num_dims: int) -> Placement:
    kind, *numbers = placement
    expected = {"replicate": 0, "shard": 1, "strided_shard": 2}.get(kind)
    if expected is None or len(numbers) != expected:
        raise ValueError(
            f"placement {placement!r}: pass ('replicate',), ('shard', dim) or "
            f"('strided_shard', dim, split_factor)"
        )
    if kind == "replicate":
        return ("replicate",)
    dim = int(numbers[0])
    if not -num_dims <= dim < num_dims:
        raise ValueError(f"placement {placement!r}: the parameter has {num_dims} dims")
    dim %= num_dims
    if kind == "shard":
        return ("shard", dim)
    if int(numbers[1]) < 1:
        raise ValueError(f"placement {placement!r}: split_factor must be at least 1")
    return ("strided_shard", dim, int(numbers[1]))


@lru_cache(maxsize=1024)
def _layout(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    strided_order: StridedOrder,
) -> ShardLayout:
    # Each cut is (mesh axis, split factor): 1 cuts the whole list, more cuts each of its chunks.
    cuts_by_dim = [
        _cuts_of_dim(dim, mesh_shape, placements, strided_order) for dim in range(len(shape))
    ]
    replica_axes = [axis for axis, placement in enumerate(placements) if len(placement) == 1]
    # Equal tuples are one object: a thousand ranks along a replicated dim share theirs.
    known: dict[Intervals, Intervals] = {}
    intervals_by_rank = []
    replicas = []
    for coordinate in product(*map(range, mesh_shape)):
        stored = (
            _stored_intervals(size, cuts_by_dim[dim], mesh_shape, coordinate)
            for dim, size in enumerate(shape)
        )
        intervals_by_rank.append(tuple(known.setdefault(found, found) for found in stored))
        replica = 0
        for axis in replica_axes:
            replica = replica * mesh_shape[axis] + coordinate[axis]
        replicas.append(replica)
    return ShardLayout(shape, tuple(intervals_by_rank), tuple(replicas))


def _cuts_of_dim(
    dim: int,
    mesh_shape: tuple[int, ...],
    placements: tuple[Placement, ...],
    strided_order: StridedOrder,
) -> tuple[tuple[int, int], ...]:
    """In which order the mesh axes cut a dim, each with the factor it is interleaved by."""
    cuts: list[tuple[int, int]] = []
    later_shards = 1
    for axis in reversed(range(len(mesh_shape))):
        placement = placements[axis]
        if len(placement) == 1 or placement[1] != dim:
            continue
        split_factor = placement[2] if len(placement) == 3 else 1
        if len(placement) == 3 and strided_order == "fsdp2" and split_factor == later_shards:
            cuts.append((axis, 1))  # FSDP2: after every axis to its right.
        else:
            cuts.insert(0, (axis, split_factor))
        later_shards *= mesh_shape[axis]
    return tuple(cuts)


def _stored_intervals(
    size: int,
    cuts: tuple[tuple[int, int], ...],
    mesh_shape: tuple[int, ...],
    coordinate: tuple[int, ...],
) -> Intervals:
    """The [start, end) intervals of a dim that a mesh coordinate stores, touching ones joined."""
    intervals: list[tuple[int, int]] = [(0, size)] if size else []
    for axis, split_factor in cuts:
        kept: list[tuple[int, int]] = []
        for part in range(split_factor):
            chunk = _chunk(intervals, split_factor, part)
            kept.extend(_chunk(chunk, mesh_shape[axis], coordinate[axis]))
        intervals = kept
    joined: list[tuple[int, int]] = []
    for start, end in intervals:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


def _chunk(intervals: list[tuple[int, int]], num_chunks: int, index: int) -> list[tuple[int, int]]:
    """The `index`-th chunk, as `torch.chunk` cuts, of the indices that the intervals list."""
    total = sum(end - start for start, end in intervals)
    chunk_size = -(-total // num_chunks)
    low, high = chunk_size * index, min(chunk_size * (index + 1), total)
    kept = []
    seen = 0
    for start, end in intervals:
        first, last = max(low, seen), min(high, seen + end - start)
        if first < last:
            kept.append((start + first - seen, start + last - seen))
        seen += end - start
    return kept
