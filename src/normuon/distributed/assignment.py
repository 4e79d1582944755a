"""Chooses the owners of every matrix, and says in words why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from normuon.distributed.balance import (
    TOLERANCE,
    Job,
    balance_jobs,
    makespan_bound,
    round_robin,
)
from normuon.distributed.cost import CostModel, format_bytes
from normuon.distributed.layout import ranks_in
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import tiling_of

Balance: TypeAlias = Literal["flops", "paper"]


@dataclass(frozen=True, slots=True)
class Assignment:
    """The owners of each matrix (one, or one per full replica), and a sentence for each."""

    owners: tuple[tuple[int, ...], ...]
    reasons: tuple[str, ...]


def assign_owners(
    tasks: Sequence[MatrixTask], *, world_size: int, cost_model: CostModel, balance: Balance
) -> Assignment:
    """Give every matrix its owners.

    With balance="paper", Algorithm 2: sorted by element count, dealt round-robin, one owner each.
    With balance="flops", longest processing time over FLOPs, where

    - a slab has the owner that its team says;
    - a matrix that several replicas store has one owner among all ranks, or one in every replica
      when sending the result between replicas takes longer than computing it again;
    - a matrix that some ranks store whole (an expert) stays on one of them, which costs no gather.
      If that leaves the busiest rank above the tolerance, the same is tried with every rank
      allowed, and taken when it saves more compute than its traffic takes.

    Args:
        tasks: the matrices.
        world_size: ranks of the group.
        cost_model: rates for the two decisions above.
        balance: which of the two.

    Returns:
        Owners and reasons, in the order of `tasks`.
    """
    if balance == "paper":
        sizes = [task.numel for task in tasks]
        ranks = round_robin(sizes, world_size=world_size, names=[_name(task) for task in tasks])
        reason = "sorted by element count, round-robin"
        return Assignment(tuple((rank,) for rank in ranks), (reason,) * len(tasks))
    drafts = [_draft(task, world_size, cost_model) for task in tasks]
    jobs = [job for draft in drafts for job in draft.jobs]
    base_load = sum(draft.task.flops for draft in drafts if draft.everywhere)
    ranks, loads = balance_jobs(jobs, world_size=world_size, base_load=base_load)
    freed = _free_whole_matrices(drafts, jobs, ranks, loads, base_load, cost_model)
    moved = freed is not None
    if freed is not None:
        ranks = freed
    position = 0
    owners: list[tuple[int, ...]] = []
    reasons: list[str] = []
    for draft in drafts:
        if draft.everywhere:
            owners.append(tuple(draft.everywhere))
        else:
            owners.append(tuple(ranks[position : position + len(draft.jobs)]))
            position += len(draft.jobs)
        reasons.append(_reason(draft, owners[-1], moved))
    return Assignment(tuple(owners), tuple(reasons))


@dataclass(frozen=True, slots=True)
class _Draft:
    """What is known of a matrix before balancing."""

    task: MatrixTask
    jobs: tuple[Job, ...]
    reason: str
    everywhere: tuple[int, ...] = ()
    stays_local: bool = False


def _name(task: MatrixTask) -> tuple[Any, ...]:
    """Orders matrices alike on every rank, those of one batch and parameter one after another."""
    return (*task.batch_key, task.param, task.index)


def is_free(task: MatrixTask, world_size: int, cost_model: CostModel) -> bool:
    """Whether a team may divide a matrix: one rank owns it, and any may."""
    draft = _draft(task, world_size, cost_model)
    is_single = len(draft.jobs) == 1 and (draft.stays_local or draft.jobs[0].candidates is None)
    return task.largest_team > 1 and task.slab is None and is_single


def _draft(task: MatrixTask, world_size: int, cost_model: CostModel) -> _Draft:
    tiling = tiling_of(task)
    replicas = task.layout.full_replicas
    job = Job(task.flops, _name(task), None, tiling.ranks_by_numel)
    if world_size == 1:
        return _Draft(task, (job,), "one rank: nothing to send")
    if task.slab is not None:
        reason = (
            f"divided among {task.slab.team.size} ranks: one rank would take longer than the mean"
        )
        return _Draft(task, (replace(job, candidates=(task.slab.rank,)),), reason)
    is_whole = tiling.is_stored_whole
    per_replica, reason = False, ""
    if len(replicas) > 1:
        per_replica, reason = cost_model.once_per_replica(
            task.flops,
            gather_bytes=0 if is_whole else task.matrix_bytes,
            return_bytes=task.matrix_bytes + task.vector_bytes(task.returned_dims),
            num_replicas=len(replicas),
        )
    if per_replica and is_whole:
        by_replica = sorted(tiling.whole_ranks, key=lambda rank: task.layout.replicas[rank])
        if len(by_replica) == world_size:
            return _Draft(task, (), reason, everywhere=tuple(by_replica))
        return _Draft(task, tuple(replace(job, candidates=(r,)) for r in by_replica), reason)
    if per_replica:
        groups = [ranks_in(task.layout.replica_masks[replica]) for replica in replicas]
        return _Draft(task, tuple(replace(job, candidates=group) for group in groups), reason)
    if is_whole and len(tiling.whole_ranks) < world_size:
        reason = reason or "stored whole on one rank: nothing to send"
        return _Draft(
            task, (replace(job, candidates=tiling.whole_ranks),), reason, stays_local=True
        )
    num_ranks = len(tiling.pieces_by_rank)
    return _Draft(task, (job,), reason or f"sharded over {num_ranks} ranks: gathered to one owner")


def _free_whole_matrices(
    drafts: Sequence[_Draft],
    jobs: Sequence[Job],
    ranks: Sequence[int],
    loads: Sequence[int],
    base_load: int,
    cost_model: CostModel,
) -> list[int] | None:
    """A placement in which whole-stored matrices may leave their rank, when that is faster."""
    world_size = len(loads)
    drafts_of_jobs = [draft for draft in drafts for _ in draft.jobs]
    bound = makespan_bound([job.cost for job in jobs], world_size=world_size)
    if base_load + max(loads) <= TOLERANCE * (base_load + bound) or not any(
        draft.stays_local for draft in drafts_of_jobs
    ):
        return None
    free_jobs = [
        replace(job, candidates=None) if draft.stays_local else job
        for job, draft in zip(jobs, drafts_of_jobs, strict=True)
    ]
    free_ranks, free_loads = balance_jobs(free_jobs, world_size=world_size, base_load=base_load)
    extra_bytes = [0] * world_size
    for draft, old_rank, new_rank in zip(drafts_of_jobs, ranks, free_ranks, strict=True):
        whole_ranks = tiling_of(draft.task).whole_ranks
        if draft.stays_local and new_rank not in whole_ranks:
            for rank in (old_rank, new_rank):  # There, and back.
                extra_bytes[rank] += 2 * draft.task.matrix_bytes
    saved = cost_model.compute_seconds(max(loads) - max(free_loads))
    return free_ranks if saved > cost_model.send_seconds(max(extra_bytes)) else None


def _reason(draft: _Draft, owners: tuple[int, ...], moved: bool) -> str:
    whole_ranks = tiling_of(draft.task).whole_ranks
    if moved and draft.stays_local and owners[0] not in whole_ranks:
        size = format_bytes(draft.task.matrix_bytes)
        return f"stored whole on one rank, but moving {size} both ways balances the work"
    return draft.reason
