"""Plans whose matrices teams divide: who, where, and when it pays."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from normuon import NorMuon, plan_for
from normuon.distributed.cost import CostModel

FAST = CostModel(flops_per_second=2e14, bytes_per_second=4e11)


def planned(shapes, world_size, *, teams="auto", cost_model=FAST, options=None, **kwargs):
    params = [torch.empty(shape, device="meta") for shape in shapes]
    return plan_for(
        [{"params": params, **(options or {})}],
        mesh_shape=(world_size,),
        placements=[("shard", 0)],
        cost_model=cost_model,
        teams=teams,
        **kwargs,
    )


def slabs_by_matrix(plan):
    found = defaultdict(list)
    for index, task in enumerate(plan.tasks):
        if task.slab is not None:
            found[task.param, task.index].append(index)
    return found


LARGE = [(4096, 4096)] * 4 + [(8192, 4096), (4096, 8192), (512, 4096)]


def test_more_ranks_than_large_matrices_are_all_busy():
    alone, divided = planned(LARGE, 32, teams="off"), planned(LARGE, 32)
    assert max(alone.flops_by_rank) > 3 * alone.mean_flops
    assert max(divided.flops_by_rank) < 1.25 * divided.mean_flops
    assert divided.mean_flops == alone.mean_flops
    assert not slabs_by_matrix(alone)


def test_slabs_cover_each_matrix_once_on_ranks_of_one_node():
    plan = planned(LARGE, 32)
    matrices = slabs_by_matrix(plan)
    assert len(matrices) >= 6
    for indices in matrices.values():
        tasks = [plan.tasks[index] for index in indices]
        slabs = [task.slab for task in tasks]
        assert [slab.number for slab in slabs] == list(range(slabs[0].team.size))
        ranks = slabs[0].ranks
        assert [plan.owners[index] for index in indices] == [(rank,) for rank in ranks]
        assert len(set(ranks)) == len(ranks) <= 8
        assert len({rank // FAST.ranks_per_node for rank in ranks}) == 1
        assert sum(task.numel for task in tasks) == slabs[0].rows * slabs[0].cols
        split = tasks[0].split
        assert all((task.cols if split.cuts_rows else task.rows) == split.short for task in tasks)
        assert all("divided among" in plan.reasons[index] for index in indices)


@pytest.mark.parametrize("bucket_bytes", [1, 2**20, 2**30])
def test_slabs_of_a_matrix_are_in_one_bucket(bucket_bytes):
    plan = planned(LARGE, 32, bucket_bytes=bucket_bytes)
    bucket_of = {index: n for n, bucket in enumerate(plan.buckets) for index in bucket}
    assert sorted(bucket_of) == list(range(len(plan.tasks)))
    for indices in slabs_by_matrix(plan).values():
        assert len({bucket_of[index] for index in indices}) == 1
    swaps = [plan.num_swaps(n) for n in range(len(plan.buckets))]
    assert max(swaps) > 10


@pytest.mark.parametrize(
    "cost_model",
    [
        CostModel(node_latency_seconds=1.0, latency_seconds=1.0),
        CostModel(bytes_per_second=1e6),
    ],
)
def test_nothing_is_divided_where_exchanges_cost_more_than_they_save(cost_model):
    assert not slabs_by_matrix(planned(LARGE, 32, cost_model=cost_model))


def test_slow_exchanges_repeat_the_square_products():
    model = CostModel(flops_per_second=2e14, bytes_per_second=5e9)
    tall = [(65536, 2048)] * 2
    teams = {task.slab.team for task in planned(tall, 16, cost_model=model).tasks if task.slab}
    assert teams
    assert not any(team.shares_products for team in teams)
    teams = {task.slab.team for task in planned(tall, 16).tasks if task.slab}
    assert all(team.shares_products for team in teams)


def test_nothing_is_divided_where_owners_are_evenly_busy():
    assert not slabs_by_matrix(planned([(1024, 1024)] * 64, 8))


@pytest.mark.parametrize(
    "options",
    [{"equilibrate": True}, {"orthogonalizer": lambda x: x}],
    ids=["equilibrate", "a callable"],
)
def test_what_needs_whole_matrices_is_not_divided(options):
    assert not slabs_by_matrix(planned(LARGE, 32, options=options))


def test_plans_differ_in_their_digest():
    assert planned(LARGE, 32).digest() == planned(LARGE, 32).digest()
    assert planned(LARGE, 32).digest() != planned(LARGE, 32, teams="off").digest()


def test_options_are_checked():
    param = torch.nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="teams='always' is not known; choose from 'off', 'auto'"):
        NorMuon([param], teams="always")
    with pytest.raises(ValueError, match="use balance='flops'"):
        NorMuon([param], teams="auto", balance="paper")
    with pytest.raises(ValueError, match="ranks_per_node=0"):
        CostModel(ranks_per_node=0)
