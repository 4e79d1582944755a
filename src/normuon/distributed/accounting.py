"""Sums up an assignment: FLOPs by rank and by bucket, lower bounds, scratch memory.

Counts what owners compute and hold; bytes on the wire are counted in `traffic`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from normuon.distributed.cost import CostModel
from normuon.distributed.ownership import makespan_bound, packing_bound
from normuon.distributed.task import MatrixTask


def flops_of(tasks: Sequence[MatrixTask], cost_model: CostModel) -> list[int]:
    """FLOPs to orthogonalise each matrix once."""
    by_shape = {(task.rows, task.cols): 0 for task in tasks}
    for rows, cols in by_shape:
        by_shape[rows, cols] = cost_model.matrix_flops(rows, cols)
    return [by_shape[task.rows, task.cols] for task in tasks]


def loads_and_bounds(
    owners: Sequence[Sequence[int]], flops: Sequence[int], world_size: int
) -> tuple[list[int], int, int]:
    """FLOPs of each rank, `makespan_bound` and `packing_bound`.

    A matrix with several owners is several jobs; one that every rank computes adds to all alike.

    Args:
        owners: for each matrix, its owners.
        flops: for each matrix, its FLOPs.
        world_size: ranks of the group.
    """
    everywhere = 0
    loads = [0] * world_size
    costs: list[int] = []
    for matrix_owners, cost in zip(owners, flops, strict=True):
        if len(matrix_owners) == world_size:
            everywhere += cost
            continue
        for owner in matrix_owners:
            loads[owner] += cost
            costs.append(cost)
    return (
        [load + everywhere for load in loads],
        everywhere + makespan_bound(costs, world_size=world_size),
        everywhere + packing_bound(costs, world_size=world_size),
    )


def busiest_flops(
    owners: Sequence[Sequence[int]], flops: Sequence[int], indices: Iterable[int], world_size: int
) -> int:
    """FLOPs of the busiest rank for the matrices `indices`."""
    everywhere = 0
    loads: dict[int, int] = {}
    for index in indices:
        if len(owners[index]) == world_size:
            everywhere += flops[index]
            continue
        for owner in owners[index]:
            loads[owner] = loads.get(owner, 0) + flops[index]
    return everywhere + max(loads.values(), default=0)


def scratch_bytes(
    tasks: Sequence[MatrixTask],
    owners: Sequence[Sequence[int]],
    indices: Iterable[int],
    cost_model: CostModel,
    world_size: int,
) -> int:
    """Bytes on the fullest owner: its whole matrices of the bucket, and scratch for one batch.

    Batches run one after another, so only the largest needs scratch. Matrices that every rank
    computes are added to the fullest rank, which is exact for them and for buckets without them.

    Args:
        tasks: the plan's matrices.
        owners: for each, its owners.
        indices: the bucket's matrices.
        cost_model: gives the scratch of a batch.
        world_size: ranks of the group.
    """
    every_rank = -1
    whole: dict[int, int] = {}
    batches: dict[tuple[int, tuple[int, int, str, str]], int] = {}
    element_bytes = 0
    for index in indices:
        task = tasks[index]
        element_bytes = max(element_bytes, task.wire_bytes)
        ranks = owners[index] if len(owners[index]) < world_size else (every_rank,)
        for rank in ranks:
            whole[rank] = whole.get(rank, 0) + task.numel * task.wire_bytes
            key = (rank, task.batch_key)
            batches[key] = batches.get(key, 0) + 1
    scratch = dict.fromkeys(whole, 0)
    for (rank, (rows, cols, _, _)), number in batches.items():
        needed = cost_model.scratch_bytes(
            rows, cols, num_matrices=number, element_bytes=element_bytes
        )
        scratch[rank] = max(scratch[rank], needed)
    common_whole, common_scratch = whole.pop(every_rank, 0), scratch.pop(every_rank, 0)
    own = (common_whole + whole[rank] + max(scratch[rank], common_scratch) for rank in whole)
    return max(own, default=common_whole + common_scratch)
