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
from normuon.distributed.cost import CostModel
from normuon.sharded_params import sharded_params
from normuon.sharded_step import ShardedStep

ROWS = [("shard", 0)]


def tiny_model() -> nn.Module:
    """Two matrices, [8, 4] and [4, 8], and what AdamW takes."""
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False))


def test_hand_checked_numbers_of_two_matrices_on_two_ranks():
    plan = normuon.plan_for(normuon.param_groups(tiny_model()), mesh_shape=(2,), placements=ROWS)
    # s = 4, l = 8: five steps of 4 * 16 * 8 + 2 * 64.
    # Segments of 3 and 2 steps: two Gram matrices and two applications of 2 * 4 * 4 * 8, and
    # 9 + 5 products of 2 * 4^3.
    assert plan.flops_by_matrix == (2816, 2816)
    assert plan.flops_by_rank == (2816, 2816)
    assert plan.imbalance == 1.0
    # 16 of 32 bfloat16 elements of each matrix travel there and back.
    assert plan.bytes_least_total == 2 * 2 * 16 * 2
    # With half of 8 + 4 float32 neurons each way, and a float32 flag there and scale back.
    assert plan.bytes_sent_total == 128 + 2 * (4 + 2) * 4 + 2 * 2 * 4


def test_placements_may_depend_on_the_parameter():
    seen = {}

    def placements(name, param):
        seen[name] = tuple(param.shape)
        return [("shard", 1)] if name.startswith("2") else [("replicate",)]

    plan = normuon.plan_for(
        normuon.param_groups(tiny_model()), mesh_shape=(2,), placements=placements
    )
    assert seen == {"0.weight": (8, 4), "2.weight": (4, 8)}
    first, second = (task.layout for task in plan.tasks)
    assert [layout.numel_on(0) for layout in (first, second)] == [32, 16]


def test_options_that_the_groups_set_are_heeded():
    groups = normuon.param_groups(tiny_model(), hidden={"ns_steps": 2, "ns_dtype": torch.float32})
    plan = normuon.plan_for(groups, mesh_shape=(2,), placements=ROWS)
    # One segment of two steps: 2 * 256 + 5 * 128.
    assert plan.flops_by_matrix == (1152, 1152)
    assert {task.wire_dtype for task in plan.tasks} == {"float32"}
    given = CostModel(flops=lambda m, n: m)
    plan = normuon.plan_for(
        groups, mesh_shape=(2,), placements=ROWS, cost_model=given, wire_dtype="bfloat16"
    )
    assert plan.flops_by_matrix == (8, 4)
    assert {task.wire_dtype for task in plan.tasks} == {"bfloat16"}


def test_muon_groups_send_no_second_moments():
    groups = normuon.param_groups(tiny_model(), overrides={"1.*": "adamw", "?.weight": "muon"})
    plan = normuon.plan_for(groups, mesh_shape=(2,), placements=ROWS)
    assert plan.bytes_sent_total == plan.bytes_least_total + 2 * 2 * 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mesh_shape": (2,)}, "belong together"),
        ({"mesh_shape": (2,), "placements": [("shard", 7)]}, r"0\.weight \[8, 4\].*2 dims"),
        ({"mesh_shape": (2,), "placements": ROWS, "balance": "best"}, "balance='best'"),
        ({"mesh_shape": (2,), "placements": ROWS, "wire_dtype": "int8"}, "wire_dtype='int8'"),
        ({}, "no hidden matrix that ranks share"),
    ],
)
def test_errors_name_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        normuon.plan_for(normuon.param_groups(tiny_model()), **options)


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
    optimizer = normuon.NorMuon(normuon.param_groups(model))
    plan = normuon.plan_for(optimizer.param_groups)
    # A fake group answers nothing, so there is nobody to agree with.
    monkeypatch.setattr("normuon.sharded_step.check_agreement", lambda *args, **kwargs: None)
    (entries,) = sharded_params(optimizer.param_groups, optimizer.state, process_group=None)
    live = ShardedStep(entries, balance="flops", bucket_bytes=plan.bucket_bytes).plan
    assert plan.first_difference(live) is None
    offline = normuon.plan_for(
        optimizer.param_groups,
        mesh_shape=(4,),
        placements=ROWS,
        wire_dtype=plan.tasks[0].wire_dtype,
    )
    assert offline.owners == live.owners
    assert offline.bytes_sent_by_rank == live.bytes_sent_by_rank


def test_plain_parameters_take_the_process_group(four_fake_ranks):
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 6, bias=False))
    groups = normuon.param_groups(model)
    plan = normuon.plan_for(groups, process_group=dist.group.WORLD)
    assert plan.world_size == 4
    assert len(plan.tasks) == 2
