"""Whatever the mesh, the shapes and the rates: every element travels once, and both ends agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import groupby

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon.distributed.agreement import first_different_line
from normuon.distributed.assignment import Assignment
from normuon.distributed.balance import (
    Job,
    balance_jobs,
    longest_processing_time,
    makespan_bound,
)
from normuon.distributed.layout import layout_from_placements, ranks_in
from normuon.distributed.plan import make_plan
from normuon.distributed.tiling import tiling_of
from tests.planned import every_route, owned, route_bytes
from tests.property.plans import placements_on, plans

quick = settings(max_examples=60, deadline=None)
DIRECTIONS = ("gather", "return")


def region_of(plan, route):
    """What a route carries, as a rectangle of its matrix."""
    return tiling_of(plan.tasks[route.task]).pieces[route.piece].region


def stored_elements(task, rank):
    """Which elements of the matrix `rank` stores."""
    stored = torch.zeros(task.layout.global_shape, dtype=torch.int)
    for region in task.layout.regions(rank):
        stored[region.slices()] += 1
    return stored[task.region.slices()]


def carried_elements(plan, index, routes):
    """How often each element of a matrix is carried by some routes."""
    counts = torch.zeros(plan.tasks[index].region.shape, dtype=torch.int)
    for route in routes:
        region = region_of(plan, route)
        assert route.numel == region.numel == counts[region.slices()].numel()
        counts[region.slices()] += 1
    return counts


def carried_entries(plan, index, routes, vectors):
    """How often each entry of each vector of a matrix is carried by some routes."""
    task = plan.tasks[index]
    counts = [
        torch.zeros([task.region.shape[d] for d in dims], dtype=torch.int) for dims in vectors
    ]
    for route in routes:
        for count, dims, number in zip(counts, vectors, route.entries, strict=True):
            if number:
                span = region_of(plan, route).along(dims)
                assert number == span.numel
                count[span.slices()] += 1
    return counts


def entries_of(elements, dims):
    """The entries of a vector that some elements of its matrix span."""
    others = [dim for dim in range(elements.ndim) if dim not in dims]
    spanned = elements.amax(others) if others else elements
    # Dims ascend in the reduced tensor, as they do in `dims`.
    return spanned.to(torch.int)


@quick
@given(plans())
def test_a_matrix_is_in_one_bucket_or_all_that_store_it_own_it(plan):
    planned = [*plan.alone, *(index for bucket in plan.buckets for index in bucket)]
    assert sorted(planned) == list(range(len(plan.tasks)))
    alone = set(plan.alone)
    for index, task in enumerate(plan.tasks):
        stored = [stored_elements(task, rank) for rank in range(plan.world_size)]
        storing = {rank for rank, elements in enumerate(stored) if elements.any()}
        whole = {rank for rank, elements in enumerate(stored) if elements.all()}
        assert (index in alone) == (storing == whole == set(plan.owners[index]))
        assert len(set(plan.owners[index])) == len(plan.owners[index])


@quick
@given(plans())
def test_every_element_and_every_entry_of_state_reaches_each_owner_once(plan):
    arrived = {}
    for route in every_route(plan, "gather"):
        arrived.setdefault((route.task, route.destination), []).append(route)
        task = plan.tasks[route.task]
        stored = stored_elements(task, route.source)
        assert stored[region_of(plan, route).slices()].all()
    in_buckets = [index for bucket in plan.buckets for index in bucket]
    assert set(arrived) == {(index, owner) for index in in_buckets for owner in plan.owners[index]}
    for (index, owner), routes in arrived.items():
        assert (carried_elements(plan, index, routes) == 1).all()
        dims = plan.tasks[index].state_dims
        for counts in carried_entries(plan, index, routes, dims):
            assert (counts == 1).all()
        # What the owner stores itself does not travel.
        mine = stored_elements(plan.tasks[index], owner)
        from_others = [route for route in routes if not route.is_local]
        assert not carried_elements(plan, index, from_others)[mine > 0].any()
        for lying, counts in zip(
            dims, carried_entries(plan, index, from_others, dims), strict=True
        ):
            assert not counts[entries_of(mine, lying) > 0].any()


@quick
@given(plans())
def test_what_several_replicas_store_is_sent_by_one_and_from_nearby(plan):
    """An owner gathers within its own replica wherever that stores the matrix."""
    for route in every_route(plan, "gather"):
        layout = plan.tasks[route.task].layout
        if layout.replicas[route.destination] in layout.full_replicas:
            assert layout.replicas[route.source] == layout.replicas[route.destination]


@quick
@given(plans())
def test_every_stored_element_comes_back_once_with_the_vectors_that_it_spans(plan):
    returned = {}
    for route in every_route(plan, "return"):
        returned.setdefault((route.task, route.destination), []).append(route)
        assert route.source in plan.owners[route.task]
    for index in (index for bucket in plan.buckets for index in bucket):
        task = plan.tasks[index]
        for rank in range(plan.world_size):
            routes = returned.pop((index, rank), [])
            assert len({route.source for route in routes}) <= 1
            expected = stored_elements(task, rank)
            assert expected.max() <= 1
            assert torch.equal(carried_elements(plan, index, routes), expected)
            dims = task.returned_dims
            for lying, counts in zip(dims, carried_entries(plan, index, routes, dims), strict=True):
                assert torch.equal(counts, entries_of(expected, lying))
    assert not returned


@quick
@given(plans())
def test_entries_come_with_the_first_of_the_pieces_that_span_them(plan):
    """So whoever reads a message in order has them when the first such piece is read."""
    for bucket in range(len(plan.buckets)):
        for rank in range(plan.world_size):
            seen = set()
            for route in plan.receives(rank, bucket, "return"):
                for vector, dims in enumerate(plan.tasks[route.task].returned_dims):
                    span = (route.task, vector, region_of(plan, route).along(dims))
                    assert (route.entries[vector] > 0) == (span not in seen)
                    seen.add(span)


@quick
@given(plans())
def test_both_ends_agree_on_every_message(plan):
    for bucket in range(len(plan.buckets)):
        for direction in DIRECTIONS:
            ranks = range(plan.world_size)
            sends = [plan.sends(rank, bucket, direction) for rank in ranks]
            receives = [plan.receives(rank, bucket, direction) for rank in ranks]
            for a in ranks:
                assert [r.destination for r in sends[a]] == sorted(r.destination for r in sends[a])
                assert [r.source for r in receives[a]] == sorted(r.source for r in receives[a])
                assert {r.source for r in sends[a]} <= {a}
                assert {r.destination for r in receives[a]} <= {a}
                for b in ranks:
                    sent = [route for route in sends[a] if route.destination == b]
                    assert sent == [route for route in receives[b] if route.source == a]


@quick
@given(plans())
def test_whether_anything_is_gathered_is_known_without_the_routes(plan):
    for bucket in range(len(plan.buckets)):
        for direction in DIRECTIONS:
            routes = [
                r for rank in range(plan.world_size) for r in plan.sends(rank, bucket, direction)
            ]
            travels = any(not route.is_local for route in routes)
            assert travels == (direction == "return" or plan.gathers(bucket))


@quick
@given(plans())
def test_byte_tables_of_tilings_are_those_of_the_routes(plan):
    """Buckets are cut by tables that are shared between matrices, not by listing routes."""
    sent, received = {}, {}
    for route in every_route(plan, "gather"):
        by_source = sent.setdefault((route.task, route.destination), Counter())
        if not route.is_local:
            by_source[route.source] += route_bytes(plan, route)
    for route in every_route(plan, "return"):
        by_destination = received.setdefault(route.task, Counter())
        by_destination[route.destination] += route_bytes(plan, route)
    for index in (index for bucket in plan.buckets for index in bucket):
        task, tiling = plan.tasks[index], tiling_of(plan.tasks[index])
        for owner in plan.owners[index]:
            table = tiling.gather_bytes(task, task.layout.replicas[owner])
            found = Counter(table.by_rank)
            found.update(tiling.gather_corrections(task, owner))
            assert +found == sent[index, owner]
            assert table.total == task.matrix_bytes + task.vector_bytes(task.state_dims)
            assert table.largest == max(table.by_rank.values())
        table = tiling.return_bytes(task)
        assert table.by_rank == received[index]
        assert table.total == received[index].total()
        assert table.largest == max(received[index].values())


def held_bytes(plan, rank, bucket, direction):
    """What `rank` packs and unpacks for one exchange, by its routes to and from others."""
    routes = plan.sends(rank, bucket, direction) + plan.receives(rank, bucket, direction)
    return sum(route_bytes(plan, route) for route in routes if not route.is_local)


@quick
@given(plans())
def test_no_rank_packs_more_than_a_bucket_may_hold(plan):
    """What it sends, and the whole matrices that it owns."""
    for bucket, content in enumerate(plan.buckets):
        whole = {
            index: plan.tasks[index].matrix_bytes
            + plan.tasks[index].vector_bytes(plan.tasks[index].state_dims)
            for index in content
        }
        bound = max(plan.bucket_bytes, 2 * max(whole.values()))
        for rank in range(plan.world_size):
            sent = sum(
                route_bytes(plan, route)
                for route in plan.sends(rank, bucket, "gather")
                if not route.is_local
            )
            packed = sent + sum(whole[index] for index in owned(plan, rank, bucket))
            assert packed <= bound
            # Sent and received messages are no more than that.
            assert held_bytes(plan, rank, bucket, "gather") <= packed


@quick
@given(plans())
def test_no_rank_holds_more_on_the_way_back_than_a_bucket_may_hold(plan):
    """Replicas multiply what an owner sends, so the bound is not the gather's."""
    for bucket, content in enumerate(plan.buckets):
        largest = max(
            sum(
                route_bytes(plan, route)
                for route in plan.sends(owner, bucket, "return")
                if route.task == index
            )
            for index in content
            for owner in plan.owners[index]
        )
        bound = max(plan.bucket_bytes, 2 * largest)
        for rank in range(plan.world_size):
            assert held_bytes(plan, rank, bucket, "return") <= bound


