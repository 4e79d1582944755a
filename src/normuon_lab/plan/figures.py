"""The totals of a plan: bytes by rank, FLOPs, memory and predicted time, bucket by bucket."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One way to distribute a step, in numbers.

    Attributes:
        num_orthogonalisations: over all ranks, repeated and dummy ones included.
        flops_by_rank: what each rank orthogonalises.
        bytes_sent_total: over all ranks, there and back.
        scratch_bytes_max: whole matrices and orthogonaliser's scratch held at once on one rank.
        predicted_step_seconds: exchanges overlapped with their neighbours' compute.
        bytes_sent_by_rank: of a plan, there and back; None for a way that is only counted.
        bytes_received_by_rank: the same.
        bytes_least_total: of a plan; see `Traffic`.
        buckets: of a plan, in their order; first, without any exchange, the matrices that need
            none.
    """

    num_orthogonalisations: int
    flops_by_rank: tuple[int, ...]
    bytes_sent_total: int
    scratch_bytes_max: int
    predicted_step_seconds: float
    bytes_sent_by_rank: tuple[int, ...] | None = None
    bytes_received_by_rank: tuple[int, ...] | None = None
    bytes_least_total: int = 0
    buckets: tuple[BucketFigures, ...] = ()


def figures_of(plan: Plan) -> Figures:
    """Sums up a plan."""
    sent, received, least = [0] * plan.world_size, [0] * plan.world_size, 0
    buckets = []
    for indices in filter(None, (plan.alone, *plan.buckets)):
        traffic = Traffic(plan, indices)
        swapped = swapped_bytes(plan, indices)
        for rank, num_bytes in swapped.items():
            sent[rank] += num_bytes
            received[rank] += num_bytes
        for rank in range(plan.world_size):
            sent[rank] += traffic.gather_sent[rank] + traffic.return_sent[rank]
            received[rank] += traffic.gather_received[rank] + traffic.return_received[rank]
        least += traffic.least
        buckets.append(
            BucketFigures(
                num_matrices=sum(is_first(plan.tasks[index]) for index in indices),
                flops=busiest_flops(plan, indices),
                gather_bytes=max(*traffic.gather_sent, *traffic.gather_received),
                return_bytes=max(*traffic.return_sent, *traffic.return_received),
                team_seconds=team_seconds(plan, indices, max(swapped.values(), default=0)),
                scratch_bytes=owner_bytes(plan.tasks, plan.owners, indices),
            )
        )
    compute_seconds = plan.cost_model.compute_seconds
    return Figures(
        num_orthogonalisations=sum(
            len(owners)
            for task, owners in zip(plan.tasks, plan.owners, strict=True)
            if is_first(task)
        ),
        flops_by_rank=plan.flops_by_rank,
        bytes_sent_total=sum(sent),
        scratch_bytes_max=max((bucket.scratch_bytes for bucket in buckets), default=0),
        predicted_step_seconds=pipeline_seconds(
            plan.cost_model,
            [
                (b.gather_bytes, compute_seconds(b.flops) + b.team_seconds, b.return_bytes)
                for b in buckets
            ],
        ),
        bytes_sent_by_rank=tuple(sent),
        bytes_received_by_rank=tuple(received),
        bytes_least_total=least,
        buckets=tuple(buckets),
    )


def is_first(task: MatrixTask) -> bool:
    """Whether a task stands for its matrix: it is whole, or the first of its slabs."""
    return task.slab is None or task.slab.number == 0


def swapped_bytes(plan: Plan, indices: Iterable[int]) -> Counter[int]:
    """Bytes that members of teams send each other, by rank; each receives as many.

    Strips differ in size by a few rows, and statistics are left out.
    """
    found: Counter[int] = Counter()
    for index in indices:
        task = plan.tasks[index]
        if task.slab is not None:
            found[task.slab.rank] += task.swapped_bytes
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
    gathers = [exchange_seconds(model, gathered) for gathered, _, _ in stages]
    returns = [exchange_seconds(model, returned) for _, _, returned in stages]
    total = sum(gathers[:1]) + sum(returns[-1:])
    for k, (_, computing, _) in enumerate(stages):
        exchanges = sum(gathers[k + 1 : k + 2]) + (returns[k - 1] if k else 0.0)
        total += max(computing, exchanges)
    return total


