"""Gradients that are missing or not finite on some ranks: nothing hangs, no replica drifts.

A gradient that no rank has leaves its matrix alone. One that some ranks lack counts as zero there.
A NaN in one rank's shard stops the whole matrix on every rank, where that was asked for.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from normuon import MatrixView, NorMuon
from tests.distributed.parity import (
    changed,
    differing,
    distributed,
    gradient,
    local,
    snapshot,
    spread,
    values,
    weights,
    whole,
)

SHAPES = [(17, 5), (6, 30), (5, 17), (8, 8), (30, 6), (17, 5), (16, 9), (8, 8), (12, 7), (9, 4)]
MISSING = {1, 3, 6, 9}
BUCKET_BYTES = 64
"""As small as buckets get: no more than twice the largest matrix of each."""

LAYOUTS = {
    "shard_rows": ((4,), [Shard(0)]),
    "shard_columns": ((4,), [Shard(1)]),
    "replicate": ((4,), [Replicate()]),
    "hsdp": ((2, 2), [Replicate(), Shard(0)]),
    "rows_and_columns": ((2, 2), [Shard(0), Shard(1)]),
}


def groups_of(params, **options):
    """All three algorithms, each with a parameter that loses its gradient."""
    return [
        {"params": params[:5], **options},
        {"params": params[5:8], "algorithm": "muon", **options},
        {"params": params[8:], "algorithm": "adamw", **options},
    ]


def optimizer_of(params, **options):
    return NorMuon(groups_of(params), lr=1e-2, bucket_bytes=BUCKET_BYTES, **options)


def set_gradients(params, mesh, placements, step, missing=()):
    for number, param in enumerate(params):
        grad = spread(gradient(param.shape, step, number), mesh, placements)
        param.grad = None if number in missing else grad


def num_buckets(optimizer):
    """Exchanges of a step; infinitely many where no rank has anything to send."""
    (sharded_step,) = optimizer._sharded_steps
    plan = sharded_step.plan
    return math.inf if len(plan.alone) == len(plan.tasks) else len(plan.buckets)


def missing_everywhere_case(rank, world_size, layout, options):
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    params = distributed(SHAPES, mesh, placements)
    optimizer = optimizer_of(params, **options)
    for step in range(3):
        set_gradients(params, mesh, placements, step)
        optimizer.step()
    assert num_buckets(optimizer) >= 2
    set_gradients(params, mesh, placements, 3, missing=MISSING)
    before = [snapshot(param, optimizer) for param in params]
    optimizer.step()
    moved = {
        number for number, param in enumerate(params) if changed(before[number], param, optimizer)
    }
    set_gradients(params, mesh, placements, 4, missing=range(len(params)))
    before = [snapshot(param, optimizer) for param in params]
    optimizer.step()
    return moved, [changed(b, p, optimizer) for b, p in zip(before, params, strict=True)]


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True}, {"nesterov": False}], ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_gradient_that_no_rank_has_leaves_the_parameter_and_its_state(ranks, layout, options):
    """Bit by bit, on a step that moves the others, and on one that moves nothing at all."""
    answers = ranks.run(missing_everywhere_case, 4, layout=layout, options=options)
    for moved, then in answers:
        # A rank with an empty shard has nothing that could move.
        assert not moved & MISSING
        assert then == [set()] * len(SHAPES)
    assert set.union(*(moved for moved, _ in answers)) == set(range(len(SHAPES))) - MISSING


LACKING = {"shard_rows": {0}, "shard_columns": {1, 2}, "hsdp": {1, 3}, "rows_and_columns": {2}}
"""Ranks that lose their gradient: under HSDP, those of one shard in both replicas."""


def missing_on_some_case(rank, world_size, layout, options):
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    alone = [nn.Parameter(start) for start in weights(SHAPES)]
    shared = distributed(SHAPES, mesh, placements)
    one, many = optimizer_of(alone, **options), optimizer_of(shared, **options)
    lacks = rank in LACKING[layout]
    for step in range(5):
        for number, (a, b) in enumerate(zip(alone, shared, strict=True)):
            grad = spread(gradient(a.shape, step, number), mesh, placements)
            loses = number in MISSING and step % 2 == 0
            if loses and lacks:
                grad.to_local().zero_()
            a.grad = grad.full_tensor()
            b.grad = None if loses and lacks else grad
        kept = [None if b.grad is None else local(b.grad).clone() for b in shared]
        one.step()
        many.step()
        for b, grad in zip(shared, kept, strict=True):
            assert (b.grad is None) == (grad is None), "a gradient was invented or removed"
            assert grad is None or torch.equal(local(b.grad), grad), "a gradient was written to"
    return differing(values(alone, one), values(shared, many))


@pytest.mark.parametrize(
    "options", [{}, {"skip_nonfinite": True}, {"maximize": True, "nesterov": False}], ids=str
)
@pytest.mark.parametrize("layout", list(LACKING))
def test_a_gradient_that_some_ranks_lack_counts_as_zero_there(ranks, layout, options):
    """Equal to one process whose gradient holds zeros where those ranks' shards lie."""
    found = ranks.run(missing_on_some_case, 4, layout=layout, options=options)
    assert found == [[]] * 4