@quick
@given(plans())
def test_a_bucket_has_one_pair_of_dtypes_and_its_batches_together(plan):
    for content in plan.buckets:
        tasks = [plan.tasks[index] for index in content]
        assert len({(task.wire_bytes, task.side_bytes) for task in tasks}) == 1
        batches = [key for key, _ in groupby(task.batch_key for task in tasks)]
        assert len(batches) == len(set(batches))


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
    assert again == plan
    task = data.draw(st.integers(0, len(plan.tasks) - 1))
    rank = data.draw(st.integers(0, plan.world_size - 1))
    owners = list(plan.owners)
    owners[task] = (rank,)
    changed = make_plan(
        plan.tasks,
        world_size=plan.world_size,
        cost_model=plan.cost_model,
        balance=plan.balance,
        bucket_bytes=plan.bucket_bytes,
        assignment=Assignment(tuple(owners), plan.reasons),
    )
    assert (changed.digest() == plan.digest()) == (tuple(owners) == plan.owners)
    if tuple(owners) != plan.owners:
        texts = ["\n".join(p.lines()) for p in (plan, changed)]
        assert plan.tasks[task].label in first_different_line(*texts, names=("one", "other"))
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


@st.composite
def job_lists(draw, world_size):
    """Jobs of a few kinds and parameters, some confined, those of a parameter in any order."""
    ranks = st.integers(0, world_size - 1)
    jobs = []
    for param in range(draw(st.integers(1, 5))):
        cost = draw(st.integers(1, 6))
        candidates = draw(
            st.one_of(
                st.none(),
                st.none(),
                st.lists(ranks, min_size=1, unique=True).map(lambda found: tuple(sorted(found))),
            )
        )
        preferred = tuple(draw(st.lists(ranks, unique=True)))
        count = draw(st.integers(1, 12))
        jobs += [Job(cost, (param, i), candidates, preferred) for i in range(count)]
    draw(st.randoms(use_true_random=False)).shuffle(jobs)
    return jobs


