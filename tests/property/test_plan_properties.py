"""Whatever the mesh, the shapes and the rates: every element travels once, and both ends agree."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon.distributed.assignment import Assignment
from normuon.distributed.cost import SCALAR_BYTES, CostModel
from normuon.distributed.mesh_layout import layout_from_placements
from normuon.distributed.ownership import (
    Job,
    balance_jobs,
    longest_processing_time,
    makespan_bound,
    packing_bound,
)
from normuon.distributed.plan import make_plan, plan_from_assignment
from normuon.distributed.region import Region, ShardLayout
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import tiling_of

STREAMS = ("elements", "neurons", "scalars")
quick = settings(max_examples=60, deadline=None)


@st.composite
def placements_on(draw, mesh_shape, num_dims):
    """Drawn from the last axis to the first, so that some are what FSDP2 over TP makes."""
    placements = []
    later_shards = [1] * num_dims
    for size in reversed(mesh_shape):
        dim = draw(st.integers(0, num_dims - 1))
        fsdp2 = ("strided_shard", dim, later_shards[dim])
        other = ("strided_shard", dim, draw(st.integers(1, 3)))
        placement = draw(st.sampled_from([("replicate",), ("shard", dim), fsdp2, other]))
        if placement != ("replicate",):
            later_shards[dim] *= size
        placements.insert(0, placement)
    return placements


@st.composite
def parameters(draw, mesh_shape, name):
    """The matrices of one parameter: whole, fused blocks, experts or a convolution."""
    kind = draw(st.sampled_from(["whole", "columns", "fused", "experts", "conv"]))
    rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    number = draw(st.integers(1, 4)) if kind in ("fused", "experts") else 1
    shape = {
        "fused": (number * rows, cols),
        "experts": (number, rows, cols),
        "conv": (rows, cols, 2, 1),
    }.get(kind, (rows, cols))
    layout = layout_from_placements(
        shape,
        mesh_shape=mesh_shape,
        placements=draw(placements_on(mesh_shape, len(shape))),
        strided_order=draw(st.sampled_from(["fsdp2", "dtensor"])),
    )
    if draw(st.booleans()):  # Whoever builds a layout by hand may leave replicas to be inferred.
        layout = ShardLayout(layout.global_shape, layout.regions_by_rank)
    regions = {
        "fused": [Region((i * rows, 0), (rows, cols)) for i in range(number)],
        "experts": [Region((i, 0, 0), (1, rows, cols)) for i in range(number)],
    }.get(kind, [Region.whole(shape)])
    return [
        MatrixTask(
            name=name,
            index=index,
            region=region,
            rows=rows,
            cols=region.numel // rows,
            layout=layout,
            neuron_dims={"columns": (1,), "experts": (1,)}.get(kind, (0,)),
            wire_dtype=draw(st.sampled_from(["bfloat16", "bfloat16", "float32"])),
        )
        for index, region in enumerate(regions)
    ]


@st.composite
def plans(draw):
    mesh_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    world_size = math.prod(mesh_shape)
    names = [f"w{i}" for i in range(draw(st.integers(1, 4)))]
    tasks = [task for name in names for task in draw(parameters(mesh_shape, name))]
    model = CostModel(
        flops_per_second=draw(st.sampled_from([1e3, 1e9, 1e15])),
        bytes_per_second=draw(st.sampled_from([1e3, 1e9])),
        replica_bytes_per_second=draw(st.sampled_from([None, 1e2])),
        latency_seconds=draw(st.sampled_from([0.0, 1e-5])),
    )
    return make_plan(
        tasks,
        world_size=world_size,
        cost_model=model,
        balance=draw(st.sampled_from(["flops", "flops", "paper"])),
        bucket_bytes=draw(st.sampled_from([1, 200, 1000, 10**6])),
    )


def routes_of(plan, direction):
    return [
        route
        for bucket in range(len(plan.buckets))
        for rank in range(plan.world_size)
        for route in plan.sends(rank, bucket, direction=direction)
    ]


def cover(task, regions):
    """How often each element of the task's matrix is in `regions`, and whether any is outside."""
    counts = torch.zeros(task.layout.global_shape, dtype=torch.int)
    for region in regions:
        counts[region.slices()] += 1
    inside = counts[task.region.slices()]
    assert counts.sum() == inside.sum()
    return inside


def neurons_covered(task, routes):
    spans = Counter()
    for route in routes:
        if route.num_neurons:
            span = route.region.along(task.neuron_dims)
            assert route.num_neurons == span.numel
            spans[span] += 1
    counts = torch.zeros([task.layout.global_shape[d] for d in task.neuron_dims], dtype=torch.int)
    for span, number in spans.items():
        counts[span.slices()] += number
    return counts[task.region.along(task.neuron_dims).slices()]


