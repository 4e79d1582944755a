"""The cost of other ways to distribute the same matrices, for comparison with a plan.

Counts FLOPs, bytes and memory without running anything.
"""

from __future__ import annotations

from normuon.distributed.plan import Plan
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import tiling_of
from normuon_lab.plan.figures import Figures, batch_bytes, pipeline_seconds


def compute_everywhere(plan: Plan) -> Figures:
    """Every rank gathers every matrix and orthogonalises it itself, one matrix at a time."""
    flops = sum(task.flops for task in plan.tasks)
    bytes_sent = 0
    scratch = 0
    stages = []
    for task in plan.tasks:
        stored = tiling_of(task).numel_by_rank
        bytes_sent += (plan.world_size * task.numel - sum(stored.values())) * task.wire_bytes
        least_stored = min(stored.values()) if len(stored) == plan.world_size else 0
        received = (task.numel - least_stored) * task.wire_bytes
        stages.append((received, plan.cost_model.compute_seconds(task.flops), 0))
        is_everywhere = len(tiling_of(task).whole_ranks) == plan.world_size
        held = 0 if is_everywhere else task.matrix_bytes
        scratch = max(scratch, held + batch_bytes(task, 1))
    return Figures(
        num_orthogonalisations=plan.world_size * len(plan.tasks),
        flops_by_rank=(flops,) * plan.world_size,
        bytes_sent_total=bytes_sent,
        scratch_bytes_max=scratch,
        predicted_step_seconds=pipeline_seconds(plan.cost_model, stages),
    )


def pad_to_world_size(plan: Plan) -> Figures:
    """Same-shape matrices in groups of one per rank, the last group padded with dummies.

    Every rank sends a shard of every member of a group to its owner, dummies included, and gets one
    back; shards are padded to the largest. If the parameter is sharded too, each replica works
    alone. Matrices that some ranks store whole are computed there; those that all ranks store are
    spread and sent to all.
    """
    groups: dict[object, list[int]] = {}
    for index, task in enumerate(plan.tasks):
        key = (*task.batch_key, tiling_of(task).whole_ranks, task.layout.full_replicas)
        groups.setdefault(key, []).append(index)
    loads = [0] * plan.world_size
    count = bytes_sent = scratch = 0
    stages: list[tuple[int, float, int]] = []
    compute_seconds = plan.cost_model.compute_seconds
    for indices in groups.values():
        task = plan.tasks[indices[0]]
        tiling = tiling_of(task)
        flops = task.flops
        if tiling.whole_ranks and len(tiling.whole_ranks) < plan.world_size:
            for rank in tiling.whole_ranks:
                loads[rank] += flops * len(indices)
            count += len(indices) * len(tiling.whole_ranks)
            stages.append((0, compute_seconds(flops * len(indices)), 0))
            held = 0
        else:
            num_replicas = 1 if tiling.whole_ranks else len(task.layout.full_replicas)
            group_size = plan.world_size // num_replicas
            num_groups = -(-len(indices) // group_size)
            shard = max(tiling.numel_by_rank.values()) * task.wire_bytes
            ways = 1 if tiling.whole_ranks else 2  # Replicated matrices need no gather.
            messages = num_groups * num_replicas * group_size * (group_size - 1)
            bytes_sent += ways * messages * shard
            count += num_groups * group_size * num_replicas
            each = (group_size - 1) * shard
            stages += [(each * (ways - 1), compute_seconds(flops), each)] * num_groups
            loads = [load + flops * num_groups for load in loads]
            held = task.matrix_bytes if plan.world_size > 1 else 0
        scratch = max(scratch, held + batch_bytes(task, 1))
    return Figures(
        num_orthogonalisations=count,
        flops_by_rank=tuple(loads),
        bytes_sent_total=bytes_sent,
        scratch_bytes_max=scratch,
        predicted_step_seconds=pipeline_seconds(plan.cost_model, stages),
    )


def reduce_over_shards(plan: Plan) -> Figures:
    """Plain Newton-Schulz on every rank's own shard, one all-reduce of a Gram matrix per step.

    Nothing is gathered: a rank multiplies its shard by polynomials of the Gram matrix over the side
    that is not cut, which every rank repeats. If both sides are cut, it is over the shorter one.
    Ranks compute alone what they store whole. The plan must be one without teams.
    """
    model = plan.cost_model
    loads = [0] * plan.world_size
    bytes_sent = scratch = 0
    seconds = 0.0
    for task in plan.tasks:
        tiling = tiling_of(task)
        if task.split is None or tiling.is_stored_whole:
            for rank in tiling.whole_ranks:
                loads[rank] += task.flops
            seconds += model.compute_seconds(task.flops)
            scratch = max(scratch, batch_bytes(task, 1))
            continue
        num_steps = sum(task.split.segments)
        side = _uncut_side(task)
        for rank, numel in tiling.numel_by_rank.items():
            loads[rank] += num_steps * (2 * 2 * side * numel + 2 * side**3)
        num_ranks = len(tiling.numel_by_rank) // len(task.layout.full_replicas)
        # A ring: everything but a rank's own part, twice.
        reduced = 2 * side**2 * task.split.element_bytes * (num_ranks - 1) // num_ranks
        bytes_sent += num_steps * reduced * len(tiling.numel_by_rank)
        largest = max(tiling.numel_by_rank.values())
        flops = 2 * 2 * side * largest + 2 * side**3
        seconds += num_steps * (model.compute_seconds(flops) + model.send_seconds(reduced))
        scratch = max(scratch, 2 * (3 * largest + 3 * side**2))
    return Figures(
        num_orthogonalisations=len(plan.tasks),
        flops_by_rank=tuple(loads),
        bytes_sent_total=bytes_sent,
        scratch_bytes_max=scratch,
        predicted_step_seconds=seconds,
    )


def _uncut_side(task: MatrixTask) -> int:
    """The side that no shard cuts, rows or columns; the shorter one if shards cut both."""
    assert task.split is not None
    region = task.region
    pieces = [piece.region.shape for piece in tiling_of(task).pieces]
    cut = {dim for shape in pieces for dim, size in enumerate(shape) if size != region.shape[dim]}
    long_is_cut = task.split.dim in cut
    return task.split.short if long_is_cut or len(cut) != 1 else task.split.long


ALTERNATIVES = {
    "replicate": ("every rank gathers and computes every matrix", compute_everywhere),
    "padding": ("same-shape groups padded to the number of ranks", pad_to_world_size),
    "all_reduce": ("shards stay, one all-reduce of a Gram matrix a step", reduce_over_shards),
}
"""Ways that are only counted, and what each does."""
