"""Cuts the owned matrices into an ordered sequence of buckets, each one packed exchange.

A bucket is a slice of time over all owners, so that they compute equally long in each and the next
gather hides behind the work. Leaves ownership to `ownership`, byte totals to `traffic`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from normuon.distributed.cost import SCALAR_BYTES
from normuon.distributed.routes import owner_for
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import tiling_of


def form_buckets(
    tasks: Sequence[MatrixTask],
    owners: Sequence[Sequence[int]],
    flops: Sequence[int],
    *,
    world_size: int,
    bucket_bytes: int,
) -> tuple[tuple[int, ...], ...]:
    """Order the matrices by the time at which their owner would start them, and cut by bytes.

    Each owner takes its matrices by decreasing FLOPs, equal shapes and keys together, those that
    need no gather first: they fill the wait for the first exchange. All owners' matrices are then
    merged by start time and cut where the next one would exceed `bucket_bytes` on some rank. What
    counts is a rank's buffers of one direction: on the way to owners, whole matrices on them and
    what each rank sends; on the way back, what owners send, a copy for every replica, and what each
    rank receives; v, flags and scales too.

    Args:
        tasks: the matrices.
        owners: for each, its owners.
        flops: for each, its FLOPs.
        world_size: ranks of the group.
        bucket_bytes: bound on any rank and direction. A bucket may always take twice what its
            largest matrix does instead: on the way there, one on its owner and as much in pieces
            that the owner sends. Less would leave most owners idle while a few compute, since
            buckets follow one another.

    Returns:
        Indices of the matrices of each bucket; wire and neuron dtype are one within a bucket.
    """
    buckets: list[tuple[int, ...]] = []
    dtypes = dict.fromkeys((task.wire_dtype, task.neuron_dtype) for task in tasks)
    for dtype in dtypes:
        chosen = [
            i for i, task in enumerate(tasks) if (task.wire_dtype, task.neuron_dtype) == dtype
        ]
        ordered = _by_start_time(tasks, owners, flops, chosen, world_size)
        buckets.extend(_cut(tasks, owners, ordered, world_size, bucket_bytes))
    return tuple(buckets)


def _by_start_time(
    tasks: Sequence[MatrixTask],
    owners: Sequence[Sequence[int]],
    flops: Sequence[int],
    chosen: Sequence[int],
    world_size: int,
) -> list[int]:
    def turn(index: int) -> tuple[bool, bool, int, tuple[int, int, str, str], str, int]:
        task = tasks[index]
        whole_ranks = set(tiling_of(task).whole_ranks) if len(owners[index]) < world_size else None
        needs_gather = whole_ranks is not None and not whole_ranks.issuperset(owners[index])
        is_everywhere = len(owners[index]) == world_size
        return (
            needs_gather,
            not is_everywhere,
            -flops[index],
            task.batch_key,
            task.name,
            task.index,
        )

    everywhere = 0  # FLOPs that every rank spends first; kept apart so as not to touch all clocks.
    clock = [0] * world_size
    starts: dict[int, int] = {}
    ordered = sorted(chosen, key=turn)
    for index in ordered:
        if len(owners[index]) == world_size:
            starts[index] = everywhere
            everywhere += flops[index]
            continue
        start = max(clock[owner] for owner in owners[index])
        starts[index] = everywhere + start
        for owner in owners[index]:
            clock[owner] = start + flops[index]
    turns = {index: position for position, index in enumerate(ordered)}
    return sorted(chosen, key=lambda index: (starts[index], turns[index]))


def _cut(
    tasks: Sequence[MatrixTask],
    owners: Sequence[Sequence[int]],
    ordered: Sequence[int],
    world_size: int,
    bucket_bytes: int,
) -> list[tuple[int, ...]]:
    buckets: list[tuple[int, ...]] = []
    indices: list[int] = []
    gathers, returns = _Fill(world_size), _Fill(world_size)
    for index in ordered:
        there, back = _packed_there(tasks[index], owners[index], world_size), _Packed()
        if len(owners[index]) < world_size:  # Where everyone computes, nothing travels back.
            by_rank = returned_bytes(tasks[index], owners[index])
            back = _Packed(by_rank, largest=max(by_rank.values(), default=0))
        if indices and (
            gathers.exceeds_with(there, bucket_bytes) or returns.exceeds_with(back, bucket_bytes)
        ):
            buckets.append(tuple(indices))
            indices, gathers, returns = [], _Fill(world_size), _Fill(world_size)
        indices.append(index)
        gathers.add(there)
        returns.add(back)
    if indices:
        buckets.append(tuple(indices))
    return buckets


def _packed_there(task: MatrixTask, owners: Sequence[int], world_size: int) -> _Packed:
    whole = whole_bytes(task)
    if len(owners) == world_size:
        return _Packed(everywhere=whole, largest=whole)
    return _Packed(packed_bytes(task, owners), largest=whole)


@dataclass(frozen=True, slots=True)
class _Packed:
    """Buffers of one matrix in one direction: by rank, or the same on every rank.

    ``largest`` is what it takes on the rank where it takes most, pieces sent not counted.
    """

    by_rank: Mapping[int, int] = field(default_factory=dict)
    everywhere: int = 0
    largest: int = 0


class _Fill:
    """Packed bytes of the bucket being filled, by rank, in one direction."""

    def __init__(self, world_size: int) -> None:
        self.largest = 0
        self.everywhere = 0
        self.by_rank = [0] * world_size
        self.busiest = 0

    def exceeds_with(self, packed: _Packed, bucket_bytes: int) -> bool:
        touched = (self.by_rank[rank] + added for rank, added in packed.by_rank.items())
        busiest = max(self.busiest, max(touched, default=0))
        bound = max(bucket_bytes, 2 * max(self.largest, packed.largest))
        return self.everywhere + packed.everywhere + busiest > bound

    def add(self, packed: _Packed) -> None:
        self.largest = max(self.largest, packed.largest)
        self.everywhere += packed.everywhere
        for rank, added in packed.by_rank.items():
            self.by_rank[rank] += added
            self.busiest = max(self.busiest, self.by_rank[rank])


def whole_bytes(task: MatrixTask) -> int:
    """Bytes of one whole matrix in its owner's gather buffer, with v and the pieces' flags."""
    return (
        task.numel * task.wire_bytes
        + task.num_neurons * task.neuron_bytes
        + len(tiling_of(task).pieces) * SCALAR_BYTES
    )


def packed_bytes(task: MatrixTask, owners: Sequence[int]) -> dict[int, int]:
    """Bytes of one matrix in each rank's gather buffers: whole at owners, pieces at senders.

    Args:
        task: the matrix.
        owners: its owners.

    Returns:
        Bytes by rank; ranks that neither own nor send are absent.
    """
    tiling = tiling_of(task)
    sizes = {"wire_bytes": task.wire_bytes, "neuron_bytes": task.neuron_bytes}
    added: dict[int, int] = {}
    for owner in owners:
        if owner in tiling.whole_ranks:
            continue
        table = tiling.gather_bytes(tiling.layout.replica_of(owner), **sizes)
        sent = dict(table.by_rank)
        for rank, correction in tiling.gather_corrections(owner, **sizes).items():
            sent[rank] += correction
        if not added:
            added = sent
            continue
        for rank, num_bytes in sent.items():
            added[rank] = added.get(rank, 0) + num_bytes
    for owner in owners:
        added[owner] = added.get(owner, 0) + whole_bytes(task)
    return added


def returned_bytes(task: MatrixTask, owners: Sequence[int]) -> dict[int, int]:
    """Bytes of one matrix in each rank's return buffers: sent by owners, received by the rest.

    Args:
        task: the matrix.
        owners: its owners.

    Returns:
        Bytes by rank; ranks that neither own nor store any of it are absent.
    """
    tiling = tiling_of(task)
    table = tiling.return_bytes(wire_bytes=task.wire_bytes, neuron_bytes=task.neuron_bytes)
    if len(owners) == 1:
        (owner,) = owners
        own = table.by_rank.get(owner, 0)
        return {**table.by_rank, owner: table.total - own}
    added: dict[int, int] = {}
    for rank, num_bytes in table.by_rank.items():
        owner = owner_for(tiling, owners, rank)
        if owner != rank:
            added[owner] = added.get(owner, 0) + num_bytes
            added[rank] = added.get(rank, 0) + num_bytes
    return added