@quick
@given(plans())
def test_every_element_and_every_row_of_v_reaches_each_owner_once(plan):
    arrived = {}
    for route in routes_of(plan, "gather"):
        arrived.setdefault((route.task, route.destination), []).append(route)
        stored = plan.tasks[route.task].layout.regions_by_rank[route.source]
        assert any(region.contains(route.region) for region in stored)
        assert route.num_scalars == 1
    expected = {(task, owner) for task, owners in enumerate(plan.owners) for owner in owners}
    assert set(arrived) == expected
    for (index, _), routes in arrived.items():
        task = plan.tasks[index]
        assert (cover(task, [route.region for route in routes]) == 1).all()
        assert (neurons_covered(task, routes) == 1).all()


@quick
@given(plans())
def test_every_stored_element_comes_back_once_with_its_v_and_one_scale(plan):
    returned = {}
    for route in routes_of(plan, "return"):
        returned.setdefault((route.task, route.destination), []).append(route)
        assert route.source in plan.owners[route.task]
    for index, task in enumerate(plan.tasks):
        for rank, stored in enumerate(task.layout.regions_by_rank):
            mine = [common for r in stored if not (common := r.intersect(task.region)).is_empty]
            routes = returned.pop((index, rank), [])
            expected = cover(task, mine)
            assert expected.max() <= 1
            assert torch.equal(cover(task, [route.region for route in routes]), expected)
            assert sum(route.num_scalars for route in routes) == bool(mine)
            rows = torch.zeros_like(neurons_covered(task, []))
            corner = task.region.along(task.neuron_dims)
            for common in mine:
                rows[common.along(task.neuron_dims).relative_to(corner).slices()] = 1
            assert torch.equal(neurons_covered(task, routes), rows)
    assert not returned


@quick
@given(plans())
def test_both_ends_agree_on_every_message(plan):
    for bucket in range(len(plan.buckets)):
        for direction in ("gather", "return"):
            ranks = range(plan.world_size)
            sends = [plan.sends(rank, bucket, direction=direction) for rank in ranks]
            receives = [plan.receives(rank, bucket, direction=direction) for rank in ranks]
            for a in ranks:
                for b in ranks:
                    sent = [route for route in sends[a] if route.destination == b]
                    assert sent == [route for route in receives[b] if route.source == a]
            for stream in STREAMS:
                how = {"direction": direction, "stream": stream}
                sent_counts = [plan.send_counts(rank, bucket, **how) for rank in ranks]
                received = [plan.receive_counts(rank, bucket, **how) for rank in ranks]
                assert all(sent_counts[a][b] == received[b][a] for a in ranks for b in ranks)


@quick
@given(plans())
def test_byte_totals_are_those_of_the_routes(plan):
    sent, received = Counter(), Counter()
    least = 0
    for route in routes_of(plan, "gather") + routes_of(plan, "return"):
        task = plan.tasks[route.task]
        if not route.is_local:
            num_bytes = (
                route.num_elements * task.wire_bytes
                + route.num_neurons * task.neuron_bytes
                + route.num_scalars * SCALAR_BYTES
            )
            sent[route.source] += num_bytes
            received[route.destination] += num_bytes
            least += route.num_elements * task.wire_bytes
    ranks = range(plan.world_size)
    assert plan.bytes_sent_by_rank == tuple(sent[rank] for rank in ranks)
    assert plan.bytes_received_by_rank == tuple(received[rank] for rank in ranks)
    assert plan.bytes_least_total == least
    assert plan.bytes_sent_total == sum(sent.values())


@quick
@given(plans())
def test_no_rank_packs_more_than_a_bucket_may_hold(plan):
    for bucket, content in enumerate(plan.buckets):
        whole = {
            index: plan.tasks[index].numel * plan.tasks[index].wire_bytes
            + plan.tasks[index].num_neurons * plan.tasks[index].neuron_bytes
            + len(tiling_of(plan.tasks[index]).pieces) * SCALAR_BYTES
            for index in content.tasks
        }
        bound = max(plan.bucket_bytes, 2 * max(whole.values()))
        element_bytes = plan.tasks[content.tasks[0]].wire_bytes
        for rank in range(plan.world_size):
            sent = (
                sum(plan.send_counts(rank, bucket)) * element_bytes
                + sum(plan.send_counts(rank, bucket, stream="neurons")) * 4
                + sum(plan.send_counts(rank, bucket, stream="scalars")) * SCALAR_BYTES
            )
            packed = sent + sum(whole[index] for index in plan.owned(rank, bucket))
            assert packed <= bound or len(content.tasks) == 1


