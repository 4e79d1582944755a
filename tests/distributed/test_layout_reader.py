"""What the layout reader says of DTensors is what torch stores, up to 1,024 ranks.

On torch's fake process group, where one process plays any rank of any world and nothing is sent.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from normuon import NorMuon
from normuon.distributed.dtensor import shards_of
from normuon.distributed.layout import layout_from_placements
from normuon.distributed.plan import make_plan
from normuon.models.view import MatrixView
from normuon.options import MatrixOptions
from normuon.step.matrix_tasks import tasks_of_param, wire_dtypes
from normuon.step.shared_params import shared_params
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


def shards_and_rank(param, label: str = "w"):
    """What the reader says, and which rank of its group this one is."""
    shards = shards_of(param, label=label, process_group=None)
    return shards.layout, dist.get_rank(shards.group)


def check_content(param, whole: torch.Tensor) -> None:
    """The elements of the regions that the reader names are those that torch stored."""
    layout, rank = shards_and_rank(param)
    regions = list(layout.regions(rank))
    assert sum(region.numel for region in regions) == param.to_local().numel()
    for region in regions:
        stored = param.to_local()[layout.local_slices(rank, region)]
        assert torch.equal(stored, whole[region.slices()])


def check_shapes(model: nn.Module) -> None:
    for name, param in model.named_parameters():
        layout, rank = shards_and_rank(param, name)
        found, local = layout.local_shape(rank), tuple(param.to_local().shape)
        # Which dim of an empty shard is 0 is torch's to say.
        assert found == local or (0 in found and 0 in local), name


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
            check_content(getattr(model, name).weight, starts[f"{name}.weight"])


@pytest.mark.parametrize("rank", [0, 1, 5, 6, 7])
@pytest.mark.parametrize("placements", [[Shard(0), Shard(0)], [Shard(1), Shard(0)]], ids=str)
def test_distribute_tensor_on_two_axes_by_content(rank, placements):
    with playing(rank, 8):
        mesh = init_device_mesh("cpu", (4, 2))
        whole = torch.arange(13 * 7.0).view(13, 7)
        check_content(spread(whole, mesh, placements), whole)


@pytest.mark.parametrize("rank", range(8))
def test_a_mesh_that_lists_ranks_in_another_order_is_read_in_the_groups(rank):
    """A process group is in ascending order of ranks, and a mesh in any."""
    with playing(rank, 8):
        mesh = DeviceMesh("cpu", torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]]))
        whole = torch.arange(13 * 7.0).view(13, 7)
        param = spread(whole, mesh, [Shard(0), Replicate()])
        check_content(param, whole)
        layout, here = shards_and_rank(param)
        assert here == rank
        assert layout.replicas == (0, 0, 0, 0, 1, 1, 1, 1)
        assert layout.local_shape(5) == (4, 7)  # The second of four, as on rank 1.
        assert shards_and_rank(spread(whole, mesh, [Shard(0), Replicate()]))[0] is layout


def test_parameters_of_one_shape_and_placement_share_one_layout():
    """What is computed once for a layout is then computed once for all layers."""
    with playing(0, 8):
        mesh = init_device_mesh("cpu", (8,))
        params = [spread(torch.ones(64, 8), mesh, [Shard(0)]) for _ in range(3)]
        assert len({id(shards_and_rank(param)[0]) for param in params}) == 1


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
        named = [(f"w{i}", p) for i, p in enumerate(params)]
        optimizer = NorMuon(named, bucket_bytes=1 << 16, ns_dtype=torch.float32)
        (shared,) = shared_params(optimizer.param_groups, optimizer.state, process_group=None)
        cost_model = shared.cost_model()
        live = make_plan(
            [task for matrix in shared.matrices for task in matrix.tasks()],
            world_size=16,
            cost_model=cost_model,
            bucket_bytes=1 << 16,
        )
        options = MatrixOptions.from_group(optimizer.param_groups[0])
    tasks = [
        task
        for number, shape in enumerate(shapes)
        for task in tasks_of_param(
            f"w{number}",
            shape,
            MatrixView.linear(),
            place=(0, number),
            layout=layout_from_placements(shape, mesh_shape=mesh_shape, placements=spelled),
            options=options,
            param_dtype=torch.float32,
            ns_dtype=torch.float32,
            device_type="cpu",
            wire=wire_dtypes(torch.float32, torch.float32),
        )
    ]
    offline = make_plan(tasks, world_size=16, cost_model=cost_model, bucket_bytes=1 << 16)
    assert list(live.lines()) == list(offline.lines())
    assert live.digest() == offline.digest()
