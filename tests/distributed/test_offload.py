"""Offloaded shards step as others do: all that ranks exchange goes to another device and back."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate, Shard

from normuon import MatrixView, NorMuon, param_groups
from normuon.step.sharded import ShardedStep
from tests.distributed.parity import gradient, local, spread, weights
from tests.distributed.test_teams import exchanges_cost_nothing, slabs_of
from tests.staged import ApartStaging, steps_are_staged

MESHES = {
    "one_rank": ((1,), [Shard(0)]),
    "rows": ((2,), [Shard(0)]),
    "columns": ((2,), [Shard(1)]),
    "rows_on_four": ((4,), [Shard(0)]),
    "hsdp": ((2, 2), [Replicate(), Shard(0)]),
    "columns_and_rows": ((2, 2), [Shard(1), Shard(0)]),
    "copies": ((2,), None),
}
SHAPES = [(17, 5), (18, 40), (24, 24), (24, 24), (1, 9), (9, 1), (4, 8, 12), (12, 20), (7, 3)]
STEPS = 4


def trained(mesh, placements, *, dtype="float32", **options):
    """This rank's weights and state after some steps, and the optimizer."""
    dtype = getattr(torch, dtype)
    starts = [start.to(dtype) for start in weights(SHAPES)]
    shared = dist.group.WORLD if placements is None else None
    params = [
        nn.Parameter(start.clone() if placements is None else spread(start, mesh, placements))
        for start in starts
    ]
    groups = [
        {"params": params[:6]},
        {"params": params[6:7], "view": MatrixView.experts()},
        {"params": params[7:8], "algorithm": "muon"},
        {"params": params[8:], "algorithm": "adamw", "cautious_weight_decay": False},
    ]
    options = {"bucket_bytes": 2048, **options}
    optimizer = NorMuon(groups, lr=1e-2, process_group=shared, **options)
    for step in range(STEPS):
        for number, param in enumerate(params):
            grad = gradient(param.shape, step, number).to(dtype)
            if options.get("skip_nonfinite") and step == 1 and number in (0, 6):
                grad.view(-1)[0] = float("nan")
            param.grad = grad if placements is None else spread(grad, mesh, placements)
        if step == 2:
            params[1].grad = params[8].grad = None
        if step == 3 and placements == [Shard(0)] and dist.get_rank() == 0:
            params[2].grad = None  # Others have one: it counts as zero.
        optimizer.step()
    found = [
        {key: local(value) for key, value in {"weight": p, **optimizer.state[p]}.items()}
        for p in params
    ]
    return found, optimizer


def differing(first, second) -> list[str]:
    return [
        f"{key} of parameter {number}"
        for number, (a, b) in enumerate(zip(first, second, strict=True))
        for key in a
        if not torch.equal(a[key], b[key])
    ]