@quick
@given(plans())
def test_no_rank_holds_more_on_the_way_back_than_a_bucket_may_hold(plan):
    """Replicas multiply what an owner sends, so the bound is not the gather's."""
    for bucket, content in enumerate(plan.buckets):
        task = plan.tasks[content.tasks[0]]
        held = [0] * plan.world_size
        largest = 0
        for index in content.tasks:
            alone = [0] * plan.world_size
            for rank in range(plan.world_size):
                for route in plan.sends(rank, bucket, direction="return"):
                    if route.task != index or route.source == route.destination:
                        continue
                    num_bytes = (
                        route.num_elements * task.wire_bytes
                        + route.num_neurons * task.neuron_bytes
                        + route.num_scalars * SCALAR_BYTES
                    )
                    alone[route.source] += num_bytes
                    alone[route.destination] += num_bytes
            largest = max(largest, max(alone))
            held = [a + b for a, b in zip(held, alone, strict=True)]
        assert max(held) <= max(plan.bucket_bytes, 2 * largest) or len(content.tasks) == 1


@quick
@given(plans(), st.data())
def test_the_digest_is_that_of_the_input_and_the_owners(plan, data):
    again = make_plan(
        plan.tasks,
        world_size=plan.world_size,
        cost_model=plan.cost_model,
        balance=plan.balance,
        bucket_bytes=plan.bucket_bytes,
    )
    assert again.digest() == plan.digest()
    assert again.first_difference(plan) is None
    task = data.draw(st.integers(0, len(plan.tasks) - 1))
    rank = data.draw(st.integers(0, plan.world_size - 1))
    owners = list(plan.owners)
    owners[task] = (rank,)
    changed = plan_from_assignment(
        plan.tasks,
        Assignment(tuple(owners), plan.reasons),
        world_size=plan.world_size,
        cost_model=plan.cost_model,
        balance=plan.balance,
        bucket_bytes=plan.bucket_bytes,
    )
    assert (changed.digest() == plan.digest()) == (tuple(owners) == plan.owners)
    if tuple(owners) != plan.owners:
        assert plan.tasks[task].label in str(plan.first_difference(changed))
    renamed = [replace(plan.tasks[0], key="other"), *plan.tasks[1:]]
    other = make_plan(renamed, world_size=plan.world_size, cost_model=plan.cost_model)
    assert other.digest() != plan.digest()


def best_makespan(costs, world_size):
    """The optimum, by trying every assignment up to the order of ranks."""
    states = {(0,) * world_size}
    for cost in costs:
        states = {
            tuple(sorted((*loads[:i], loads[i] + cost, *loads[i + 1 :])))
            for loads in states
            for i in range(world_size)
        }
    return min(max(loads) for loads in states)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=9), st.integers(1, 4))
def test_balance_is_within_grahams_factor_and_bounds_are_bounds(costs, world_size):
    """Graham's factor holds against the optimum; the makespan bound may lie below that."""
    jobs = [Job(cost, ("w", i)) for i, cost in enumerate(costs)]
    best = best_makespan(costs, world_size)
    _, lpt_loads = longest_processing_time(jobs, world_size=world_size)
    ranks, loads = balance_jobs(jobs, world_size=world_size)
    assert sum(loads) == sum(costs)
    assert all(0 <= rank < world_size for rank in ranks)
    assert 3 * world_size * max(lpt_loads) <= (4 * world_size - 1) * best
    assert best <= max(loads) <= max(lpt_loads)
    assert makespan_bound(costs, world_size=world_size) <= best
    bound = packing_bound(costs, world_size=world_size)
    assert makespan_bound(costs, world_size=world_size) <= bound <= best


@quick
@given(st.data())
def test_every_replica_of_every_mesh_layout_stores_each_element_once(data):
    mesh_shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    shape = tuple(data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    layout = layout_from_placements(
        shape,
        mesh_shape=mesh_shape,
        placements=data.draw(placements_on(mesh_shape, len(shape))),
        strided_order=data.draw(st.sampled_from(["fsdp2", "dtensor"])),
    )
    layout.validate("w")
    for replica in layout.full_replicas:
        counts = torch.zeros(shape, dtype=torch.int)
        for rank in layout.ranks_of_replica(replica):
            for region, place in zip(
                layout.regions_by_rank[rank], layout.local_regions(rank), strict=True
            ):
                counts[region.slices()] += 1
                assert place.shape == region.shape
        assert (counts == 1).all()
