"""What a plan adds up to: bytes by rank, FLOPs, memory and predicted time, bucket by bucket."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from normuon.distributed.cost import CostModel
from normuon.distributed.plan import Plan, is_alone
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import PeerBytes, tiling_of
from normuon.step.order import matrices_per_batch, scratch_bytes

EVERYWHERE = -1
"""Stands for every rank at once."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes on the wire by rank; local copies are not counted.

    Attributes:
        gather_sent: by the ranks that store, to owners.
        gather_received: by owners.
        return_sent: by owners.
        return_received: by the ranks that store.
        least: what any scheme with these owners must send: every stored region that is not on its
            owner, there and back, without vectors.
    """

    gather_sent: list[int]
    gather_received: list[int]
    return_sent: list[int]
    return_received: list[int]
    least: int

    @property
    def gather_busiest(self) -> int:
        """What the busiest rank sends or receives on the way to owners."""
        return max(*self.gather_sent, *self.gather_received)

    @property
    def return_busiest(self) -> int:
        """What the busiest rank sends or receives on the way back."""
        return max(*self.return_sent, *self.return_received)


@dataclass(frozen=True, slots=True)
class BucketFigures:
    """One exchange and what is computed with it.

    Attributes:
        num_matrices: how many.
        flops: of the busiest owner.
        gather_bytes: what the busiest rank sends or receives on the way to owners.
        return_bytes: what the busiest rank sends or receives on the way back.
        team_seconds: what members of teams take to exchange while they compute.
        scratch_bytes: see `owner_bytes`.
    """

    num_matrices: int
    flops: int
    gather_bytes: int
    return_bytes: int
    team_seconds: float
    scratch_bytes: int


@dataclass(frozen=True, slots=True)
class PlanFigures:
    """A plan's sums.

    Attributes:
        bytes_sent_by_rank: on the wire, there and back.
        bytes_received_by_rank: on the wire, there and back.
        bytes_least_total: see `Traffic`.
        buckets: in their order; first, without any exchange, the matrices that need none.
        cost_model: rates.
    """

    bytes_sent_by_rank: tuple[int, ...]
    bytes_received_by_rank: tuple[int, ...]
    bytes_least_total: int
    buckets: tuple[BucketFigures, ...]
    cost_model: CostModel

    @property
    def bytes_sent_total(self) -> int:
        """Bytes that all ranks together send in one step."""
        return sum(self.bytes_sent_by_rank)

    @property
    def scratch_bytes_max(self) -> int:
        """`owner_bytes` of the bucket that takes most."""
        return max((bucket.scratch_bytes for bucket in self.buckets), default=0)

    @property
    def predicted_step_seconds(self) -> float:
        """Seconds of one step, gathers and returns overlapped with the neighbours' compute."""
        model = self.cost_model
        stages = [
            (b.gather_bytes, model.compute_seconds(b.flops) + b.team_seconds, b.return_bytes)
            for b in self.buckets
        ]
        return pipeline_seconds(self.cost_model, stages)


def figures_of(plan: Plan) -> PlanFigures:
    """Sums up a plan."""
    sent, received, least = [0] * plan.world_size, [0] * plan.world_size, 0
    buckets = []
    for indices in filter(None, (plan.alone, *plan.buckets)):
        traffic = count_traffic(plan, indices)
        swapped = swapped_bytes(plan, indices)
        for rank, num_bytes in swapped.items():
            sent[rank] += num_bytes
            received[rank] += num_bytes
        for sums, parts in (
            (sent, (traffic.gather_sent, traffic.return_sent)),
            (received, (traffic.gather_received, traffic.return_received)),
        ):
            sums[:] = map(sum, zip(sums, *parts, strict=True))
        least += traffic.least
        buckets.append(
            BucketFigures(
                num_matrices=sum(is_first(plan.tasks[index]) for index in indices),
                flops=busiest_flops(plan, indices),
                gather_bytes=traffic.gather_busiest,
                return_bytes=traffic.return_busiest,
                team_seconds=team_seconds(plan, indices, max(swapped.values(), default=0)),
                scratch_bytes=owner_bytes(plan.tasks, plan.owners, indices),
            )
        )
    return PlanFigures(tuple(sent), tuple(received), least, tuple(buckets), plan.cost_model)


def is_first(task: MatrixTask) -> bool:
    """Whether a task stands for its matrix: it is whole, or the first of its slabs."""
    return task.slab is None or task.slab.number == 0


