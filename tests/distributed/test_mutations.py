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

from normuon import NorMuon
from normuon.distributed import plan as plan_module
from normuon.step import owners, sharded
from normuon.step.sharded import ShardedStep
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
    apply = sharded.apply_

    def wrong(batch, o_KRC, state, summary, **kwargs):
        normalized = o_KRC / (state["second_momentum_buffer"].sqrt() + 1e-8)[:, :, None]
        own_K = 0.2 * normalized[0].numel() ** 0.5 / normalized.norm(dim=(1, 2))
        apply(batch, o_KRC, state, {"scale": own_K[:, None]}, **kwargs)

    with mock.patch.object(sharded, "apply_", wrong):
        yield


@contextmanager
def copies_changed(transfer, end, kind, change):
    """Some of a bucket's copies changed: elements (0) or vectors (1), of one end of a transfer."""
    lay_out = ShardedStep.step_

    def wrong(self):
        plans = [getattr(getattr(b, transfer), end)[kind] for b in self.buckets]
        kept = [plan._copies for plan in plans]
        for plan in plans:
            plan._copies = change(plan._copies)
        try:
            lay_out(self)
        finally:
            for plan, copies in zip(plans, kept, strict=True):
                plan._copies = copies

    with mock.patch.object(ShardedStep, "step_", wrong):
        yield


@contextmanager
def one_route_dropped(rank):
    """The last pieces that come back to one rank are not taken out of the message."""
    drop = (lambda copies: copies[:-1]) if rank == 1 else (lambda copies: copies)
    with copies_changed("home", "out_of_message", 0, drop):
        yield


@contextmanager
def stale_second_moments(rank):
    """The owner uses the new v and sends the old one back."""
    update = owners.orthogonalize_

    def wrong(direction, state, **kwargs):
        found = update(direction, state, **kwargs)
        found.state = dict(state)
        return found

    with mock.patch.object(owners, "orthogonalize_", wrong):
        yield


@contextmanager
def no_neuron_scale(rank):
    """Lines 4 and 5 left out."""
    with mock.patch("normuon.step.rule.neuron_scale", lambda v, *, eps: torch.ones_like(v)):
        yield


@contextmanager
def no_gather(rank):
    """Every owner works with what its message held before."""
    with copies_changed("there", "into_message", 0, lambda copies: []):
        yield


@contextmanager
def no_second_moments_gathered(rank):
    """Directions travel and v does not."""
    with copies_changed("there", "into_message", 1, lambda copies: []):
        yield


@contextmanager
def a_shard_kept_back(rank):
    """What an owner stores itself does not get into the matrices that it owns."""
    with copies_changed("there", "within", 0, lambda copies: []):
        yield


@contextmanager
def nothing_wrong(rank):
    yield


FAULTS = {
    "a scale per shard": scale_per_shard,
    "a route dropped": one_route_dropped,
    "stale second moments": stale_second_moments,
    "no neuron scale": no_neuron_scale,
    "nothing packed": no_gather,
    "v not packed": no_second_moments_gathered,
    "a shard kept back": a_shard_kept_back,
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
