"""What the layout reader says of DTensors is what torch stores, up to 1,024 ranks.

On torch's fake process group, where one process plays any rank of any world and nothing is sent.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from normuon import NorMuon
from normuon.distributed.layout import shards_of
from normuon.distributed.mesh_layout import layout_from_placements
from normuon.distributed.plan import make_plan
from normuon.matrix_tasks import tasks_of_param
from normuon.matrix_view import MatrixView
from normuon.sharded_params import cost_model_for, sharded_params
from tests.distributed.parity import spread


@contextmanager
def playing(rank: int, world_size: int):
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Block(nn.Module):
    def __init__(self, width: int = 96, hidden: int = 130) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)
        self.few = nn.Linear(5, 3, bias=False)


def stored_shape(param) -> tuple[int, ...]:
    """The extent of the regions that the reader says this rank stores."""
    shards = shards_of(param, label="w", process_group=None)
    regions = shards.layout.local_regions(shards.rank)
    if not regions:
        return (0,)
    return tuple(max(ends) for ends in zip(*(r.ends for r in regions), strict=True))


def check_shapes(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        local = tuple(param.to_local().shape)
        assert stored_shape(param) == (local if 0 not in local else (0,)), name


@pytest.mark.parametrize("rank", [0, 1, 2, 64, 65, 129, 130, 511, 1023])
@pytest.mark.parametrize(
    ("shape", "names"), [((1024,), ("shard",)), ((8, 128), ("replicate", "shard"))], ids=str
)
def test_fully_shard_on_1024_ranks(rank, shape, names):
    with playing(rank, 1024):
        with torch.device("meta"):
            model = Block()
        fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
        check_shapes(model)


@pytest.mark.parametrize("rank", range(8))
@pytest.mark.parametrize("hidden", [16, 17, 18, 22, 130])
def test_fsdp2_over_tensor_parallel(rank, hidden):
    """`_StridedShard`: FSDP cuts what TP has cut, also where the sizes do not divide."""
    with playing(rank, 8):
        mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("data", "tensor"))
        model = Block(hidden=hidden)
        del model.few  # The fake process group cannot name the 1-D mesh of an odd rank.
        starts = {name: param.detach().clone() for name, param in model.named_parameters()}
        plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan, src_data_rank=None)
        fully_shard(model, mesh=mesh["data"])
        check_shapes(model)
        for name in ("up", "down"):
            # By content as well: the elements of the regions are those that torch stored.
            param = getattr(model, name).weight
            shards = shards_of(param, label=name, process_group=None)
            for region in shards.layout.regions_by_rank[shards.rank]:
                stored = param.to_local()[shards.local_slices(region)]
                assert torch.equal(stored, starts[f"{name}.weight"][region.slices()])


@pytest.mark.parametrize("rank", [0, 1, 5, 6, 7])
@pytest.mark.parametrize("placements", [[Shard(0), Shard(0)], [Shard(1), Shard(0)]], ids=str)
def test_distribute_tensor_on_two_axes_by_content(rank, placements):
    with playing(rank, 8):
        mesh = init_device_mesh("cpu", (4, 2))
        whole = torch.arange(13 * 7.0).view(13, 7)
        param = spread(whole, mesh, placements)
        shards = shards_of(param, label="w", process_group=None)
        regions = shards.layout.regions_by_rank[rank]
        assert sum(region.numel for region in regions) == param.to_local().numel()
        for region in regions:
            stored = param.to_local()[shards.local_slices(region)]
            assert torch.equal(stored, whole[region.slices()])


PLACED = {
    "fsdp": ((16,), [Shard(0)], [("shard", 0)]),
    "hsdp": ((2, 8), [Replicate(), Shard(0)], [("replicate",), ("shard", 0)]),
    "rows and columns": ((4, 4), [Shard(0), Shard(1)], [("shard", 0), ("shard", 1)]),
}


@pytest.mark.parametrize("rank", [0, 7, 15])
@pytest.mark.parametrize("name", list(PLACED))
def test_a_live_plan_is_the_plan_made_offline(rank, name):
    """Any rank's own plan has the digest of the plan that needs no process at all."""
    mesh_shape, placements, spelled = PLACED[name]
    shapes = [(130, 96), (96, 130), (3, 5), (96, 96), (130, 96)]
    with playing(rank, 16):
        mesh = init_device_mesh("cpu", mesh_shape)
        params = [nn.Parameter(spread(torch.ones(shape), mesh, placements)) for shape in shapes]
        optimizer = NorMuon([(f"w{i}", p) for i, p in enumerate(params)], bucket_bytes=1 << 16)
        (entries,) = sharded_params(optimizer.param_groups, optimizer.state, process_group=None)
        cost_model = cost_model_for(entries)
        live = make_plan(
            [task for entry in entries for task in entry.tasks()],
            world_size=16,
            cost_model=cost_model,
            bucket_bytes=1 << 16,
        )
        key = entries[0].batch_key
    tasks = [
        task
        for number, shape in enumerate(shapes)
        for task in tasks_of_param(
            f"w{number}",
            shape,
            MatrixView.linear(),
            layout=layout_from_placements(shape, mesh_shape=mesh_shape, placements=spelled),
            neuron_axis="row",
            normalizes_neurons=True,
            key=key,
            wire_dtype=live.tasks[0].wire_dtype,
            neuron_dtype=live.tasks[0].neuron_dtype,
        )
    ]
    offline = make_plan(tasks, world_size=16, cost_model=cost_model, bucket_bytes=1 << 16)
    assert live.first_difference(offline) is None
    assert live.digest() == offline.digest()
