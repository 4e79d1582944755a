"""Ranks that divide a matrix take the step that one process takes, to rounding, on every layout."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.utils.flop_counter import FlopCounterMode

from normuon import MatrixView, NorMuon
from normuon.distributed.cost import CostModel
from normuon.step import team
from normuon.step.shared_params import SharedParams
from normuon.step.slabs import Member
from tests.distributed.parity import (
    PLACEMENTS,
    distributed,
    gradient,
    local,
    snapshot,
    spread,
    values,
    weights,
)
from tests.distributed.test_failures import COLLECTIVE_SECONDS, NUM_RANKS, run, start_group

STEPS = 4
SHAPES = [(40, 16), (16, 40), (24, 24), (13, 7)]
FREE = CostModel(
    flops_per_second=1.0, bytes_per_second=1e18, latency_seconds=0.0, node_latency_seconds=0.0
)
"""Rates at which it pays to divide even the smallest matrix."""


@contextmanager
def exchanges_cost_nothing():
    with mock.patch.object(SharedParams, "cost_model", return_value=FREE):
        yield


def slabs_of(optimizer):
    (sharded_step,) = optimizer._sharded_steps
    return [task.slab for task in sharded_step.plan.tasks if task.slab is not None]


def one_group(params, **options):
    return [{"params": params, **options}]


def muon_group(params):
    return one_group(params, algorithm="muon")


def on_ranks(
    mesh, placements, *, shapes=SHAPES, groups_of=one_group, dtype=torch.float64, **options
):
    """Parameters on ranks and their optimizer, whose plan may divide any matrix."""
    params = [nn.Parameter(p.detach().to(dtype)) for p in distributed(shapes, mesh, placements)]
    return params, NorMuon(groups_of(params), lr=1e-2, teams="auto", **options)


def alone(*, shapes=SHAPES, groups_of=one_group, dtype=torch.float64, **options):
    params = [nn.Parameter(start.to(dtype)) for start in weights(shapes)]
    return params, NorMuon(groups_of(params), lr=1e-2, **options)


def set_gradients(params, step, missing=(), poisoned=()):
    for number, param in enumerate(params):
        grad = gradient(param.shape, step, number).to(param.dtype)
        if number in poisoned:
            grad[0, 0] = float("nan")
        if isinstance(param, DTensor):
            grad = spread(grad, param.device_mesh, param.placements)
        param.grad = None if number in missing else grad


def train(params, optimizer, steps=range(STEPS), **faults):
    with exchanges_cost_nothing():
        for step in steps:
            set_gradients(params, step, **faults)
            optimizer.step()


def too_far(first, second, *, rtol=1e-9, atol=1e-10):
    """Where two lists of `values` differ by more than rounding."""
    return [
        f"{key} of parameter {number} by {(a[key].double() - b[key].double()).abs().max():.1e}"
        for number, (a, b) in enumerate(zip(first, second, strict=True))
        for key in a
        if not torch.allclose(a[key].double(), b[key].double(), rtol=rtol, atol=atol)
    ]


def compared(mesh, placements, *, tolerance=None, **kwargs):
    many, one = on_ranks(mesh, placements, **kwargs), alone(**kwargs)
    train(*many)
    train(*one)
    assert slabs_of(many[1]), "nothing was divided"
    return too_far(values(*one), values(*many), **(tolerance or {}))


def flat_mesh_case(rank, world_size, placement, options):
    mesh = init_device_mesh("cpu", (world_size,))
    return compared(mesh, [PLACEMENTS[placement]], **options)


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_any_number_of_ranks(ranks, world_size, placement):
    shapes = SHAPES[: max(1, world_size // 2)]
    found = ranks.run(flat_mesh_case, world_size, placement=placement, options={"shapes": shapes})
    assert found == [[]] * world_size


@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False, "weight_decay": 0.3},
        {"adjust_lr_fn": "original", "cautious_weight_decay": True},
        {"neuron_axis": "short", "maximize": True},
        {"ns_coefficients": "polar_express", "orthogonalizer": "newton_schulz"},
        {"groups_of": muon_group},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option(ranks, options):
    found = ranks.run(flat_mesh_case, 8, placement="shard_rows", options=options)
    assert found == [[]] * 8


def half_case(rank, world_size):
    """float32: one device goes by plain Newton-Schulz where teams go by Gram matrices."""
    mesh = init_device_mesh("cpu", (world_size,))
    options = {"dtype": torch.float32, "ns_dtype": torch.float32, "orthogonalizer": "gram"}
    return compared(mesh, [Shard(0)], tolerance={"rtol": 1e-3, "atol": 1e-5}, **options)


def test_float32(ranks):
    assert ranks.run(half_case, 8) == [[]] * 8


MESHES = {
    "hsdp": ((2, 4), [Replicate(), Shard(0)]),
    "rows and columns": ((2, 4), [Shard(0), Shard(1)]),
    "columns and rows": ((4, 2), [Shard(1), Shard(0)]),
}


def mesh_case(rank, world_size, name):
    mesh_shape, placements = MESHES[name]
    mesh = init_device_mesh("cpu", mesh_shape)
    return compared(mesh, placements)


@pytest.mark.parametrize("name", list(MESHES))
def test_two_dimensional_meshes(ranks, name):
    assert ranks.run(mesh_case, 8, name=name) == [[]] * 8


VIEWS = {
    "experts": ((2, 24, 10), MatrixView.experts()),
    "experts transposed": ((2, 10, 24), MatrixView.experts(transposed=True)),
    "conv": ((8, 4, 3, 3), MatrixView.conv()),
    "tall conv": ((80, 2, 3, 3), MatrixView.conv()),
    "transposed": ((16, 40), MatrixView.transposed()),
    "fused heads": ((24, 10), MatrixView.fused(12, 12, heads=(1, 2))),
}


def view_case(rank, world_size, name):
    shape, view = VIEWS[name]
    mesh = init_device_mesh("cpu", (world_size,))
    return compared(
        mesh, [Shard(0)], shapes=[shape], groups_of=lambda p, **kw: one_group(p, view=view, **kw)
    )


@pytest.mark.parametrize("name", list(VIEWS))
def test_every_view(ranks, name):
    assert ranks.run(view_case, 8, name=name) == [[]] * 8


def gradients_case(rank, world_size):
    """A matrix without a gradient and one with a NaN stay, bit for bit; the others move."""
    mesh = init_device_mesh("cpu", (world_size,))
    many, one = on_ranks(mesh, [Shard(0)], skip_nonfinite=True), alone(skip_nonfinite=True)
    for params, optimizer in (many, one):
        train(params, optimizer, range(2))
    before = [snapshot(param, many[1]) for param in many[0]]
    for params, optimizer in (many, one):
        train(params, optimizer, [2], missing={0}, poisoned={1})
    found = too_far(values(*one), values(*many))
    for number in (0, 1):
        after = snapshot(many[0][number], many[1])
        counts = {"skipped_steps"} if number else set()
        found += [
            f"{key} of {number} moved"
            for key in after.keys() - counts
            if not torch.equal(before[number][key], after[key])
        ]
    return found


def test_missing_and_nonfinite_gradients(ranks):
    assert ranks.run(gradients_case, 8) == [[]] * 8


def checkpoint_case(rank, world_size):
    """Saved where teams divide rows, loaded where they divide columns, and on one process."""
    mesh = init_device_mesh("cpu", (world_size,))
    first = on_ranks(mesh, [Shard(0)])
    train(*first, steps=range(2))
    saved = values(*first)
    second, third, expected = on_ranks(mesh, [Shard(1)]), alone(), alone()
    for params, optimizer in (second, third):
        for param, state in zip(params, saved, strict=True):
            for key, value in state.items():
                tensor = param.detach() if key == "weight" else optimizer.state[param][key]
                if isinstance(tensor, DTensor):
                    value = spread(value, tensor.device_mesh, tensor.placements)
                local(tensor).copy_(local(value))
        train(params, optimizer, steps=range(2, 4))
    train(*expected)
    wanted = values(*expected)
    return too_far(wanted, values(*second)) + too_far(wanted, values(*third))


def test_checkpoints(ranks):
    assert ranks.run(checkpoint_case, 8) == [[]] * 8


def disagreeing_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    params = distributed(SHAPES[:1], mesh, [Shard(0)])
    optimizer = NorMuon(params, teams="off" if rank else "auto")
    with pytest.raises(ValueError, match="differ") as caught:
        train(params, optimizer, [0])
    return str(caught.value)


def test_ranks_that_disagree_all_raise(ranks):
    said = ranks.run(disagreeing_case, 3)
    assert said == said[:1] * 3


def a_slab_left_out(self, part_SS):
    if self.number == 1:
        part_SS.zero_()
    yield from sum_squares_(self, part_SS)


def no_sum(self, part_SS):
    yield from self._share([part_SS])


def first_slab_only(self, tensor):
    return (yield from self.gathered(tensor))[0]


sum_squares_ = Member.sum_squares_
FAULTS = {
    "a slab left out": ("sum_squares_", a_slab_left_out),
    "v from one slab": ("summed", first_slab_only),
}


def fault_case(rank, world_size, fault):
    mesh = init_device_mesh("cpu", (world_size,))
    with mock.patch.object(Member, *FAULTS[fault]):
        return compared(mesh, [Shard(0)], shapes=[(16, 40)])


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_found(ranks, fault):
    for found in ranks.run(fault_case, 4, fault=fault):
        assert any("weight" in difference for difference in found)


def nothing_sent_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    with mock.patch.object(team, "exchange_tensors"):
        return compared(mesh, [Shard(0)], shapes=[(16, 40)])


def test_an_exchange_left_out_is_found(ranks):
    for found in ranks.run(nothing_sent_case, 4):
        assert any("weight" in difference for difference in found)


def flops_case(rank, world_size, shape):
    """FLOPs that this rank has done in one step, and those that the plan says."""
    mesh = init_device_mesh("cpu", (world_size,))
    params, optimizer = on_ranks(mesh, [Shard(0)], shapes=[shape], dtype=torch.float32)
    train(params, optimizer, [0])
    counted = FlopCounterMode(display=False)
    with counted:
        train(params, optimizer, [1])
    (sharded_step,) = optimizer._sharded_steps
    assert len(slabs_of(optimizer)) == world_size
    return counted.get_total_flops(), sharded_step.plan.flops_by_rank[rank]


@pytest.mark.parametrize("world_size", [4, 8])
@pytest.mark.parametrize("shape", [(1024, 256), (512, 512)], ids=str)
def test_every_rank_does_the_operations_that_are_planned(ranks, world_size, shape):
    for counted, planned in ranks.run(flops_case, world_size, shape=shape):
        assert counted == planned


def dying(rank: int, folder: str) -> None:
    """Rank 1 dies at the third exchange of its team."""
    start_group(rank, folder, "team")
    mesh = init_device_mesh("cpu", (NUM_RANKS,))
    params, optimizer = on_ranks(mesh, [Shard(0)], shapes=SHAPES[:1])
    train(params, optimizer, [0])
    calls = []
    exchange = team.exchange_tensors

    def until_the_third(*args, **kwargs):
        calls.append(1)
        if rank == 1 and len(calls) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        exchange(*args, **kwargs)

    started = time.monotonic()
    try:
        with mock.patch.object(team, "exchange_tensors", until_the_third):
            train(params, optimizer, [1])
    except RuntimeError:
        Path(f"{folder}/end-{rank}").write_text(str(time.monotonic() - started))
        os._exit(17)


def test_a_member_that_is_killed_ends_the_others(tmp_path):
    assert run(dying, tmp_path) == [17, -signal.SIGKILL, 17]
    for rank in (0, 2):
        assert float((tmp_path / f"end-{rank}").read_text()) < COLLECTIVE_SECONDS + 5