@quick
@given(st.data(), st.integers(1, 5), st.integers(0, 20))
def test_equal_jobs_of_a_parameter_on_one_rank_are_one_stretch(data, world_size, base_load):
    """Also where other parameters' matrices cost the same, and where jobs are confined to ranks."""
    jobs = data.draw(job_lists(world_size))
    ranks, loads = balance_jobs(jobs, world_size=world_size, base_load=base_load)
    by_param = {}
    for job, rank in sorted(zip(jobs, ranks, strict=True), key=lambda pair: pair[0].name):
        loads[rank] -= job.cost
        if job.candidates is None:
            by_param.setdefault(job.name[0], []).append(rank)
        else:
            assert rank in job.candidates
    assert loads == [0] * world_size
    for dealt in by_param.values():
        stretches = [rank for rank, _ in groupby(dealt)]
        assert len(stretches) == len(set(stretches))


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
    for replica in layout.full_replicas:
        counts = torch.zeros(shape, dtype=torch.int)
        for rank in ranks_in(layout.replica_masks[replica]):
            local = torch.zeros(layout.local_shape(rank), dtype=torch.int)
            for region in layout.regions(rank):
                counts[region.slices()] += 1
                place = local[layout.local_slices(rank, region)]
                assert place.shape == region.shape
                place += 1
            assert (local == 1).all()
        assert (counts == 1).all()


@quick
@given(st.data())
def test_a_tiling_cuts_a_matrix_into_the_pieces_that_ranks_store(data):
    """Each element in one piece, and of each piece the holders store all and the others nothing."""
    plan = data.draw(plans())
    for task in plan.tasks:
        tiling = tiling_of(task)
        counts = torch.zeros(task.region.shape, dtype=torch.int)
        for piece in tiling.pieces:
            counts[piece.region.slices()] += 1
            assert piece.ranks == ranks_in(piece.mask)
        assert (counts == 1).all()
        for rank in range(plan.world_size):
            stored = stored_elements(task, rank)
            assert tiling.numel_by_rank.get(rank, 0) == stored.sum()
            assert (rank in tiling.whole_ranks) == bool(stored.all())
            for piece in tiling.pieces:
                inside = stored[piece.region.slices()]
                assert (inside == (rank in piece.ranks)).all()
                if rank in piece.ranks:
                    # One rectangle of the local tensor too.
                    whole = piece.region.shifted(task.region.offsets)
                    slices = task.layout.local_slices(rank, whole)
                    assert tuple(s.stop - s.start for s in slices) == piece.region.shape


@quick
@given(plans())
def test_matrices_that_a_layout_cuts_alike_share_one_tiling(plan):
    found = {}
    for task in plan.tasks:
        tiling = tiling_of(task)
        assert tiling is tiling_of(replace(task, name="other", flops=7))
        pieces = (id(task.layout), tuple(task.region.shape), tiling.pieces)
        assert found.setdefault(pieces, tiling) is tiling
