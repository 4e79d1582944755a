"""Cuts the owned matrices into an ordered sequence of buckets, each one packed exchange."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from normuon.distributed.routes import Owners
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import tiling_of


def form_buckets(
    tasks: Sequence[MatrixTask],
    owners: Owners,
    chosen: Iterable[int],
    *,
    world_size: int,
    bucket_bytes: int,
) -> tuple[tuple[int, ...], ...]:
    """Orders matrices by the time at which their owner would start them, and cuts by bytes.

    A bucket is a slice of time over all owners, so that they compute equally long in each and the
    next gather hides behind the work. Each owner takes its matrices by decreasing FLOPs, those that
    need no gather first: they fill the wait for the first exchange. All owners' matrices are then
    merged by start time and cut where the next one might exceed `bucket_bytes` on some rank.

    Args:
        tasks: the matrices.
        owners: for each, its owners.
        chosen: the indices of those that need messages.
        world_size: ranks of the group.
        bucket_bytes: bound on a rank's buffers in one direction: whole matrices at their owner and
            what each rank sends, or what owners send back and each rank receives. A bucket may
            always take twice what its largest matrix does instead. Less would leave most owners
            idle while a few compute, since buckets follow one another.

    Returns:
        Indices of the matrices of each bucket, those of one batch together; wire and side dtype
        are one within a bucket.
    """
    by_dtypes: dict[tuple[int, int], list[int]] = {}
    for index in chosen:
        task = tasks[index]
        by_dtypes.setdefault((task.wire_bytes, task.side_bytes), []).append(index)
    found: list[tuple[int, ...]] = []
    for indices in by_dtypes.values():
        ordered = _by_start_time(tasks, owners, indices, world_size)
        for bucket in _cut(tasks, owners, ordered, bucket_bytes):
            found.append(tuple(sorted(bucket, key=lambda i: _place(tasks[i]))))
    return tuple(found)


def _place(task: MatrixTask) -> tuple[Any, ...]:
    return (*task.batch_key, task.param, task.index)


def _by_start_time(
    tasks: Sequence[MatrixTask], owners: Owners, chosen: Sequence[int], world_size: int
) -> list[int]:
    def turn(index: int) -> tuple[Any, ...]:
        task = tasks[index]
        needs_gather = not set(owners[index]) <= set(tiling_of(task).whole_ranks)
        return (needs_gather, -task.flops, _place(task))

    clock = [0] * world_size
    starts: dict[int, int] = {}
    turns = sorted(chosen, key=turn)
    for index in turns:
        starts[index] = max(clock[owner] for owner in owners[index])
        for owner in owners[index]:
            clock[owner] = starts[index] + tasks[index].flops
    return sorted(turns, key=starts.__getitem__)  # Stable: equal starts keep their turns.


def _cut(
    tasks: Sequence[MatrixTask], owners: Owners, ordered: Sequence[int], bucket_bytes: int
) -> list[list[int]]:
    buckets: list[list[int]] = []
    there, back = _Fill(), _Fill()
    for index in ordered:
        task, own = tasks[index], owners[index]
        packed_there = _packed_there(task, own)
        packed_back = _packed_back(task, own)
        if not buckets or not (
            there.takes(own, packed_there, bucket_bytes)
            and back.takes(own, packed_back, bucket_bytes)
        ):
            buckets.append([])
            there, back = _Fill(), _Fill()
        buckets[-1].append(index)
        there.add(own, packed_there)
        back.add(own, packed_back)
    return buckets


def _packed_there(task: MatrixTask, owners: tuple[int, ...]) -> tuple[int, int]:
    """Bytes on the way to owners: at each of them, and at most on every other rank."""
    whole = task.matrix_bytes + task.vector_bytes(task.state_dims)
    tiling = tiling_of(task)
    senders = [owner for owner in owners if owner not in tiling.whole_ranks]
    sent = [tiling.gather_bytes(task, tiling.layout.replicas[o]).largest for o in senders]
    return whole, sum(sent)


def _packed_back(task: MatrixTask, owners: tuple[int, ...]) -> tuple[int, int]:
    """Bytes on the way back: what an owner sends at the most, and what any rank receives."""
    table = tiling_of(task).return_bytes(task)
    # An owner for each replica sends to the ranks of its own; together they send it all.
    return table.total // len(owners), table.largest


class _Fill:
    """What the ranks pack in one direction of the bucket being filled, never too low.

    What ranks hold besides what they own is counted as if one rank held the most of each matrix:
    exact for shards of equal size, and a little too much otherwise.
    """

    def __init__(self) -> None:
        self.largest = 0
        self.shared = 0
        self.by_owner: dict[int, int] = {}
        self.busiest = 0

    def takes(self, owners: tuple[int, ...], packed: tuple[int, int], bucket_bytes: int) -> bool:
        at_owner, elsewhere = packed
        busiest = max(self.busiest, *(self.by_owner.get(o, 0) + at_owner for o in owners))
        bound = max(bucket_bytes, 2 * max(self.largest, at_owner))
        return busiest + self.shared + elsewhere <= bound

    def add(self, owners: tuple[int, ...], packed: tuple[int, int]) -> None:
        at_owner, elsewhere = packed
        self.largest = max(self.largest, at_owner)
        self.shared += elsewhere
        for owner in owners:
            self.by_owner[owner] = self.by_owner.get(owner, 0) + at_owner
            self.busiest = max(self.busiest, self.by_owner[owner])