def case(rank, world_size, layout, kind=ApartStaging, **options):
    """Where a staged step differs from a plain one on this rank, and how often memory was lent."""
    mesh_shape, placements = MESHES[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    here, _ = trained(mesh, placements, **options)
    with steps_are_staged(kind) as stagings:
        there, optimizer = trained(mesh, placements, **options)
    for step in optimizer._sharded_steps:
        assert isinstance(step, ShardedStep)
        assert step._staging in stagings
        assert not step._coming_home
        assert not step._vectors_here
    return differing(here, there), sum(staging.num_loans for staging in stagings)


@pytest.mark.parametrize("layout", MESHES)
def test_every_layout_steps_by_way_of_another_device(ranks, layout):
    shape, _ = MESHES[layout]
    world_size = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
    for found, num_loans in ranks.run(case, world_size, layout=layout):
        assert found == []
        assert num_loans >= 5 * STEPS, "several buckets or batches, and the flags"


OPTIONS = [
    {"skip_nonfinite": True},
    {"dtype": "bfloat16", "kahan_sum": True},
    {"dtype": "bfloat16", "kahan_sum": True, "skip_nonfinite": True},
    {"ns_dtype": torch.float16},
    {"ns_dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16},
    {"neuron_axis": "short", "nesterov": False, "equilibrate": True},
    {"cautious_weight_decay": True, "maximize": True, "bucket_bytes": 1},
    {"bucket_bytes": 2**20, "balance": "paper"},
]


@pytest.mark.parametrize("layout", ["rows", "hsdp"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_on_shards(ranks, options, layout):
    world_size = 4 if layout == "hsdp" else 2
    assert [found for found, _ in ranks.run(case, world_size, layout=layout, **options)] == [
        []
    ] * world_size


TEAM_SHAPES = [(40, 16), (16, 40)]


def team_case(rank, world_size):
    """Teams divide matrices where they are computed, which is not where their pieces lie."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = []
    for context in (nullcontext(), steps_are_staged()):
        with context, exchanges_cost_nothing():
            params = [nn.Parameter(spread(w, mesh, [Shard(0)])) for w in weights(TEAM_SHAPES)]
            optimizer = NorMuon(params, lr=1e-2, teams="auto", bucket_bytes=2048)
            for step in range(STEPS):
                for number, param in enumerate(params):
                    param.grad = spread(gradient(param.shape, step, number), mesh, [Shard(0)])
                optimizer.step()
            states = [optimizer.state[param] for param in params]
            found.append(
                [
                    {key: local(value) for key, value in {"weight": p, **state}.items()}
                    for p, state in zip(params, states, strict=True)
                ]
            )
            assert slabs_of(optimizer)
    return differing(*found)


def test_teams_take_offloaded_matrices_too(ranks):
    assert ranks.run(team_case, 4) == [[]] * 4


def model_of(policy, mesh):
    torch.manual_seed(0)
    layers = [nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 17), nn.ReLU(), nn.Linear(17, 5)]
    model = nn.Sequential(*layers)
    for layer in layers[::2]:
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    return fully_shard(model, mesh=mesh, offload_policy=policy)


def policy_case(rank, world_size):
    """FSDP2's own offloading, beside FSDP2 without it."""
    mesh = init_device_mesh("cpu", (world_size,))
    found = []
    for policy, context in (
        (OffloadPolicy(), nullcontext()),
        (CPUOffloadPolicy(pin_memory=False), steps_are_staged()),
    ):
        with context:
            model = model_of(policy, mesh)
            optimizer = NorMuon(param_groups(model), lr=1e-2)
            for step in range(STEPS):
                optimizer.zero_grad()
                model(gradient((6, 12), step, rank)).square().mean().backward()
                optimizer.step()
            found.append(
                [
                    {key: local(v) for key, v in {"weight": p, **optimizer.state[p]}.items()}
                    for p in model.parameters()
                ]
            )
    return differing(*found)


def test_fsdp2s_own_policy_changes_nothing(ranks):
    assert ranks.run(policy_case, 2) == [[]] * 2


class Hasty(ApartStaging):
    """A fault: what comes down is read before it has arrived."""

    def lend(self, name, sizes):
        loan = super().lend(name, sizes)
        if name.startswith("home"):
            loan.wait = lambda: None
        return loan


class Forgetful(ApartStaging):
    """A fault: the next bucket has the memory of the last."""

    def lend(self, name, sizes):
        return super().lend(name.rstrip("01"), sizes)


def test_a_copy_that_is_not_waited_for_is_found(ranks):
    for found, _ in ranks.run(case, 2, layout="rows", kind=Hasty):
        assert "weight of parameter 1" in found
        assert "second_momentum_buffer of parameter 1" in found


def test_memory_of_a_bucket_that_is_still_in_use_is_found(ranks):
    with pytest.raises(AssertionError, match="is lent twice"):
        ranks.run(case, 2, layout="rows", kind=Forgetful)


def mesh_mismatch_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    param = nn.Parameter(spread(weights([(8, 4)])[0], mesh, [Shard(0)]))
    try:
        NorMuon([{"params": [("w", param)], "compute_device": "cuda"}])
    except ValueError as error:
        return str(error)


def test_a_mesh_of_other_devices_is_refused(ranks):
    for message in ranks.run(mesh_mismatch_case, 2):
        assert message == (
            "w [8, 4]: compute_device='cuda', but the parameter's mesh has cpu devices; "
            "leave compute_device=None"
        )
