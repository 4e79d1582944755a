"""The comparisons of this folder fail when the step is wrong: each fault is planted and found."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from normuon import NorMuon, sharded_step
from normuon.distributed import plan as plan_module
from tests.distributed.parity import (
    differing,
    distributed,
    gradient,
    spread,
    values,
    weights,
)

SHAPES = [(17, 5), (18, 40), (24, 24)]


@contextmanager
def scale_per_shard(rank):
    """Line 6 from this shard's elements alone, as public FSDP implementations have it."""
    apply_piece = sharded_step.ShardedStep._apply_piece

    def wrong(self, route, elements, scale):
        step, task = self._step_of(route.task), self.plan.tasks[route.task]
        rows = sharded_step._along_neurons(step, task, route.region)
        normalized = elements.view(route.region.shape) / (rows.sqrt() + step.options.eps)
        own = 0.2 * normalized.numel() ** 0.5 / normalized.norm()
        apply_piece(self, route, elements, own)

    with mock.patch.object(sharded_step.ShardedStep, "_apply_piece", wrong):
        yield


@contextmanager
def one_route_dropped(rank):
    """The last piece that comes back to this rank is not applied."""
    receive = sharded_step.ShardedStep._apply

    def wrong(self, routes):
        receive(self, routes[:-1] if rank == 1 else routes)

    with mock.patch.object(sharded_step.ShardedStep, "_apply", wrong):
        yield


@contextmanager
def stale_second_moments(rank):
    """The owner uses the new v and sends the old one back."""
    update = sharded_step.update_whole_matrices

    def wrong(direction, v, **kwargs):
        found = update(direction, v, **kwargs)
        found.v_BV = v
        return found

    with mock.patch.object(sharded_step, "update_whole_matrices", wrong):
        yield


@contextmanager
def transposed_neurons(rank):
    """Statistics along the columns where the rows are the neurons."""
    with mock.patch("normuon.rule.neuron_scale", lambda v, *, eps: torch.ones_like(v)):
        yield


@contextmanager
def no_gather(rank):
    """Every owner works with what its buffers held before."""
    with mock.patch.object(sharded_step.ShardedStep, "start_gather", _start_without_packing):
        yield


def _start_without_packing(self, bucket):
    if self.gathers[bucket].exchange is not None:
        for slots in self.gathers[bucket].exchange.outgoing.slots:
            slots.scalars.fill_(sharded_step.GRADIENT)
            slots.elements.zero_()
            slots.neurons.zero_()
        self.gathers[bucket].exchange.start()


@contextmanager
def nothing_wrong(rank):
    yield


FAULTS = {
    "a scale per shard": scale_per_shard,
    "a route dropped": one_route_dropped,
    "stale second moments": stale_second_moments,
    "no neuron scale": transposed_neurons,
    "nothing packed": no_gather,
    "nothing": nothing_wrong,
}


def fault_case(rank, world_size, fault):
    mesh = init_device_mesh("cpu", (world_size,))
    alone = [nn.Parameter(start) for start in weights(SHAPES)]
    shared = distributed(SHAPES, mesh, [Shard(0)])
    one, many = NorMuon(alone, lr=1e-2), NorMuon(shared, lr=1e-2, bucket_bytes=4096)
    for step in range(3):
        for number, (a, b) in enumerate(zip(alone, shared, strict=True)):
            a.grad = gradient(a.shape, step, number)
            b.grad = spread(a.grad, mesh, [Shard(0)])
        one.step()
        with FAULTS[fault](rank):
            many.step()
    return differing(values(alone, one), values(shared, many))


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_planted_fault_is_found(ranks, fault):
    found = ranks.run(fault_case, 3, fault=fault)
    assert len({tuple(answer) for answer in found}) == 1
    if fault == "nothing":
        assert found[0] == []
    else:
        assert any(text.startswith("weight") for text in found[0])


def another_owner_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    params = distributed(SHAPES, mesh, [Shard(0)])
    optimizer = NorMuon([(f"w{i}", p) for i, p in enumerate(params)], lr=1e-2)
    for number, param in enumerate(params):
        param.grad = spread(gradient(param.shape, 0, number), mesh, [Shard(0)])
    assign = plan_module.assign_owners

    def odd(*args, **kwargs):
        assignment = assign(*args, **kwargs)
        owners = [
            tuple((o + (i == 1)) % world_size for o in own)
            for i, own in enumerate(assignment.owners)
        ]
        return replace(assignment, owners=tuple(owners))

    try:
        with mock.patch.object(plan_module, "assign_owners", odd if rank == 1 else assign):
            optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


def test_an_owner_changed_on_one_rank_is_found_before_anything_is_sent(ranks):
    for message in ranks.run(another_owner_case, 3):
        assert "rank 0 and rank 1 built different optimizers" in message
        assert "w1[0]: owners" in message
