"""The plan of a distributed step: who computes what, in which order, and which piece goes where."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from normuon.distributed.assignment import Assignment, Balance, assign_owners
from normuon.distributed.balance import makespan_bound
from normuon.distributed.cost import CostModel
from normuon.distributed.layout import ShardLayout
from normuon.distributed.task import MatrixTask
from normuon.distributed.teams import Teams, with_teams
from normuon.distributed.tiling import (
    Owners,
    Route,
    gather_receives,
    gather_sends,
    return_receives,
    return_sends,
    tiling_of,
)

DEFAULT_BUCKET_BYTES = 256 * 1024 * 1024

Direction: TypeAlias = Literal["gather", "return"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """How ranks share the matrices of one optimizer; see `make_plan`."""

    balance: Balance = "flops"
    bucket_bytes: int = DEFAULT_BUCKET_BYTES
    teams: Teams = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Owners and buckets of one step. Build one with `make_plan`.

    Every method that names a rank may be called on any rank, and costs time in what that rank sends
    or owns only.

    Args:
        tasks: the matrices, or slabs of them; everything else refers to them by index.
        world_size: ranks of the group.
        balance: how owners were chosen.
        bucket_bytes: bound on a rank's packed bytes in one bucket, or twice the bucket's largest
            matrix where that is more.
        cost_model: what FLOPs and bytes were taken to cost.
        whole_flops: of all matrices, each computed once by one rank.
        owners: for each matrix its owner, or one owner per full replica in replica order.
        reasons: for each matrix, why.
        alone: the matrices that every rank that stores them stores whole and computes itself.
        buckets: the others, by exchange, in the order of the exchanges.
    """

    tasks: tuple[MatrixTask, ...]
    world_size: int
    balance: Balance
    bucket_bytes: int
    cost_model: CostModel = field(compare=False)
    whole_flops: int
    owners: tuple[tuple[int, ...], ...]
    reasons: tuple[str, ...] = field(compare=False)
    alone: tuple[int, ...]
    buckets: tuple[tuple[int, ...], ...]

    @property
    def flops_by_matrix(self) -> tuple[int, ...]:
        """FLOPs to orthogonalise each matrix once."""
        return tuple(task.flops for task in self.tasks)

    @property
    def flops_by_rank(self) -> tuple[int, ...]:
        """FLOPs that each rank orthogonalises with."""
        loads = [0] * self.world_size
        for task, owners in zip(self.tasks, self.owners, strict=True):
            for owner in owners:
                loads[owner] += task.flops
        return tuple(loads)

    @property
    def mean_flops(self) -> float:
        """FLOPs of a rank if every matrix were computed once, whole, and all were equally busy."""
        return self.whole_flops / self.world_size

    @property
    def makespan_bound(self) -> int:
        """FLOPs below which no assignment with as many owners brings the busiest rank."""
        everywhere = 0
        costs: list[int] = []
        for task, owners in zip(self.tasks, self.owners, strict=True):
            if len(owners) == self.world_size:
                everywhere += task.flops
            else:
                costs += [task.flops] * len(owners)
        return everywhere + makespan_bound(costs, world_size=self.world_size)

    @property
    def imbalance(self) -> float:
        """FLOPs of the busiest rank over `makespan_bound`; 1.0 cannot be beaten."""
        return max(self.flops_by_rank) / self.makespan_bound if self.tasks else 1.0

    def sends(self, rank: int, bucket: int, direction: Direction) -> list[Route]:
        """Every piece that `rank` sends in one exchange, local copies included.

        Args:
            rank: the sender.
            bucket: index of the bucket.
            direction: "gather" to owners, "return" from them.

        Returns:
            Routes by destination, then place in the bucket, then piece: the order in which the
            destination's `receives` lists the same routes.
        """
        find = gather_sends if direction == "gather" else return_sends
        return find(self.tasks, self.owners, self.buckets[bucket], rank)

    def receives(self, rank: int, bucket: int, direction: Direction) -> list[Route]:
        """Every piece that `rank` receives in one exchange, by source; see `sends`."""
        find = gather_receives if direction == "gather" else return_receives
        return find(self.tasks, self.owners, self.buckets[bucket], rank)

    def num_swaps(self, bucket: int) -> int:
        """How often members of teams exchange while a bucket is computed; all ranks take part."""
        return max(self.tasks[index].num_swaps for index in self.buckets[bucket])

    def gathers(self, bucket: int) -> bool:
        """Whether any rank sends another one anything on the way to owners.

        On the way back some rank always does: else the matrix would not be in a bucket.
        """
        return any(
            not set(self.owners[index]) <= set(tiling_of(self.tasks[index]).whole_ranks)
            for index in self.buckets[bucket]
        )

    def lines(self) -> Iterator[str]:
        """Everything that ranks must agree on: integers and names only, one fact a line."""
        yield f"world_size: {self.world_size}"
        yield f"balance: {self.balance}"
        yield f"bucket_bytes: {self.bucket_bytes}"
        places: dict[ShardLayout, int] = {}
        for task in self.tasks:
            if task.layout not in places:
                places[task.layout] = len(places)
                yield f"{task.label}: in layout {places[task.layout]} of {task.layout.global_shape}"
                for rank, intervals in enumerate(task.layout.intervals_by_rank):
                    replica = task.layout.replicas[rank]
                    yield f"{task.label}: stored on rank {rank}: {intervals} of replica {replica}"
            yield (
                f"{task.label}: {task.rows} x {task.cols} at {tuple(task.region)} in layout "
                f"{places[task.layout]}, {task.key}, {task.flops} FLOPs, vectors "
                f"{task.state_dims} {task.summary_dims}, {task.wire_bytes} and {task.side_bytes} "
                f"bytes, {task.split}, {task.slab}"
            )
        for task, owners in zip(self.tasks, self.owners, strict=True):
            everywhere = len(owners) == self.world_size > 1
            yield f"{task.label}: owners: {'all' if everywhere else owners}"
        for number, bucket in enumerate(self.buckets):
            yield f"bucket {number}: {bucket}"

    def digest(self) -> str:
        """SHA-256 over `lines()`, in hexadecimal."""
        return hashlib.sha256("\n".join(self.lines()).encode()).hexdigest()