def matrices_of_one_rank_case(rank, world_size, options):
    """Experts and heads that lie whole on one rank, which has no gradient at some steps."""
    mesh = init_device_mesh("cpu", (world_size,))
    shapes = [(6, 5, 4), (6, 4)]
    views = [MatrixView.experts(), MatrixView(heads=3)]
    alone = [nn.Parameter(start) for start in weights(shapes)]
    shared = distributed(shapes, mesh, [Shard(0)])
    one, many = (
        NorMuon(
            [{"params": [p], "view": v} for p, v in zip(params, views, strict=True)],
            lr=0.01,
            **options,
        )
        for params in (alone, shared)
    )
    for step in range(5):
        for number, (a, b) in enumerate(zip(alone, shared, strict=True)):
            grad = spread(gradient(a.shape, step, number), mesh, [Shard(0)])
            lacks = rank == 0 and step % 2 == 1
            if lacks:
                grad.to_local().zero_()
            a.grad = grad.full_tensor()
            b.grad = None if lacks else grad
        one.step()
        many.step()
    return differing(values(alone, one), values(shared, many))


@pytest.mark.parametrize(
    "options", [{}, {"skip_nonfinite": True}, {"momentum_dtype": torch.int8}], ids=str
)
def test_matrices_of_the_rank_that_lacks_a_gradient_move_as_in_one_process(ranks, options):
    """An expert that no token reached follows its old momentum, whatever rank it lies on."""
    assert ranks.run(matrices_of_one_rank_case, 3, options=options) == [[]] * 3


def nonfinite_case(rank, world_size, layout, value):
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    params = distributed(SHAPES, mesh, placements)
    optimizer = optimizer_of(params, skip_nonfinite=True)
    alone = [nn.Parameter(start) for start in weights(SHAPES)]
    one = optimizer_of(alone, skip_nonfinite=True)
    untouched = True
    for step in range(5):
        for number, (a, b) in enumerate(zip(alone, params, strict=True)):
            grad = gradient(a.shape, step, number)
            if step in (0, 3) and number in MISSING:
                grad[-1, -1] = value  # In the last rank's shard, or the last that has one.
            a.grad, b.grad = grad, spread(grad, mesh, placements)
        before = [snapshot(b, optimizer) for b in params]
        kept = [local(b.grad).clone() for b in params]
        one.step()
        optimizer.step()
        for b, grad in zip(params, kept, strict=True):
            assert torch.equal(local(b.grad).nan_to_num(7.0), grad.nan_to_num(7.0))
        if step in (0, 3):
            untouched = untouched and all(
                changed(before[number], params[number], optimizer) == {"skipped_steps"}
                for number in MISSING
            )
    counts = [whole(optimizer.state[b]["skipped_steps"]).tolist() for b in params]
    return untouched, counts, differing(values(alone, one), values(params, optimizer))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")], ids=str)
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_nonfinite_shard_stops_its_whole_matrix_on_every_rank(ranks, layout, value):
    """Weights and state stay as they were, each skip is counted once, other matrices step.

    Newton-Schulz turns one NaN into a whole matrix of them, which is what returns to the shards;
    a scale of 0 does not silence it, since 0 * NaN is NaN, so the shards must choose, not multiply.
    """
    answers = ranks.run(nonfinite_case, 4, layout=layout, value=value)
    counts = [[2] if number in MISSING else [0] for number in range(len(SHAPES))]
    assert answers == [(True, counts, [])] * 4


