"""`plan_for`: a plan from groups and placements alone, equal to what the live step draws up."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import normuon
from normuon.distributed.plan import Sharing
from normuon.step.sharded import ShardedStep
from normuon.step.shared_params import shared_params
from tests.planned import bytes_sent, every_route, plain_flops

ROWS = [("shard", 0)]


def tiny_model() -> nn.Module:
    """Two matrices, [8, 4] and [4, 8], and what AdamW takes."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False))


def groups_of(model: nn.Module, **kwargs) -> list[dict]:
    """All Linears hidden."""
    matrices = {
        f"{n}.weight": "normuon" for n, m in model.named_children() if hasattr(m, "in_features")
    }
    return normuon.param_groups(model, overrides=matrices, **kwargs)


def test_hand_checked_numbers_of_two_matrices_on_two_ranks():
    plan = normuon.plan_for(groups_of(tiny_model()), mesh_shape=(2,), placements=ROWS)
    # s = 4, l = 8: five steps of 4 * 16 * 8 + 2 * 64.
    # Segments of 3 and 2 steps: two Gram matrices and two applications of 2 * 4 * 4 * 8, and
    # 9 + 5 products of 2 * 4^3.
    assert plan.flops_by_matrix == (2816, 2816)
    assert plan.flops_by_rank == (2816, 2816)
    assert plan.imbalance == 1.0
    # 16 of 32 bfloat16 elements of each matrix travel there and back: 2 * 16 * 2 bytes each way.
    # With them half of 8 + 4 float32 second moments, and back a scale for each matrix.
    assert bytes_sent(plan, "gather").total() == 64 + (4 + 2) * 4
    assert bytes_sent(plan, "return").total() == 64 + (4 + 2) * 4 + 2 * 4


def test_placements_may_depend_on_the_parameter():
    seen = {}

    def placements(name, param):
        seen[name] = tuple(param.shape)
        return [("shard", 1)] if name.startswith("2") else [("replicate",)]

    plan = normuon.plan_for(groups_of(tiny_model()), mesh_shape=(2,), placements=placements)
    assert seen == {"0.weight": (8, 4), "2.weight": (4, 8)}
    first, second = (task.layout for task in plan.tasks)
    assert [layout.local_shape(0) for layout in (first, second)] == [(8, 4), (4, 4)]


def test_options_that_the_groups_set_are_heeded():
    groups = groups_of(tiny_model(), hidden={"ns_steps": 2, "ns_dtype": torch.float32})
    plan = normuon.plan_for(groups, mesh_shape=(2,), placements=ROWS)
    # One segment of two steps: 2 * 256 + 5 * 128.
    assert plan.flops_by_matrix == (1152, 1152)
    assert {task.wire_bytes for task in plan.tasks} == {4}
    plan = normuon.plan_for(groups, mesh_shape=(2,), placements=ROWS, wire_dtype=torch.bfloat16)
    assert plan.flops_by_matrix == (1152, 1152)
    assert {task.wire_bytes for task in plan.tasks} == {2}
    plain = [{**group, "orthogonalizer": "newton_schulz", "ns_steps": 5} for group in groups]
    plan = normuon.plan_for(plain, mesh_shape=(2,), placements=ROWS)
    assert plan.flops_by_matrix == (plain_flops(8, 4),) * 2


def test_double_precision_travels_in_double_precision():
    plan = normuon.plan_for(groups_of(tiny_model().double()), mesh_shape=(2,), placements=ROWS)
    assert {(task.wire_bytes, task.side_bytes) for task in plan.tasks} == {(8, 8)}


def test_muon_groups_send_no_second_moments():
    groups = normuon.param_groups(tiny_model(), overrides={"1.*": "adamw", "?.weight": "muon"})
    plan = normuon.plan_for(groups, mesh_shape=(2,), placements=ROWS)
    assert bytes_sent(plan, "gather").total() == 64
    assert bytes_sent(plan, "return").total() == 64
    routes = every_route(plan, "gather") + every_route(plan, "return")
    assert {route.entries for route in routes} == {()}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh_shape": (2,)}, "go together"),
        ({"mesh_shape": (2,), "placements": [("shard", 7)]}, r"0\.weight \[8, 4\].*2 dims"),
        ({"mesh_shape": (2,), "placements": ROWS, "balance": "best"}, "balance='best'"),
        ({"mesh_shape": (2,), "placements": ROWS, "bucket_bytes": 0}, "bucket_bytes=0"),
        (
            {"mesh_shape": (2,), "placements": ROWS, "wire_dtype": torch.int8},
            "wire_dtype=torch.int8",
        ),
        ({}, "no hidden matrix that ranks share"),
    ],
)
def test_errors_name_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        normuon.plan_for(groups_of(tiny_model()), **options)


@pytest.fixture
def four_fake_ranks():
    """Rank 0 of four, of which nothing is ever sent."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield init_device_mesh("cpu", (4,))
    dist.destroy_process_group()


def test_live_dtensors_give_the_live_step_s_own_plan(four_fake_ranks, monkeypatch):
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False))
    for layer in model:
        layer.weight = nn.Parameter(
            distribute_tensor(layer.weight.detach(), four_fake_ranks, [Shard(0)])
        )
    optimizer = normuon.NorMuon(groups_of(model), ns_dtype=torch.float32)
    plan = normuon.plan_for(optimizer.param_groups)
    # A fake group answers nothing, so there is nobody to agree with.
    monkeypatch.setattr("normuon.step.sharded.check_agreement", lambda *args, **kwargs: None)
    (shared,) = shared_params(optimizer.param_groups, optimizer.state, process_group=None)
    live = ShardedStep(shared, Sharing(bucket_bytes=plan.bucket_bytes)).plan
    assert list(plan.lines()) == list(live.lines())
    assert plan.digest() == live.digest()
    offline = normuon.plan_for(
        optimizer.param_groups,
        mesh_shape=(4,),
        placements=ROWS,
    )
    assert offline.owners == live.owners
    assert offline.buckets == live.buckets
    for direction in ("gather", "return"):
        assert every_route(offline, direction) == every_route(live, direction)
        assert bytes_sent(offline, direction) == bytes_sent(live, direction)


def test_plain_parameters_take_the_process_group(four_fake_ranks):
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False))
    groups = groups_of(model)
    plan = normuon.plan_for(groups, process_group=dist.group.WORLD)
    assert plan.world_size == 4
    assert len(plan.tasks) == 2


def test_a_groups_own_process_group_is_heeded(four_fake_ranks):
    """As in the live step, where a group may say that other ranks hold its parameters alike."""
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False))
    groups = groups_of(model)
    plan = normuon.plan_for([{**group, "process_group": dist.group.WORLD} for group in groups])
    assert plan.world_size == 4
    assert len(plan.tasks) == 2