def make_plan(
    tasks: Sequence[MatrixTask],
    *,
    world_size: int,
    cost_model: CostModel | None = None,
    balance: Balance = "flops",
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    teams: Teams = "off",
    assignment: Assignment | None = None,
) -> Plan:
    """Choose owners and buckets for one step.

    Args:
        tasks: the matrices, in the order in which every rank lists them.
        world_size: ranks of the group; every layout must have as many.
        cost_model: rates and latency; the defaults of `CostModel` when None.
        balance: "flops" (longest processing time) or "paper" (sorted round-robin).
        bucket_bytes: bound on a rank's packed bytes in one bucket.
        teams: "auto" lets several ranks divide a matrix where that shortens the predicted step.
        assignment: owners that were chosen otherwise, of these very tasks; `balance` and `teams`
            choose nothing then.

    Returns:
        The plan, equal on every rank for equal arguments.

    Raises:
        ValueError: a layout of another world size, or two matrices of one parameter and index.

    Example:
        >>> from normuon.distributed.layout import layout_from_placements
        >>> from normuon.distributed.layout import Region
        >>> layout = layout_from_placements((4, 8), mesh_shape=(2,), placements=[("shard", 0)])
        >>> whole = Region.whole((4, 8))
        >>> same = dict(name="w", region=whole, rows=4, cols=8, layout=layout, flops=9)
        >>> plan = make_plan([MatrixTask(**same, index=i) for i in range(2)], world_size=2)
        >>> plan.owners, [route.destination for route in plan.sends(0, 0, "gather")]
        (((0,), (1,)), [0, 1])
    """
    model = CostModel() if cost_model is None else cost_model
    _check_tasks(tasks, world_size)
    whole_flops = sum(task.flops for task in tasks)
    if assignment is None:
        if teams == "auto":
            tasks = with_teams(tasks, world_size=world_size, cost_model=model)
        assignment = assign_owners(tasks, world_size=world_size, cost_model=model, balance=balance)
    owners = assignment.owners
    alone = [i for i, task in enumerate(tasks) if is_alone(task, owners[i])]
    are_alone = set(alone)
    buckets = form_buckets(
        tasks,
        owners,
        (index for index in range(len(tasks)) if index not in are_alone),
        world_size=world_size,
        bucket_bytes=bucket_bytes,
    )
    return Plan(
        tasks=tuple(tasks),
        world_size=world_size,
        balance=balance,
        bucket_bytes=bucket_bytes,
        cost_model=model,
        whole_flops=whole_flops,
        owners=owners,
        reasons=assignment.reasons,
        alone=tuple(alone),
        buckets=buckets,
    )