def one_matrix_of_several_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    views = [MatrixView.experts(), MatrixView(blocks=(6, 3, 3))]
    shapes = [(3, 8, 5), (12, 7)]
    alone = [nn.Parameter(start) for start in weights(shapes)]
    shared = distributed(shapes, mesh, [Shard(0)])
    one, many = (
        NorMuon(
            [{"params": [p], "view": view} for p, view in zip(params, views, strict=True)],
            lr=1e-2,
            skip_nonfinite=True,
            bucket_bytes=BUCKET_BYTES,
        )
        for params in (alone, shared)
    )
    for step in range(4):
        for number, (a, b) in enumerate(zip(alone, shared, strict=True)):
            grad = gradient(a.shape, step, number)
            if step == 1:
                grad[(1, 2, 3) if number == 0 else (7, 1)] = float("nan")
            a.grad, b.grad = grad, spread(grad, mesh, [Shard(0)])
        one.step()
        many.step()
    counts = [whole(many.state[b]["skipped_steps"]).tolist() for b in shared]
    return counts, differing(values(alone, one), values(shared, many))


def test_a_nonfinite_expert_or_fused_block_stops_alone(ranks):
    answers = ranks.run(one_matrix_of_several_case, 3)
    assert answers == [([[0, 1, 0], [0, 1, 0]], [])] * 3


def ddp_case(rank, world_size):
    """Plain tensors: a gradient no rank has, and a NaN that DDP's all-reduce gave to all."""
    alone = [nn.Parameter(start) for start in weights(SHAPES)]
    shared = [nn.Parameter(start) for start in weights(SHAPES)]
    one = optimizer_of(alone, skip_nonfinite=True)
    many = optimizer_of(shared, skip_nonfinite=True, process_group=dist.group.WORLD)
    for step in range(4):
        for number, (a, b) in enumerate(zip(alone, shared, strict=True)):
            grad = gradient(a.shape, step, number)
            if step == 1 and number in MISSING:
                grad[0, 0] = float("nan")
            missing = step == 2 and number in MISSING
            a.grad = None if missing else grad
            b.grad = None if missing else grad.clone()
        one.step()
        many.step()
    return differing(values(alone, one), values(shared, many))


def test_ddp_skips_what_one_process_skips(ranks):
    assert ranks.run(ddp_case, 3) == [[]] * 3


def dtensors_stay_dtensors_case(rank, world_size):
    """State made late, by turning skip_nonfinite on between steps, is placed like the rest."""
    mesh = init_device_mesh("cpu", (world_size,))
    params = distributed(SHAPES, mesh, [Shard(0)])
    optimizer = optimizer_of(params)
    set_gradients(params, mesh, [Shard(0)], 0)
    optimizer.step()
    for group in optimizer.param_groups:
        group["skip_nonfinite"] = True
    set_gradients(params, mesh, [Shard(0)], 1)
    if rank == 1:
        params[0].grad.to_local().fill_(float("nan"))
    optimizer.step()
    counts = [optimizer.state[p]["skipped_steps"] for p in params]
    return all(isinstance(c, DTensor) for c in counts), [whole(c).tolist() for c in counts]


def test_skip_nonfinite_may_be_turned_on_between_steps(ranks):
    assert ranks.run(dtensors_stay_dtensors_case, 2) == [(True, [[1]] + [[0]] * 9)] * 2