def swapped_bytes(plan: Plan, indices: Iterable[int]) -> dict[int, int]:
    """Bytes that members of teams send each other, by rank; each receives as many.

    Strips differ in size by a few rows, and statistics are left out.
    """
    found: dict[int, int] = {}
    for index in indices:
        task = plan.tasks[index]
        if task.slab is not None:
            found[task.slab.rank] = found.get(task.slab.rank, 0) + task.swapped_bytes
    return found


def team_seconds(plan: Plan, indices: Iterable[int], num_bytes: int) -> float:
    """Seconds that the exchanges within teams take, all teams exchanging side by side."""
    tasks = [plan.tasks[index] for index in indices]
    sizes = [task.slab.team.size for task in tasks if task.slab is not None]
    if not sizes:
        return 0.0
    return plan.cost_model.swap_seconds(
        num_bytes, num_swaps=max(task.num_swaps for task in tasks), num_ranks=max(sizes)
    )


def pipeline_seconds(model: CostModel, stages: Sequence[tuple[int, float, int]]) -> float:
    """Seconds of a sequence of exchanges, each overlapped with its neighbours' compute.

    gather_0 + sum_k max(compute_k, gather_{k+1} + return_{k-1}) + return_last.

    Args:
        model: rates.
        stages: for each, the busiest rank's bytes to gather, seconds of computing, and bytes to
            return.

    Example:
        >>> model = CostModel(flops_per_second=1.0, bytes_per_second=1.0, latency_seconds=0.0)
        >>> pipeline_seconds(model, [(2, 5.0, 3), (4, 6.0, 1)])
        14.0
    """
    gathers = [model.send_seconds(gathered) * (gathered > 0) for gathered, _, _ in stages]
    returns = [model.send_seconds(returned) * (returned > 0) for _, _, returned in stages]
    total = sum(gathers[:1]) + sum(returns[-1:])
    for k, (_, computing, _) in enumerate(stages):
        exchanges = sum(gathers[k + 1 : k + 2]) + (returns[k - 1] if k else 0.0)
        total += max(computing, exchanges)
    return total


def busiest_flops(plan: Plan, indices: Iterable[int]) -> int:
    """FLOPs of the busiest rank for some matrices."""
    everywhere = 0
    loads: dict[int, int] = {}
    for index in indices:
        if len(plan.owners[index]) == plan.world_size:
            everywhere += plan.tasks[index].flops
            continue
        for owner in plan.owners[index]:
            loads[owner] = loads.get(owner, 0) + plan.tasks[index].flops
    return everywhere + max(loads.values(), default=0)


def owner_bytes(
    tasks: Sequence[MatrixTask], owners: Sequence[Sequence[int]], indices: Iterable[int]
) -> int:
    """Bytes on the fullest owner: its whole matrices, and scratch for the batch that needs most.

    Batches run one after another. A matrix that needs no message is taken from where it is stored,
    so it adds to a batch only.

    Args:
        tasks: the plan's matrices.
        owners: for each, its owners.
        indices: which of them are held at once: those of a bucket, or those that need no message.
    """
    whole: Counter[int] = Counter()
    numbers: Counter[tuple[int, object]] = Counter()
    first_of: dict[object, MatrixTask] = {}
    for index in indices:
        task, ranks = tasks[index], owners[index]
        first_of.setdefault(task.batch_key, task)
        for rank in ranks if len(ranks) < task.layout.world_size else (EVERYWHERE,):
            whole[rank] += 0 if is_alone(task, tuple(ranks)) else task.matrix_bytes
            if task.slab is not None:
                whole[rank] += slab_bytes(task)  # Slabs of a bucket are computed side by side.
            else:
                numbers[rank, task.batch_key] += 1
    scratch: dict[int, int] = {}
    for (rank, key), number in numbers.items():
        shared = 0 if rank == EVERYWHERE else numbers.get((EVERYWHERE, key), 0)
        needed = batch_bytes(first_of[key], number + shared)
        scratch[rank] = max(scratch.get(rank, 0), needed)
    everywhere = scratch.pop(EVERYWHERE, 0)  # Of matrices that need no message.
    own = (held + max(scratch.get(rank, 0), everywhere) for rank, held in whole.items())
    return max(own, default=everywhere)


