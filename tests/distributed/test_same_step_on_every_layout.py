"""The step on any number of ranks and any placement equals the step of one process, bit by bit.

Matrix products here round alike in any batch, so equality is exact; every case runs ten steps of
the same gradients on one process and on the ranks, and compares weights and state by value.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from normuon import MatrixView, NorMuon
from tests.distributed.parity import PLACEMENTS, gradient, weights, whole

STEPS = 10
SHAPES = [(17, 5), (18, 40), (72, 24), (1, 9), (9, 1), (16, 16), (2, 3)]


def differences(
    shapes, mesh, placements, groups_of, options, *, dtype=torch.float32, steps=STEPS
) -> list[str]:
    """Names of the weights and states in which the ranks and one process differ after ten steps."""
    starts = [w.to(dtype) for w in weights(shapes)]
    alone = [nn.Parameter(start.clone()) for start in starts]
    sharded = [nn.Parameter(distribute_tensor(s.clone(), mesh, placements)) for s in starts]
    one = NorMuon(groups_of(alone), lr=1e-2, **options)
    many = NorMuon(groups_of(sharded), lr=1e-2, bucket_bytes=4096, **options)
    for step in range(steps):
        for number, (a, b) in enumerate(zip(alone, sharded, strict=True)):
            grad = gradient(tuple(a.shape), step, number).to(dtype)
            a.grad = grad.clone()
            b.grad = distribute_tensor(grad, mesh, placements)
        before = [b.grad.to_local().clone() for b in sharded]
        one.step()
        many.step()
        assert all(
            torch.equal(b.grad.to_local(), g) for b, g in zip(sharded, before, strict=True)
        ), "a gradient was written to"
    found = []
    for number, (a, b) in enumerate(zip(alone, sharded, strict=True)):
        if "exp_avg" in one.state[a]:
            found += adamw_differences(number, a, b, one, many)
            continue
        if not torch.equal(a.detach(), whole(b.detach())):
            error = (a.detach() - whole(b.detach())).abs().max()
            found.append(f"weight {number} {list(a.shape)} by {error:.1e}")
        for key, value in one.state[a].items():
            if not torch.equal(value, whole(many.state[b][key])):
                found.append(f"{key} {number} {list(a.shape)}")
    return found


def adamw_differences(number, a, b, one, many) -> list[str]:
    """torch's fused AdamW on CPU rounds the last elements of a tensor, which do not fill a vector
    register, otherwise than the rest: where a shard ends decides, so equality is to 1e-6."""
    pairs = {"weight": (a.detach(), b.detach())}
    pairs |= {key: (value, many.state[b][key]) for key, value in one.state[a].items()}
    return [
        f"adamw {key} {number} {list(a.shape)}"
        for key, (x, y) in pairs.items()
        if not torch.allclose(x, whole(y), rtol=1e-6, atol=1e-6)
    ]


def one_group(params):
    return [{"params": params}]


def flat_mesh_case(rank, world_size, placement, options, dtype="float32"):
    mesh = init_device_mesh("cpu", (world_size,))
    placements = [PLACEMENTS[placement]]
    return differences(SHAPES, mesh, placements, one_group, options, dtype=getattr(torch, dtype))


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_any_number_of_ranks(ranks, world_size, placement):
    """Rows, columns or copies on 1 to 8 ranks: uneven, empty shards, more ranks than rows."""
    found = ranks.run(flat_mesh_case, world_size, placement=placement, options={})
    assert found == [[]] * world_size


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False, "weight_decay": 0.3},
        {"adjust_lr_fn": "original", "cautious_weight_decay": True},
        {"neuron_axis": "short", "maximize": True},
        {"skip_nonfinite": True, "ns_coefficients": "polar_express"},
        {"balance": "paper", "ns_dtype": torch.bfloat16},
        {"ns_dtype": torch.float32, "momentum_dtype": torch.bfloat16},
        {"ns_dtype": torch.float64},
        {"equilibrate": True},
        {"equilibrate": True, "ns_dtype": torch.bfloat16, "nesterov": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option(ranks, placement, options):
    found = ranks.run(flat_mesh_case, 3, placement=placement, options=options)
    assert found == [[]] * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_other_parameter_dtypes(ranks, placement, dtype):
    found = ranks.run(flat_mesh_case, 4, placement=placement, options={}, dtype=dtype)
    assert found == [[]] * 4


MESHES = {
    "hsdp_rows": [Replicate(), Shard(0)],
    "hsdp_columns": [Replicate(), Shard(1)],
    "rows_and_columns": [Shard(0), Shard(1)],
    "columns_and_rows": [Shard(1), Shard(0)],
    "rows_twice": [Shard(0), Shard(0)],
    "shard_then_copy": [Shard(0), Replicate()],
}


def mesh_case(rank, world_size, placements, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape)
    return differences(SHAPES, mesh, MESHES[placements], one_group, {})


@pytest.mark.parametrize("placements", list(MESHES))
@pytest.mark.parametrize("mesh_shape", [(2, 2), (2, 4)], ids=str)
def test_two_dimensional_meshes(ranks, mesh_shape, placements):
    """HSDP, FSDP x TP and their like: rectangles to owners, and back to every replica."""
    world_size = mesh_shape[0] * mesh_shape[1]
    found = ranks.run(mesh_case, world_size, placements=placements, mesh_shape=mesh_shape)
    assert found == [[]] * world_size


def three_dimensional_case(rank, world_size):
    mesh = init_device_mesh("cpu", (2, 2, 2))
    return differences(SHAPES, mesh, [Replicate(), Shard(0), Shard(1)], one_group, {}, steps=4)


def test_a_three_dimensional_mesh(ranks):
    assert ranks.run(three_dimensional_case, 8) == [[]] * 8


VIEWS = {
    "conv1d": (MatrixView.transposed(), (18, 24)),
    "conv": (MatrixView.conv(), (10, 6, 3, 3)),
    "experts": (MatrixView.experts(), (5, 8, 12)),
    "experts_transposed": (MatrixView.experts(transposed=True), (5, 12, 8)),
    "fused_qkv": (MatrixView.fused(14, 5, 5), (24, 18)),
    "fused_conv1d": (MatrixView.fused(7, 7, 7, neuron_dim=1), (18, 21)),
    "heads": (MatrixView(heads=6), (18, 12)),
}


def view_case(rank, world_size, dim, axis, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape)
    placements = [Shard(dim)] if len(mesh_shape) == 1 else [Shard(dim), Shard(1 - dim)]
    found = []
    for name, (view, shape) in VIEWS.items():
        if axis == "short" and not view.is_whole:
            continue  # Refused: test_errors.py.

        def groups_of(params, view=view):
            return [{"params": params, "view": view, "neuron_axis": axis}]

        found += [
            f"{name}: {text}"
            for text in differences([shape, shape], mesh, placements, groups_of, {}, steps=4)
        ]
    return found


@pytest.mark.parametrize("axis", ["row", "short"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)], ids=str)
def test_views_whose_blocks_cross_shard_borders(ranks, mesh_shape, dim, axis):
    """Fused QKV, heads, experts and transposed weights, cut where no block ends."""
    found = ranks.run(view_case, 4, dim=dim, axis=axis, mesh_shape=mesh_shape)
    assert found == [[]] * 4


def mixed_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))

    def groups_of(params):
        return [
            {"params": params[:2]},
            {"params": params[2:4], "algorithm": "muon", "weight_decay": 0.0},
            {"params": params[4:], "algorithm": "adamw", "weight_decay": 0.05},
        ]

    shapes = [(17, 5), (6, 30), (17, 5), (5, 17), (7,), (9, 4), (1,)]
    return differences(shapes, mesh, [Shard(0)], groups_of, {})


@pytest.mark.parametrize("world_size", [2, 4])
def test_all_three_algorithms_side_by_side(ranks, world_size):
    assert ranks.run(mixed_case, world_size) == [[]] * world_size


def sorted_rows_case(rank, world_size):
    """The case that breaks a norm taken per shard: rows sorted by scale over three decades."""
    mesh = init_device_mesh("cpu", (world_size,))
    start = gradient((256, 64), 999, 0)
    scales = torch.logspace(0, -3, 256)[:, None]
    alone = nn.Parameter(start.clone())
    sharded = nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
    one, many = NorMuon([alone], lr=1e-2), NorMuon([sharded], lr=1e-2)
    for step in range(STEPS):
        grad = gradient((256, 64), step, 0) * scales
        alone.grad, sharded.grad = grad.clone(), distribute_tensor(grad, mesh, [Shard(0)])
        one.step()
        many.step()
    return torch.equal(alone.detach(), whole(sharded.detach()))


def test_rows_sorted_by_scale_over_eight_ranks(ranks):
    assert ranks.run(sorted_rows_case, 8) == [True] * 8


def ddp_case(rank, world_size):
    """Plain tensors under DDP: `process_group=` splits the work and changes no bit."""
    import torch.distributed as dist

    starts = weights(SHAPES)
    alone = [nn.Parameter(start.clone()) for start in starts]
    shared = [nn.Parameter(start.clone()) for start in starts]
    one = NorMuon(alone, lr=1e-2)
    many = NorMuon(shared, lr=1e-2, process_group=dist.group.WORLD)
    for step in range(STEPS):
        for number, (a, b) in enumerate(zip(alone, shared, strict=True)):
            a.grad = gradient(tuple(a.shape), step, number)
            b.grad = a.grad.clone()
        one.step()
        many.step()
    keys = all(set(one.state[a]) == set(many.state[b]) for a, b in zip(alone, shared, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(alone, shared, strict=True))
    states = all(
        torch.equal(value, many.state[b][key])
        for a, b in zip(alone, shared, strict=True)
        for key, value in one.state[a].items()
    )
    return keys and same and states


@pytest.mark.parametrize("world_size", [2, 3])
def test_ddp_replicas_split_the_work(ranks, world_size):
    assert ranks.run(ddp_case, world_size) == [True] * world_size
