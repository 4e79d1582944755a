"""Statistics of a step are the same on every layout, and the same on every rank.

What owners find of whole matrices is equal bit by bit, as the step is. Sums over weights are taken
by shard in float32 rows, so they agree to 1e-6; so do the figures of `adamw` parameters, whose step
itself is equal to that.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from normuon import MatrixView, NorMuon
from tests.distributed.parity import PLACEMENTS, gradient, spread, weights

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
