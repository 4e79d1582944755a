"""The plan of a distributed step: owners, ordered buckets, routes, and what it all costs.

Built from matrices, layouts and a cost model alone, so every rank draws up the same one and proves
it by comparing digests. Reading placements is `layout`'s, moving bytes `exchange`'s work.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from normuon.distributed import routes as routing
from normuon.distributed.accounting import busiest_flops, flops_of, loads_and_bounds, scratch_bytes
from normuon.distributed.assignment import Assignment, Balance, assign_owners
from normuon.distributed.buckets import form_buckets
from normuon.distributed.canonical import canonical_text, first_difference
from normuon.distributed.cost import CostModel
from normuon.distributed.plan_record import Bucket, PlanRecord
from normuon.distributed.plan_report import describe_plan, plan_to_json
from normuon.distributed.routes import Direction, Route, Stream
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import tiling_of
from normuon.distributed.traffic import count_traffic

DEFAULT_BUCKET_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(PlanRecord):
    """Who computes what, in which order, and which piece goes where. Build one with `make_plan`.

    Every method that names a rank may be called on any rank, and costs time in what that rank sends
    or owns only. The fields are those of `PlanRecord`.
    """

    def owner_for(self, task: int, rank: int) -> int:
        """The owner from which `rank` gets its regions of the matrix."""
        return routing.owner_for(tiling_of(self.tasks[task]), self.owners[task], rank)

    def owned(self, rank: int, bucket: int) -> tuple[int, ...]:
        """The matrices of a bucket that `rank` orthogonalises, in bucket order."""
        return tuple(i for i in self.buckets[bucket].tasks if rank in self.owners[i])

    def batches(self, rank: int, bucket: int) -> tuple[tuple[int, ...], ...]:
        """The owned matrices of a bucket, grouped into batches of one shape and key."""
        groups: dict[object, list[int]] = {}
        for index in self.owned(rank, bucket):
            groups.setdefault(self.tasks[index].batch_key, []).append(index)
        return tuple(tuple(group) for group in groups.values())

    def sends(self, rank: int, bucket: int, *, direction: Direction = "gather") -> list[Route]:
        """Every piece that `rank` sends in one exchange, local copies included.

        Args:
            rank: the sender.
            bucket: index of the bucket.
            direction: "gather" to owners, "return" from them.

        Returns:
            Routes by destination, then place in the bucket, then piece: the order in which the
            destination's `receives` lists the same routes.
        """
        find = routing.gather_sends if direction == "gather" else routing.return_sends
        return find(self.tasks, self.owners, self.buckets[bucket].tasks, rank)

    def receives(self, rank: int, bucket: int, *, direction: Direction = "gather") -> list[Route]:
        """Every piece that `rank` receives in one exchange, by source; see `sends`."""
        find = routing.gather_receives if direction == "gather" else routing.return_receives
        return find(self.tasks, self.owners, self.buckets[bucket].tasks, rank)

    def send_counts(
        self,
        rank: int,
        bucket: int,
        *,
        direction: Direction = "gather",
        stream: Stream = "elements",
    ) -> list[int]:
        """How many entries of one stream `rank` sends to each rank; none to itself.

        Args:
            rank: the sender.
            bucket: index of the bucket.
            direction: "gather" to owners, "return" from them.
            stream: "elements" of matrices, "neurons" of v, or "scalars" (flags there, scales back).

        Returns:
            One count per rank: the input split sizes of an all-to-all.
        """
        counts = [0] * self.world_size
        for route in self.sends(rank, bucket, direction=direction):
            if not route.is_local:
                counts[route.destination] += route.count(stream)
        return counts

    def receive_counts(
        self,
        rank: int,
        bucket: int,
        *,
        direction: Direction = "gather",
        stream: Stream = "elements",
    ) -> list[int]:
        """How many entries of one stream each rank sends to `rank`; see `send_counts`."""
        counts = [0] * self.world_size
        for route in self.receives(rank, bucket, direction=direction):
            if not route.is_local:
                counts[route.source] += route.count(stream)
        return counts

    def canonical(self) -> str:
        """Everything that ranks must agree on, as one JSON text."""
        return canonical_text(self)

    def digest(self) -> str:
        """SHA-256 over `canonical()`, in hexadecimal."""
        return hashlib.sha256(self.canonical().encode()).hexdigest()

    def first_difference(self, other: Plan) -> str | None:
        """One sentence on where two plans differ first, or None."""
        return first_difference(self.canonical(), other.canonical())

    def to_json(self) -> str:
        """The plan's figures, owners and buckets as JSON: equal plans give equal texts."""
        return plan_to_json(self, digest=self.digest())

    def describe(self) -> str:
        """The plan as a text table for people."""
        return describe_plan(self, digest=self.digest())