def exchange_seconds(model: CostModel, num_bytes: int) -> float:
    """Seconds that one rank takes to send `num_bytes`; none without anything to send."""
    return model.send_seconds(num_bytes) if num_bytes else 0.0


def busiest_flops(plan: Plan, indices: Iterable[int]) -> int:
    """FLOPs of the busiest rank for some matrices."""
    loads: Counter[int] = Counter()
    for index in indices:
        owners = plan.owners[index]
        for owner in owners if len(owners) < plan.world_size else (EVERYWHERE,):
            loads[owner] += plan.tasks[index].flops
    return loads.pop(EVERYWHERE, 0) + max(loads.values(), default=0)


def owner_bytes(
    tasks: Sequence[MatrixTask], owners: Sequence[Sequence[int]], indices: Iterable[int]
) -> int:
    """Bytes on the fullest owner: its whole matrices, and scratch for the batch that needs most.

    Batches run one after another. A matrix that needs no message is taken from where it is stored,
    so it adds to a batch only. The indices are of matrices that are held at once: those of a
    bucket, or those that need no message.
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


class Traffic:
    """Bytes on the wire by rank for some of a plan's matrices; local copies are not counted.

    Counted without listing routes. Matrices with the same tiling move the same bytes, apart from
    what their owners store themselves. So the work is per tiling and per owner, not per matrix and
    rank: vectors of bytes by rank are added once at the end, corrections immediately.

    Attributes:
        gather_sent: by the ranks that store, to owners.
        gather_received: by owners.
        return_sent: by owners.
        return_received: by the ranks that store.
        least: what any scheme with these owners must send: every stored region that is not on its
            owner, there and back, without vectors.
    """

    def __init__(self, plan: Plan, indices: Iterable[int]) -> None:
        self.gather_sent, self.gather_received, self.return_sent, self.return_received = (
            [0] * plan.world_size for _ in range(4)
        )
        self.least = 0
        # Tables by their identity: they hold dicts, and tilings share them.
        tables: dict[int, tuple[list[int], PeerBytes]] = {}
        counts: Counter[int] = Counter()

        def add(sums: list[int], table: PeerBytes) -> None:
            tables[id(table)] = (sums, table)
            counts[id(table)] += 1

        for index in indices:
            task, owners, tiling = (
                plan.tasks[index],
                plan.owners[index],
                tiling_of(plan.tasks[index]),
            )
            if tiling.needs_no_message(owners):
                continue
            stored = tiling.numel_by_rank
            for owner in owners:
                gathered = tiling.gather_bytes(task, tiling.layout.replicas[owner])
                add(self.gather_sent, gathered)
                # Without its own pieces.
                corrections = tiling.gather_corrections(task, owner)
                for rank, correction in corrections.items():
                    self.gather_sent[rank] += correction
                self.gather_received[owner] += gathered.total + sum(corrections.values())
                self.least += (task.numel - stored.get(owner, 0)) * task.wire_bytes
            returned = tiling.return_bytes(task)
            if len(owners) == 1:
                own = returned.by_rank.get(owners[0], 0)
                add(self.return_received, returned)
                self.return_received[owners[0]] -= own
                self.return_sent[owners[0]] += returned.total - own
            else:
                for rank, num_bytes in returned.by_rank.items():
                    owner = tiling.owner_for(owners, rank)
                    if owner != rank:
                        self.return_sent[owner] += num_bytes
                        self.return_received[rank] += num_bytes
            at_owners = sum(stored.get(owner, 0) for owner in owners)
            self.least += (sum(stored.values()) - at_owners) * task.wire_bytes
        for key, (sums, table) in tables.items():
            for rank, num_bytes in table.by_rank.items():
                sums[rank] += counts[key] * num_bytes


def owners_in_words(plan: Plan, task: int) -> int | str | list[int]:
    """One rank, "everywhere", one rank per replica, or the members of a team."""
    owners, slab = plan.owners[task], plan.tasks[task].slab
    if slab is not None:
        return list(slab.ranks)
    if len(owners) == 1:
        return owners[0]
    return "everywhere" if len(owners) == plan.world_size else list(owners)
