"""A mesh shape and placements, given as plain tuples, as a `ShardLayout`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from typing import Literal, TypeAlias

from normuon.distributed.regions import Interval, ShardLayout

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
