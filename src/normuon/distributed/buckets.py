"""Cuts the owned matrices into an ordered sequence of buckets, each one packed exchange.

A bucket is a slice of time over all owners, so that they compute equally long in each and the next
gather hides behind the work. Leaves ownership to `ownership`, byte totals to `traffic`.
"""

from __future__ import annotations

from collections.abc import Sequence

from normuon.distributed.cost import SCALAR_BYTES
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
    counts is the gather: whole matrices on their owner, plus what a rank sends, v and flags too.

    Args:
        tasks: the matrices.
        owners: for each, its owners.
        flops: for each, its FLOPs.
        world_size: ranks of the group.
        bucket_bytes: bound on any rank. A bucket may always take twice its largest matrix instead:
            one on its owner, and as much in pieces that the owner sends. Less would leave most
            owners idle while a few compute, since buckets follow one another.

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
    fill = _Fill(world_size)
    for index in ordered:
        is_everywhere = len(owners[index]) == world_size
        whole = whole_bytes(tasks[index])
        added = {} if is_everywhere else packed_bytes(tasks[index], owners[index])
        busiest = fill.busiest_with(added, whole if is_everywhere else 0)
        if fill.indices and busiest > max(bucket_bytes, 2 * max(fill.largest, whole)):
            buckets.append(tuple(fill.indices))
            fill = _Fill(world_size)
        fill.add(index, added, whole=whole, is_everywhere=is_everywhere)
    if fill.indices:
        buckets.append(tuple(fill.indices))
    return buckets


class _Fill:
    """Packed bytes of the bucket being filled, by rank."""

    def __init__(self, world_size: int) -> None:
        self.indices: list[int] = []
        self.largest = 0
        self.everywhere = 0
        self.by_rank = [0] * world_size
        self.busiest = 0

    def busiest_with(self, added: dict[int, int], added_everywhere: int) -> int:
        touched = (self.by_rank[rank] + num_bytes for rank, num_bytes in added.items())
        return self.everywhere + added_everywhere + max(self.busiest, max(touched, default=0))

    def add(self, index: int, added: dict[int, int], *, whole: int, is_everywhere: bool) -> None:
        self.indices.append(index)
        self.largest = max(self.largest, whole)
        if is_everywhere:
            self.everywhere += whole
        for rank, num_bytes in added.items():
            self.by_rank[rank] += num_bytes
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