def slab_bytes(task: MatrixTask) -> int:
    """Scratch of a member of a team: the slab in float32, rounded and twice iterated, and squares.

    Five S x S matrices, in bfloat16 as `batch_bytes` counts.
    """
    short = min(task.matrix_shape)
    return task.numel * (4 + 3 * 2) + 5 * short * short * 2


def batch_bytes(task: MatrixTask, number: int) -> int:
    """Scratch of the step for some matrices like `task`, as many at once as its bound allows.

    Counted for an accelerator, float32 weights, Newton-Schulz in bfloat16 and the default bound,
    whatever the dtype on the wire: so are the plan's FLOPs.
    """
    dtypes = {"ns_dtype": torch.bfloat16, "param_dtype": torch.float32}
    limit = matrices_per_batch(
        task.rows, task.cols, device_type="cuda", max_scratch_bytes=None, **dtypes
    )
    return min(limit, number) * scratch_bytes(task.rows, task.cols, **dtypes)


def count_traffic(plan: Plan, indices: Iterable[int]) -> Traffic:
    """The traffic of some of a plan's matrices, counted without listing routes.

    Matrices that a layout cuts alike move the same bytes but for what their owners store
    themselves, so the work is per tiling and per owner, never per matrix and rank.
    """
    counter = _Counter(plan.world_size)
    for index in indices:
        task, owners = plan.tasks[index], plan.owners[index]
        if tiling_of(task).needs_no_message(owners):
            continue
        for owner in owners:
            counter.add_gather(task, owner)
        counter.add_return(task, owners)
    return counter.finish()


class _Counter:
    """Sums vectors of bytes by rank: whole vectors once at the end, corrections as they come."""

    def __init__(self, world_size: int) -> None:
        self.gather_sent = [0] * world_size
        self.gather_received = [0] * world_size
        self.return_sent = [0] * world_size
        self.return_received = [0] * world_size
        self.least = 0
        self.gather_tables: dict[int, tuple[PeerBytes, int]] = {}
        self.return_tables: dict[int, tuple[PeerBytes, int]] = {}

    def add_gather(self, task: MatrixTask, owner: int) -> None:
        """Counts what travels to one owner."""
        tiling = tiling_of(task)
        table = tiling.gather_bytes(task, tiling.layout.replicas[owner])
        count = self.gather_tables.get(id(table), (table, 0))[1]
        self.gather_tables[id(table)] = (table, count + 1)
        received = table.total
        for rank, correction in tiling.gather_corrections(task, owner).items():
            self.gather_sent[rank] += correction
            received += correction
        self.gather_received[owner] += received
        self.least += (task.numel - tiling.numel_by_rank.get(owner, 0)) * task.wire_bytes

    def add_return(self, task: MatrixTask, owners: tuple[int, ...]) -> None:
        """Counts what comes back from the owners of a matrix."""
        tiling = tiling_of(task)
        table = tiling.return_bytes(task)
        if len(owners) == 1:
            owner = owners[0]
            own = table.by_rank.get(owner, 0)
            count = self.return_tables.get(id(table), (table, 0))[1]
            self.return_tables[id(table)] = (table, count + 1)
            self.return_received[owner] -= own
            self.return_sent[owner] += table.total - own
        else:
            for rank, num_bytes in table.by_rank.items():
                owner = tiling.owner_for(owners, rank)
                if owner != rank:
                    self.return_sent[owner] += num_bytes
                    self.return_received[rank] += num_bytes
        stored = sum(tiling.numel_by_rank.values())
        at_owners = sum(tiling.numel_by_rank.get(owner, 0) for owner in owners)
        self.least += (stored - at_owners) * task.wire_bytes

    def finish(self) -> Traffic:
        """The sums."""
        for sums, tables in (
            (self.gather_sent, self.gather_tables),
            (self.return_received, self.return_tables),
        ):
            for table, count in tables.values():
                for rank, num_bytes in table.by_rank.items():
                    sums[rank] += count * num_bytes
        return Traffic(
            self.gather_sent,
            self.gather_received,
            self.return_sent,
            self.return_received,
            self.least,
        )


def owners_in_words(plan: Plan, task: int) -> int | str | list[int]:
    """One rank, "everywhere", one rank per replica, or the members of a team."""
    owners, slab = plan.owners[task], plan.tasks[task].slab
    if slab is not None:
        return list(slab.ranks)
    if len(owners) == 1:
        return owners[0]
    return "everywhere" if len(owners) == plan.world_size else list(owners)
