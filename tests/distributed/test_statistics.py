"""Statistics of a step are the same on every layout, and the same on every rank.

What owners find of whole matrices is equal bit by bit, as the step is. Sums over weights are taken
by shard in float32 rows, so they agree to 1e-6; so do the figures of `adamw` parameters, whose step
itself is equal to that.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from normuon import MatrixView, NorMuon
from tests.distributed.parity import PLACEMENTS, gradient, spread, weights
from tests.distributed.test_teams import exchanges_cost_nothing, slabs_of

STEPS = 3
SHAPES = [(17, 5), (18, 40), (24, 16), (1, 9), (9, 1), (2, 3)]
EXPERTS, QKV, VECTORS = (5, 8, 12), (24, 18), [(7,), (9, 4)]
ALL = [*SHAPES, EXPERTS, QKV, *VECTORS]
TOLERANCE = 1e-6


def groups_of(params, **options):
    """Matrices of three views, a Muon group and an `adamw` group."""
    first = len(SHAPES)
    return [
        {"params": params[: first - 2], **options},
        {"params": params[first - 2 : first], "algorithm": "muon"},
        {"params": [params[first]], "view": MatrixView.experts()},
        {"params": [params[first + 1]], "view": MatrixView.fused(14, 5, 5)},
        {"params": params[first + 2 :], "algorithm": "adamw"},
    ]


def figures(params, *, missing=(), poisoned=(), steps=STEPS, groups=groups_of, **options):
    """What the last of some steps did, by group and by matrix."""
    optimizer = NorMuon(groups(params), lr=1e-2, **options)
    optimizer.record_statistics(every=steps - 1)  # The first and the last.
    for step in range(steps):
        for number, param in enumerate(params):
            grad = gradient(param.shape, step, number).to(param.dtype)
            if number == 1:
                grad[3] = 0.0  # A row that stays dead.
            if step == steps - 1 and number in poisoned:
                grad.view(-1)[0] = float("nan")
            if isinstance(param, DTensor):
                grad = spread(grad, param.device_mesh, param.placements)
            param.grad = None if step == steps - 1 and number in missing else grad
        optimizer.step()
    return optimizer, optimizer.statistics().to_dict(per_matrix=True)


def alone(**options):
    return figures([nn.Parameter(start) for start in weights(ALL)], **options)[1]


def placed(mesh, placements):
    def place(start):
        # A vector has no columns to shard.
        fits = [p if getattr(p, "dim", 0) < start.ndim else Replicate() for p in placements]
        return nn.Parameter(spread(start, mesh, fits))

    return [place(start) for start in weights(ALL)]


def differing(one, many, tolerance=TOLERANCE):
    assert one.keys() == many.keys(), one.keys() ^ many.keys()
    exact = ("effective_rank", "spread", "dead_rows", "skipped_steps")
    found = []
    for name, value in one.items():
        # A sum of a handful of terms, of which groups have parts, may round in another order.
        limit = 1e-12 if any(word in name for word in exact) else tolerance
        if abs(many[name] - value) > limit * abs(value):
            found.append(f"{name}: {value!r} and {many[name]!r}")
    return found


def flat_case(rank, world_size, placement, options):
    mesh = init_device_mesh("cpu", (world_size,))
    _, many = figures(placed(mesh, [PLACEMENTS[placement]]), bucket_bytes=4096, **options)
    return differing(alone(**options), many), many


def same_everywhere(found):
    differences, values = zip(*found, strict=True)
    assert list(differences) == [[]] * len(found)
    assert all(value == values[0] for value in values), "ranks have different numbers"


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_number_of_ranks(ranks, world_size, placement):
    """Rows, columns or copies; more ranks than rows."""
    same_everywhere(ranks.run(flat_case, world_size, placement=placement, options={}))


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize(
    "options",
    [
        {"skip_nonfinite": True, "poisoned": (0, 6, 8)},
        {"missing": (1, 4, 9)},
        {"adjust_lr_fn": "original", "nesterov": False},
        {"equilibrate": True, "ns_dtype": torch.bfloat16},
        {"orthogonalizer": "gram", "max_scratch_bytes": 1},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option(ranks, placement, options):
    same_everywhere(ranks.run(flat_case, 3, placement=placement, options=options))


def copies_case(rank, world_size):
    """Plain parameters under DDP."""
    params = [nn.Parameter(start) for start in weights(ALL)]
    _, many = figures(params, process_group=dist.group.WORLD)
    return differing(alone(), many), many


def test_copies_under_a_process_group(ranks):
    same_everywhere(ranks.run(copies_case, 3))


def teams_case(rank, world_size, placement, options):
    """To rounding, as the step of teams is; in float64, since one device goes other ways."""

    def in_float64(params):
        return [nn.Parameter(param.detach().double()) for param in params]

    mesh = init_device_mesh("cpu", (world_size,))
    with exchanges_cost_nothing():
        params = in_float64(placed(mesh, [PLACEMENTS[placement]]))
        optimizer, many = figures(params, teams="auto", **options)
    cuts = {task.split.cuts_rows for task in optimizer._sharded_steps[0].plan.tasks if task.slab}
    assert slabs_of(optimizer)
    one = figures(in_float64(weights(ALL)), **options)[1]
    found = [
        f"{name}: {value!r} and {many[name]!r}"
        for name, value in one.items()
        if abs(many[name] - value) > 1e-6 * abs(value) + 1e-9
    ]
    return found, many, cuts


@pytest.mark.parametrize("options", [{}, {"skip_nonfinite": True, "poisoned": (0, 1, 6)}], ids=str)
def test_teams_that_divide_a_matrix(ranks, options):
    found = ranks.run(teams_case, 8, placement="shard_rows", options=options)
    same_everywhere([(differences, values) for differences, values, _ in found])
    assert set().union(*(cuts for *_, cuts in found)) == {False, True}, "rows and columns are cut"


def disagreement_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    (param,) = (nn.Parameter(spread(w, mesh, [Shard(0)])) for w in weights([(6, 4)]))
    optimizer = NorMuon([param], lr=1e-2)
    messages = []
    for step in range(2):
        if step == 1 and rank == 1:
            optimizer.record_statistics()
        param.grad = spread(gradient((6, 4), step, 0), mesh, [Shard(0)])
        try:
            optimizer.step()
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_ranks_of_which_some_measure_all_raise(ranks):
    found = ranks.run(disagreement_case, 2)
    assert found[0] == found[1]
    assert "'record_statistics() measures this step: False' on rank 0" in found[0][0]


def own_experts_case(rank, world_size):
    """Parameters of which every rank has its own are not summed with others'."""
    mesh = init_device_mesh("cpu", (world_size,))
    shared = nn.Parameter(spread(weights([(6, 4)])[0], mesh, [Shard(0)]))
    own = nn.Parameter(gradient((5, 3), 7, rank))
    optimizer = NorMuon([{"params": [shared, own]}], lr=1e-2)
    optimizer.record_statistics()
    shared.grad = spread(gradient((6, 4), 0, 0), mesh, [Shard(0)])
    own.grad = gradient((5, 3), 8, rank)
    optimizer.step()
    found = optimizer.statistics().to_dict(per_matrix=True)
    total = 24 * found["group 0 parameter 0/weight_rms"] ** 2
    total += float(own.detach().square().sum())
    assert abs(found["group0.normuon/weight_rms"] - (total / 39) ** 0.5) < 1e-6
    return found["group 0 parameter 0/weight_rms"], found["group 0 parameter 1/weight_rms"]


def test_parameters_of_ones_own_beside_shared_ones(ranks):
    first, second = ranks.run(own_experts_case, 2)
    assert first[0] == second[0]
    assert first[1] != second[1]


MESHES = {
    "hsdp_rows": [Replicate(), Shard(0)],
    "hsdp_columns": [Replicate(), Shard(1)],
    "rows_and_columns": [Shard(0), Shard(1)],
    "rows_twice": [Shard(0), Shard(0)],
    "shard_then_copy": [Shard(0), Replicate()],
}


def mesh_case(rank, world_size, placements):
    mesh = init_device_mesh("cpu", (2, 2))
    _, many = figures(placed(mesh, MESHES[placements]))
    return differing(alone(), many), many


@pytest.mark.parametrize("placements", list(MESHES))
def test_two_dimensional_meshes(ranks, placements):
    """HSDP, FSDP x TP and their like."""
    same_everywhere(ranks.run(mesh_case, 4, placements=placements))