def make_plan(
    tasks: Sequence[MatrixTask],
    *,
    world_size: int,
    cost_model: CostModel | None = None,
    balance: Balance = "flops",
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
) -> Plan:
    """Choose owners, buckets and routes for one step.

    Args:
        tasks: the matrices, in the order in which every rank lists them.
        world_size: ranks of the group; every layout must have as many.
        cost_model: FLOPs, rates and latency; the defaults of `CostModel` when None.
        balance: "flops" (longest processing time) or "paper" (sorted round-robin).
        bucket_bytes: bound on a rank's packed gather bytes in one bucket (what it owns, whole, and
            what it sends), or twice the bucket's largest matrix where that is more.

    Returns:
        The plan, equal on every rank for equal arguments.

    Raises:
        ValueError: a layout of another world size or with missing elements, two matrices of one
            name and index, an unknown balance, or a bound below 1.

    Example:
        >>> from normuon.distributed.mesh_layout import layout_from_placements
        >>> from normuon.distributed.region import Region
        >>> layout = layout_from_placements((4, 8), mesh_shape=(2,), placements=[("shard", 0)])
        >>> whole = Region.whole((4, 8))
        >>> tasks = [
        ...     MatrixTask(name=name, region=whole, rows=4, cols=8, layout=layout) for name in "ab"
        ... ]
        >>> plan = make_plan(tasks, world_size=2)
        >>> plan.owners, plan.send_counts(0, 0), plan.send_counts(1, 0)
        (((0,), (1,)), [0, 16], [16, 0])
    """
    started = time.perf_counter()
    if balance not in ("flops", "paper"):
        raise ValueError(f"balance must be 'flops' or 'paper', not {balance!r}")
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes={bucket_bytes}: pass at least 1")
    model = CostModel() if cost_model is None else cost_model
    _check_tasks(tasks, world_size)
    flops = flops_of(tasks, model)
    assignment = assign_owners(
        tasks, flops, world_size=world_size, cost_model=model, balance=balance
    )
    return plan_from_assignment(
        tasks,
        assignment,
        world_size=world_size,
        cost_model=model,
        balance=balance,
        bucket_bytes=bucket_bytes,
        started=started,
    )


def plan_from_assignment(
    tasks: Sequence[MatrixTask],
    assignment: Assignment,
    *,
    world_size: int,
    cost_model: CostModel,
    balance: Balance,
    bucket_bytes: int,
    started: float | None = None,
) -> Plan:
    """The plan in which `assignment` names the owners: buckets, routes and figures follow.

    Args:
        tasks: the matrices.
        assignment: owners and reasons of each.
        world_size: ranks of the group.
        cost_model: FLOPs, rates and latency.
        balance: how the owners were chosen, for the record.
        bucket_bytes: bound on a rank's packed gather bytes in one bucket.
        started: when planning began (`time.perf_counter()`); now when None.
    """
    started = time.perf_counter() if started is None else started
    owners = assignment.owners
    flops = flops_of(tasks, cost_model)
    loads, bound, packing = loads_and_bounds(owners, flops, world_size)
    bytes_sent, bytes_received, least = [0] * world_size, [0] * world_size, 0
    buckets = []
    for indices in form_buckets(
        tasks, owners, flops, world_size=world_size, bucket_bytes=bucket_bytes
    ):
        traffic = count_traffic(tasks, owners, indices, world_size=world_size)
        for sums, parts in (
            (bytes_sent, (traffic.gather_sent, traffic.return_sent)),
            (bytes_received, (traffic.gather_received, traffic.return_received)),
        ):
            sums[:] = map(sum, zip(sums, *parts, strict=True))
        least += traffic.least
        first = tasks[indices[0]]
        buckets.append(
            Bucket(
                tasks=indices,
                flops=busiest_flops(owners, flops, indices, world_size),
                gather_bytes=traffic.gather_busiest,
                return_bytes=traffic.return_busiest,
                scratch_bytes=scratch_bytes(tasks, owners, indices, cost_model, world_size),
                wire_dtype=first.wire_dtype,
                neuron_dtype=first.neuron_dtype,
            )
        )
    return Plan(
        tasks=tuple(tasks),
        world_size=world_size,
        balance=balance,
        bucket_bytes=bucket_bytes,
        cost_model=cost_model,
        owners=owners,
        reasons=assignment.reasons,
        buckets=tuple(buckets),
        flops_by_matrix=tuple(flops),
        flops_by_rank=tuple(loads),
        makespan_bound=bound,
        packing_bound=packing,
        bytes_sent_by_rank=tuple(bytes_sent),
        bytes_received_by_rank=tuple(bytes_received),
        bytes_least_total=least,
        plan_seconds=time.perf_counter() - started,
    )


def _check_tasks(tasks: Sequence[MatrixTask], world_size: int) -> None:
    if world_size < 1:
        raise ValueError(f"world_size={world_size}: pass at least 1")
    seen: set[tuple[str, int]] = set()
    for task in tasks:
        if task.layout.world_size != world_size:
            raise ValueError(
                f"{task.label} {list(task.layout.global_shape)}: its layout names "
                f"{task.layout.world_size} ranks; pass layouts over all {world_size} of the group"
            )
        if (task.name, task.index) in seen:
            raise ValueError(f"{task.label}: two matrices have this name and index")
        seen.add((task.name, task.index))
