"""Rectangles of a global tensor, and which rank of a group stores which of them.

Knows nothing of DTensor, owners or messages: `mesh_layout` builds layouts from placements, `tiling`
cuts one matrix out of a layout, and `plan` decides who computes.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Region:
    """A rectangle of a global tensor: dim d spans [offsets[d], offsets[d] + shape[d]).

    Args:
        offsets: first index along every dim of the global tensor.
        shape: extent along every dim; a 0 anywhere makes the region empty.

    Raises:
        ValueError: the two differ in length, or a number is negative.

    Example:
        >>> Region((2, 0), (3, 4)).intersect(Region((4, 1), (9, 2)))
        Region(offsets=(4, 1), shape=(1, 2))
    """

    offsets: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.offsets) != len(self.shape):
            raise ValueError(f"offsets {self.offsets} and shape {self.shape} differ in length")
        if self.shape and (min(self.shape) < 0 or min(self.offsets) < 0):
            raise ValueError(f"offsets {self.offsets} and shape {self.shape} must not be negative")

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Region:
        """The region that is all of a tensor of `shape`."""
        extent = tuple(shape)
        return cls((0,) * len(extent), extent)

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last index along every dim."""
        return tuple(o + s for o, s in zip(self.offsets, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """How many elements the region holds."""
        return math.prod(self.shape)

    @property
    def is_empty(self) -> bool:
        """Whether the region holds no element."""
        return 0 in self.shape

    def intersect(self, other: Region) -> Region:
        """The elements in both; an empty region when there are none."""
        starts = tuple(map(max, self.offsets, other.offsets))
        ends = map(min, self.ends, other.ends)
        return Region(starts, tuple(max(0, e - s) for s, e in zip(starts, ends, strict=True)))

    def contains(self, other: Region) -> bool:
        """Whether every element of `other` is in this region."""
        if other.is_empty:
            return True
        inside = zip(self.offsets, other.offsets, other.ends, self.ends, strict=True)
        return all(s <= os and oe <= e for s, os, oe, e in inside)

    def slices(self) -> tuple[slice, ...]:
        """The index that cuts this region out of the global tensor.

        Example:
            >>> Region((2, 0), (3, 4)).slices()
            (slice(2, 5, None), slice(0, 4, None))
        """
        return tuple(slice(o, o + s) for o, s in zip(self.offsets, self.shape, strict=True))

    def relative_to(self, other: Region) -> Region:
        """The same elements, counted from the corner of `other`, which must contain them.

        Raises:
            ValueError: this region is not inside `other`.

        Example:
            >>> Region((4, 1), (1, 2)).relative_to(Region((4, 0), (2, 4)))
            Region(offsets=(0, 1), shape=(1, 2))
        """
        if not other.contains(self) or self.is_empty:
            raise ValueError(f"{self} does not lie in {other}")
        offsets = tuple(a - b for a, b in zip(self.offsets, other.offsets, strict=True))
        return Region(offsets, self.shape)

    def along(self, dims: tuple[int, ...]) -> Region:
        """The projection on `dims`: what of these dims the region spans.

        Example:
            >>> Region((4, 1), (1, 2)).along((1,))
            Region(offsets=(1,), shape=(2,))
        """
        return Region(tuple(self.offsets[d] for d in dims), tuple(self.shape[d] for d in dims))


@dataclass(frozen=True, slots=True)
class Piece:
    """One rectangle of a tiling and the ranks that hold a copy of it, in ascending order."""

    region: Region
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ShardLayout:
    """Where one parameter lives: for every rank of the group, the regions that it stores.

    A rank may store several regions (FSDP over TP with uneven sizes) or none (an empty shard).
    Replicas are several ranks with the same region. Build one layout per (shape, placements) and
    share it among parameters: what is computed about it is kept with it.

    Args:
        global_shape: the parameter's whole shape.
        regions_by_rank: for each rank of the group, its regions in the order of its local tensor.
        replica_of_rank: for each rank, which copy of the parameter it belongs to (its coordinate on
            the replicating mesh axes). The ranks of one replica together store each element once.
            None infers it: the i-th holder of each region is in replica i.

    Example:
        >>> rows = lambda a, b: (Region((a, 0), (b - a, 4)),)
        >>> layout = ShardLayout((3, 4), (rows(0, 2), rows(2, 3), ()))
        >>> layout.storing_ranks, layout.numel_on(0), layout.numel_on(2)
        ((0, 1), 8, 0)
        >>> [(piece.region.shape, piece.ranks) for piece in layout.pieces(Region((1, 0), (2, 4)))]
        [((1, 4), (0,)), ((1, 4), (1,))]
    """

    global_shape: tuple[int, ...]
    regions_by_rank: tuple[tuple[Region, ...], ...]
    replica_of_rank: tuple[int, ...] | None = None
    _memory: dict[Hashable, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False, hash=False
    )

    def __post_init__(self) -> None:
        if not self.regions_by_rank:
            raise ValueError("a layout needs at least one rank")
        replicas = self.replica_of_rank
        if replicas is not None and len(replicas) != len(self.regions_by_rank):
            raise ValueError(
                f"replica_of_rank names {len(replicas)} ranks, "
                f"regions_by_rank {len(self.regions_by_rank)}"
            )

    def __hash__(self) -> int:
        # Hashing thousands of rectangles at every look-up would cost more than planning.
        return self.remember(
            "hash", lambda: hash((self.global_shape, self.regions_by_rank, self.replica_of_rank))
        )

    def remember(self, key: Hashable, compute: Callable[[], T]) -> T:
        """The value of `compute()`, kept with the layout under `key` after the first call."""
        if key not in self._memory:
            self._memory[key] = compute()
        value: T = self._memory[key]
        return value

    @property
    def world_size(self) -> int:
        """How many ranks the group has, those with empty shards included."""
        return len(self.regions_by_rank)

    @property
    def storing_ranks(self) -> tuple[int, ...]:
        """The ranks that store at least one element, in ascending order."""
        return self.remember(
            "storing_ranks",
            lambda: tuple(r for r in range(self.world_size) if self.numel_on(r)),
        )

    def numel_on(self, rank: int) -> int:
        """How many elements `rank` stores."""
        return sum(region.numel for region in self.regions_by_rank[rank])

    @property
    def distinct(self) -> tuple[Piece, ...]:
        """Every distinct stored region with its holders, sorted by offsets."""
        return self.remember("distinct", self._find_distinct)

    def _find_distinct(self) -> tuple[Piece, ...]:
        ranks_of: dict[Region, list[int]] = {}
        for rank, regions in enumerate(self.regions_by_rank):
            for region in regions:
                if not region.is_empty:
                    ranks_of.setdefault(region, []).append(rank)
        ordered = sorted(ranks_of.items(), key=lambda item: (item[0].offsets, item[0].shape))
        return tuple(Piece(region, tuple(ranks)) for region, ranks in ordered)

    def pieces(self, matrix: Region) -> tuple[Piece, ...]:
        """The distinct rectangles that tile `matrix`, each with the ranks that hold a copy.

        Args:
            matrix: a rectangle of the parameter, such as a fused block or one expert.

        Returns:
            Pieces in global coordinates, sorted by offsets; the same object at every call.
        """
        return self.remember(("pieces", matrix), lambda: self._find_pieces(matrix))

    def _find_pieces(self, matrix: Region) -> tuple[Piece, ...]:
        distinct = self.distinct
        if not matrix.shape or matrix == Region.whole(self.global_shape):
            return distinct
        # Sorted by first offset, so only a window can touch the matrix along dim 0.
        starts, reach = self.remember(
            "window",
            lambda: (
                [piece.region.offsets[0] for piece in distinct],
                list(accumulate((piece.region.ends[0] for piece in distinct), max)),
            ),
        )
        low = bisect_right(reach, matrix.offsets[0])
        high = bisect_left(starts, matrix.ends[0])
        found = []
        for piece in distinct[low:high]:
            common = piece.region.intersect(matrix)
            if not common.is_empty:
                found.append(Piece(common, piece.ranks))
        return tuple(sorted(found, key=lambda piece: piece.region.offsets))

    def replica_of(self, rank: int) -> int:
        """Which copy of the parameter `rank` belongs to, given or inferred."""
        return self.replicas[rank]

    @property
    def replicas(self) -> tuple[int, ...]:
        """For each rank, which copy of the parameter it belongs to, given or inferred."""
        if self.replica_of_rank is not None:
            return self.replica_of_rank
        return self.remember("replicas", self._infer_replicas)

    def _infer_replicas(self) -> tuple[int, ...]:
        inferred: dict[int, int] = {}
        counts = {len(piece.ranks) for piece in self.distinct}
        agree = len(counts) <= 1
        for piece in self.distinct:
            for index, rank in enumerate(piece.ranks):
                agree = agree and inferred.setdefault(rank, index) == index
        if not agree:  # Copies overlap irregularly: treat the group as one replica.
            return (0,) * self.world_size
        return tuple(inferred.get(rank, 0) for rank in range(self.world_size))

    @property
    def full_replicas(self) -> tuple[int, ...]:
        """The replicas that store the parameter, ascending; just one when nothing is replicated."""
        return self.remember(
            "full_replicas",
            lambda: tuple(sorted({self.replicas[rank] for rank in self.storing_ranks})),
        )

    def ranks_of_replica(self, replica: int) -> tuple[int, ...]:
        """The ranks of one copy of the parameter, those with empty shards included."""
        return self.remember(
            ("ranks_of_replica", replica),
            lambda: tuple(r for r, index in enumerate(self.replicas) if index == replica),
        )

    def local_regions(self, rank: int) -> tuple[Region, ...]:
        """Where each of the rank's regions lies in its local tensor.

        The local tensor is the stored intervals of every dim, side by side in ascending order, so a
        region's offset along a dim is the length of the intervals before it.

        Example:
            >>> two = (Region((0, 0), (2, 4)), Region((6, 0), (1, 4)))
            >>> ShardLayout((8, 4), (two, ())).local_regions(0)
            (Region(offsets=(0, 0), shape=(2, 4)), Region(offsets=(2, 0), shape=(1, 4)))
        """
        regions = self.regions_by_rank[rank]
        starts_by_dim: list[dict[int, int]] = []
        for dim in range(len(self.global_shape)):
            intervals = sorted({(region.offsets[dim], region.shape[dim]) for region in regions})
            before = accumulate((length for _, length in intervals), initial=0)
            starts_by_dim.append(
                {start: local for (start, _), local in zip(intervals, before, strict=False)}
            )
        return tuple(
            Region(
                tuple(starts_by_dim[dim][start] for dim, start in enumerate(region.offsets)),
                region.shape,
            )
            for region in regions
        )

    def validate(self, name: str) -> None:
        """Check that every replica stores every element exactly once.

        Args:
            name: the parameter, for the message.

        Raises:
            ValueError: a region leaves the tensor, two overlap, or elements are missing.
        """
        problem = self.remember("problem", self._find_problem)
        if problem is not None:
            raise ValueError(
                f"{name} {list(self.global_shape)}: {problem}; pass a layout in which the ranks of "
                f"each replica together store every element exactly once"
            )

    def _find_problem(self) -> str | None:
        whole = Region.whole(self.global_shape)
        for piece in self.distinct:
            if len(piece.region.shape) != len(whole.shape) or not whole.contains(piece.region):
                return f"rank {piece.ranks[0]} stores {piece.region}, which leaves the tensor"
        overlap = _first_overlap([piece.region for piece in self.distinct])
        if overlap is not None:
            return f"{overlap[0]} and {overlap[1]} overlap without being equal"
        stored = sum(piece.region.numel for piece in self.distinct)
        if stored != whole.numel:
            return f"the stored regions cover {stored} of {whole.numel} elements"
        for replica in self.full_replicas if self.replica_of_rank is not None else ():
            ranks = set(self.ranks_of_replica(replica))
            for piece in self.distinct:
                copies = sum(rank in ranks for rank in piece.ranks)
                if copies != 1:
                    return f"replica {replica} stores {piece.region} {copies} times"
        return None


def _first_overlap(regions: list[Region]) -> tuple[Region, Region] | None:
    """Two regions that share an element, or None: a sweep along the dim that is cut finest."""
    if len(regions) < 2:
        return None
    num_dims = len(regions[0].shape)
    sweep_dim = max(range(num_dims), key=lambda d: len({r.offsets[d] for r in regions}))
    active: list[Region] = []
    for region in sorted(regions, key=lambda r: r.offsets[sweep_dim]):
        start = region.offsets[sweep_dim]
        active = [other for other in active if other.ends[sweep_dim] > start]
        for other in active:
            if not other.intersect(region).is_empty:
                return other, region
        active.append(region)
    return None