def _check_tasks(tasks: Sequence[MatrixTask], world_size: int) -> None:
    seen: set[tuple[tuple[int, int], int]] = set()
    for task in tasks:
        if task.layout.world_size != world_size:
            raise ValueError(
                f"{task.label} {list(task.layout.global_shape)}: its layout names "
                f"{task.layout.world_size} ranks; pass layouts over all {world_size} of the group"
            )
        if (task.param, task.index) in seen:
            raise ValueError(f"{task.label}: two matrices have this parameter and index")
        seen.add((task.param, task.index))


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
    units: dict[object, list[int]] = {}
    for index in chosen:
        task = tasks[index]
        units.setdefault(index if task.slab is None else (task.param, task.index), []).append(index)
    by_dtypes: dict[tuple[int, int], list[Unit]] = {}
    for unit in units.values():
        task = tasks[unit[0]]
        by_dtypes.setdefault((task.wire_bytes, task.side_bytes), []).append(tuple(unit))
    found: list[tuple[int, ...]] = []
    for of_dtypes in by_dtypes.values():
        ordered = _by_start_time(tasks, owners, of_dtypes, world_size)
        for bucket in _cut(tasks, owners, ordered, bucket_bytes):
            found.append(tuple(sorted(bucket, key=lambda i: _place(tasks[i]))))
    return tuple(found)


Unit: TypeAlias = tuple[int, ...]
"""What goes into one bucket together: a matrix, or all slabs of one."""


def is_alone(task: MatrixTask, owners: tuple[int, ...]) -> bool:
    """Whether every rank that stores the matrix stores it whole and steps it without the others."""
    return task.slab is None and tiling_of(task).needs_no_message(owners)


def _place(task: MatrixTask) -> tuple[Any, ...]:
    number = -1 if task.slab is None else task.slab.number
    return (*task.batch_key, task.param, task.index, number)


def _by_start_time(
    tasks: Sequence[MatrixTask], owners: Owners, units: Sequence[Unit], world_size: int
) -> list[Unit]:
    def turn(unit: Unit) -> tuple[Any, ...]:
        task = tasks[unit[0]]
        needs_gather = any(
            not set(owners[index]) <= set(tiling_of(tasks[index]).whole_ranks) for index in unit
        )
        return (needs_gather, -task.flops, _place(task))

    clock = [0] * world_size
    starts: dict[Unit, int] = {}
    turns = sorted(units, key=turn)
    for unit in turns:
        starts[unit] = max(clock[owner] for index in unit for owner in owners[index])
        for index in unit:
            for owner in owners[index]:
                clock[owner] = starts[unit] + tasks[index].flops
    return sorted(turns, key=starts.__getitem__)  # Stable: equal starts keep their turns.


def _cut(
    tasks: Sequence[MatrixTask], owners: Owners, ordered: Sequence[Unit], bucket_bytes: int
) -> list[list[int]]:
    buckets: list[list[int]] = []
    there, back = _Fill(), _Fill()
    for unit in ordered:
        packed_there = [_packed_there(tasks[index], owners[index]) for index in unit]
        packed_back = [_packed_back(tasks[index], owners[index]) for index in unit]
        if not buckets or not all(
            there.takes(owners[index], at_owners, bucket_bytes)
            and back.takes(owners[index], elsewhere, bucket_bytes)
            for index, at_owners, elsewhere in zip(unit, packed_there, packed_back, strict=True)
        ):
            buckets.append([])
            there, back = _Fill(), _Fill()
        buckets[-1] += unit
        for index, at_owners, elsewhere in zip(unit, packed_there, packed_back, strict=True):
            there.add(owners[index], at_owners)
            back.add(owners[index], elsewhere)
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
