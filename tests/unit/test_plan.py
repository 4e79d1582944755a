"""Owners, buckets and routes: small plans by hand, whole models by their bounds."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest

import normuon.distributed
from normuon.distributed.agreement import first_different_line
from normuon.distributed.assignment import Assignment
from normuon.distributed.balance import (
    Job,
    balance_jobs,
    longest_processing_time,
    makespan_bound,
    round_robin,
)
from normuon.distributed.cost import CostModel
from normuon.distributed.layout import Region, ShardLayout, layout_from_placements
from normuon.distributed.plan import form_buckets, make_plan
from normuon.distributed.tiling import Route, tiling_of
from tests.planned import (
    SHARD_ROWS,
    bytes_sent,
    elements_by_peer,
    every_route,
    experts,
    matrix,
    matrix_of,
    owned,
    plain_flops,
)


def llama_block(width, kv, ff):
    return [
        (width, width),
        (kv, width),
        (kv, width),
        (width, width),
        *[(ff, width)] * 2,
        (width, ff),
    ]


MODELS = {
    "gpt2-124m": [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12,
    "llama-1.1b": llama_block(2048, 512, 8192) * 16,
    "llama-5.4b": llama_block(3584, 896, 14336) * 28,
    "llama-3-70b": llama_block(8192, 1024, 28672) * 80,
    "mixtral-8x7b": llama_block(4096, 1024, 14336)[:4] * 32
    + llama_block(4096, 1024, 14336)[4:] * 8 * 32,
}

# On 256 ranks, 240 take one MLP matrix each. If none of them took one of the 160 square matrices,
# the 16 others would have to take ten each: more than an MLP matrix and a square one together.
BEST = {("llama-3-70b", 256): plain_flops(28672, 8192) + plain_flops(8192, 8192)}
"""The best possible load of the busiest rank, where the makespan bound lies far below it."""


def stretches(owners):
    """Owners of matrices in order, each with how many follow one another."""
    return [(owner, len(list(alike))) for (owner,), alike in groupby(owners)]


class TestBounds:
    def test_mean_largest_and_pigeonhole(self):
        assert makespan_bound([4, 3, 3], world_size=2) == 6  # Two of the three share a rank.
        assert makespan_bound([9, 1, 1], world_size=2) == 9
        assert makespan_bound([2, 2, 2, 2, 2, 1], world_size=2) == 6
        assert makespan_bound([5, 4, 3, 3, 3], world_size=2) == 9
        assert makespan_bound([3] * 5, world_size=2) == 9
        assert makespan_bound([], world_size=2) == 0

    @pytest.mark.parametrize("world_size", [8, 16, 64, 256, 1024])
    @pytest.mark.parametrize("model", MODELS)
    def test_no_rank_of_a_real_model_has_much_more_work_than_it_must(self, model, world_size):
        """5% above the makespan bound, or provably the best there is."""
        costs = [plain_flops(*shape) for shape in MODELS[model]]
        jobs = [Job(cost, (model, i)) for i, cost in enumerate(costs)]
        _, loads = balance_jobs(jobs, world_size=world_size)
        within = max(loads) <= 1.05 * makespan_bound(costs, world_size=world_size)
        assert within or max(loads) == BEST[model, world_size]
        assert sum(loads) == sum(costs)

    def test_the_papers_round_robin_is_not_balanced(self):
        costs = [plain_flops(*shape) for shape in MODELS["llama-1.1b"]]
        sizes = [m * n for m, n in MODELS["llama-1.1b"]]
        ranks = round_robin(sizes, world_size=64, names=[("w", i) for i in range(len(sizes))])
        loads = [sum(c for c, r in zip(costs, ranks, strict=True) if r == q) for q in range(64)]
        assert max(loads) > 1.3 * makespan_bound(costs, world_size=64)


class TestOwnership:
    def test_ties_are_broken_by_name_not_by_place(self):
        jobs = [Job(5, (name, 0)) for name in ("c", "a", "b")]
        assert longest_processing_time(jobs, world_size=3)[0] == [2, 0, 1]
        assert balance_jobs(jobs, world_size=3)[0] == [2, 0, 1]

    def test_among_equals_the_rank_that_stores_most_wins(self):
        jobs = [Job(5, ("a", 0), preferred=(2, 1)), Job(5, ("b", 0), preferred=(2, 1))]
        assert longest_processing_time(jobs, world_size=3)[0] == [2, 1]
        assert balance_jobs(jobs, world_size=3)[0] == [2, 1]

    def test_balance_goes_before_locality(self):
        jobs = [Job(5, ("a", 0), preferred=(1,)), Job(1, ("b", 0), preferred=(1,))]
        assert longest_processing_time(jobs, world_size=2)[0] == [1, 0]
        assert balance_jobs(jobs, world_size=2)[0] == [1, 0]

    def test_multifit_mends_what_longest_processing_time_misses(self):
        jobs = [Job(cost, ("w", i)) for i, cost in enumerate([3, 3, 2, 2, 2])]
        assert max(longest_processing_time(jobs, world_size=2)[1]) == 7
        assert max(balance_jobs(jobs, world_size=2)[1]) == 6

    def test_confined_jobs_stay_and_free_ones_fill_the_gaps(self):
        jobs = [Job(4, ("a", 0), (0,)), Job(3, ("b", 0), (0, 1)), *[Job(2, ("c", i)) for i in "xy"]]
        ranks, loads = balance_jobs(jobs, world_size=3)
        assert ranks[:2] == [0, 1]
        assert sorted(loads) == [3, 4, 4]

    def test_paper_balance_sorts_by_elements_and_deals(self):
        tasks = [matrix(n, s, (2,), SHARD_ROWS) for n, s in [("a", (2, 2)), ("b", (4, 4))]]
        plan = make_plan(tasks, world_size=2, balance="paper")
        assert plan.owners == ((1,), (0,))

    def test_equal_matrices_of_a_parameter_on_one_rank_follow_one_another(self):
        """What a rank takes of 64 experts is one stretch, and so one view, where it could be any.

        Longest processing time alone deals them out in turn: 0, 8, 16 and so on to rank 0.
        """
        tasks = experts("up", (64, 8, 4), (8,), [("shard", 1)])
        plan = make_plan(tasks, world_size=8)
        assert plan.owners == tuple((expert // 8,) for expert in range(64))

    def test_parameters_whose_matrices_cost_the_same_are_dealt_one_after_another(self):
        tasks = experts("up", (40, 8, 4), (4,), [("shard", 1)])
        tasks += experts("down", (24, 4, 8), (4,), [("shard", 1)])
        plan = make_plan(tasks, world_size=4)
        assert plan.flops_by_rank == (16 * plain_flops(8, 4),) * 4
        assert stretches(plan.owners[:40]) == [(1, 8), (2, 16), (3, 16)]
        assert stretches(plan.owners[40:]) == [(0, 16), (1, 8)]

    def test_stretches_stay_whole_where_multifit_packs(self):
        """Two kinds of matrices, which longest processing time does not balance."""
        tasks = experts("large", (4, 9, 9), (4,), [("shard", 1)])
        tasks += experts("small", (6, 8, 8), (4,), [("shard", 1)])
        jobs = [Job(t.flops, (*t.batch_key, t.param, t.index)) for t in tasks]
        _, loads = longest_processing_time(jobs, world_size=4)
        plan = make_plan(tasks, world_size=4)
        assert max(plan.flops_by_rank) < max(loads)
        assert [count for _, count in stretches(plan.owners[:4])] == [2, 2]
        assert [count for _, count in stretches(plan.owners[4:])] == [3, 3]


class TestTilings:
    def test_experts_that_are_cut_alike_share_one_tiling(self):
        """256 experts, each split over all ranks: one tiling, so that planning does not grow."""
        tasks = experts("moe", (256, 16, 8), (8,), [("shard", 1)])
        assert len({id(tiling_of(task)) for task in tasks}) == 1

    def test_experts_in_equal_shares_have_one_tiling_a_rank(self):
        tasks = experts("moe", (256, 16, 8), (8,), SHARD_ROWS)
        assert len({id(tiling_of(task)) for task in tasks}) == 8

    def test_layers_of_one_shape_share_one_tiling(self):
        """Layouts are shared objects, so a model of 80 equal layers is tiled like one layer."""
        tasks = [matrix(f"w{i}", (64, 8), (8,), SHARD_ROWS) for i in range(80)]
        assert len({id(tiling_of(task)) for task in tasks}) == 1

    def test_heads_that_are_cut_at_other_places_have_other_tilings(self):
        layout = layout_from_placements((12, 4), mesh_shape=(8,), placements=SHARD_ROWS)
        heads = [
            matrix_of(layout, "qkv", Region((3 * i, 0), (3, 4)), index=i, rows=3) for i in range(4)
        ]
        # Shards of 2 rows cut heads of 3 rows after the second and after the first in turn.
        cuts = [[piece.region.shape[0] for piece in tiling_of(head).pieces] for head in heads]
        assert cuts == [[2, 1], [1, 2]] * 2
        # Each lies on ranks of its own, too.
        assert len({id(tiling_of(head)) for head in heads}) == 4


class TestFullySharded:
    def test_two_matrices_on_two_ranks_by_hand(self):
        tasks = [matrix(name, (4, 8), (2,), SHARD_ROWS) for name in "ab"]
        plan = make_plan(tasks, world_size=2)
        assert plan.owners == ((0,), (1,))
        assert plan.buckets == ((0, 1),)
        assert plan.alone == ()
        # Each rank sends half of a matrix, 16 elements with 2 rows of v, and keeps the other half.
        assert plan.sends(0, 0, "gather") == [
            Route(0, 0, 0, 0, 16, (2,)),
            Route(1, 0, 0, 1, 16, (2,)),
        ]
        # Back with v and a scale.
        assert plan.sends(0, 0, "return") == [
            Route(0, 0, 0, 0, 16, (2, 1)),
            Route(0, 1, 0, 1, 16, (2, 1)),
        ]
        assert bytes_sent(plan, "gather") == {0: 16 * 2 + 2 * 4, 1: 16 * 2 + 2 * 4}
        assert bytes_sent(plan, "return") == {0: 16 * 2 + 3 * 4, 1: 16 * 2 + 3 * 4}
        assert plan.flops_by_rank == (plain_flops(4, 8),) * 2
        assert plan.imbalance == 1.0

    def test_local_pieces_are_routes_but_not_messages(self):
        plan = make_plan([matrix("a", (4, 8), (2,), SHARD_ROWS)], world_size=2)
        (route,) = plan.sends(0, 0, "gather")
        assert route.is_local
        assert 0 not in bytes_sent(plan, "gather")

    def test_uneven_and_empty_shards(self):
        plan = make_plan([matrix("a", (5, 3), (4,), SHARD_ROWS)], world_size=4)
        assert plan.owners == ((0,),)  # Ranks 0 and 1 store most.
        received = [(r.source, r.numel) for r in plan.receives(0, 0, "gather")]
        assert received == [(0, 6), (1, 6), (2, 3)]
        assert plan.sends(3, 0, "gather") == []
        assert plan.receives(3, 0, "return") == []

    def test_v_travels_once_when_columns_are_split(self):
        plan = make_plan(
            [matrix(name, (4, 8), (4,), [("shard", 1)]) for name in "ab"], world_size=4
        )
        assert plan.owners == ((0,), (1,))
        # Each owner stores columns, so it has every row of v already.
        assert all(r.entries == (0,) for r in every_route(plan, "gather") if not r.is_local)
        # Every rank gets all four rows of v and the scale back, once per matrix.
        returned = [(r.destination, r.entries) for r in plan.sends(0, 0, "return")]
        assert returned == [(0, (4, 1)), (1, (4, 1)), (2, (4, 1)), (3, (4, 1))]

    def test_v_of_a_grid_comes_from_one_rank_per_row_block(self):
        grid = [("shard", 0), ("shard", 1)]
        plan = make_plan([matrix("a", (4, 8), (2, 2), grid)], world_size=4)
        carriers = [(r.source, r.entries) for r in plan.receives(0, 0, "gather")]
        assert carriers == [(0, (2,)), (1, (0,)), (2, (2,)), (3, (0,))]

    def test_neurons_may_be_columns(self):
        task = matrix("conv1d", (4, 8), (2,), SHARD_ROWS, state_dims=((1,),))
        plan = make_plan([task], world_size=2)
        assert [r.entries for r in plan.sends(1, 0, "gather")] == [(0,)]
        assert [r.entries for r in plan.sends(0, 0, "return")] == [(8, 1), (8, 1)]

    def test_a_number_comes_back_once_however_many_pieces_a_rank_stores(self):
        strided = [("strided_shard", 0, 2)]
        layout = layout_from_placements(
            (8, 4), mesh_shape=(2,), placements=strided, strided_order="dtensor"
        )
        plan = make_plan([matrix_of(layout, "a")], world_size=2)
        assert [r.entries for r in plan.receives(1, 0, "return")] == [(2, 1), (2, 0)]

    def test_each_vector_travels_by_the_dims_that_it_lies_along(self):
        """Another rule's: state for rows and for columns, and one more vector of columns back."""
        vectors = {"state_dims": ((0,), (1,)), "summary_dims": ((1,),)}
        plan = make_plan([matrix("a", (6, 8), (2,), SHARD_ROWS, **vectors)], world_size=2)
        assert [r.entries for r in plan.receives(0, 0, "gather")] == [(3, 8), (3, 0)]
        assert [r.entries for r in plan.sends(0, 0, "return")] == [(3, 8, 8), (3, 8, 8)]

    def test_a_matrix_without_vectors_sends_its_elements_alone(self):
        plan = make_plan(
            [matrix("muon", (4, 8), (2,), SHARD_ROWS, state_dims=(), summary_dims=())],
            world_size=2,
        )
        for direction in ("gather", "return"):
            assert all(route.entries == () for route in every_route(plan, direction))

    def test_both_ends_list_a_message_in_the_same_order(self):
        tasks = [matrix(name, (6, 4), (3,), SHARD_ROWS) for name in "abcdef"]
        plan = make_plan(tasks, world_size=3)
        for direction in ("gather", "return"):
            sent = [r for r in plan.sends(0, 0, direction) if r.destination == 1]
            got = [r for r in plan.receives(1, 0, direction) if r.source == 0]
            assert sent
            assert sent == got

    def test_routes_are_listed_by_peer_as_split_sizes_are(self):
        tasks = [matrix(name, (6, 4), (3,), SHARD_ROWS) for name in "abcdef"]
        plan = make_plan(tasks, world_size=3)
        for direction in ("gather", "return"):
            peers = [r.destination for r in plan.sends(1, 0, direction)]
            assert peers == sorted(peers)
            assert {0, 2} <= set(peers)
            sources = [r.source for r in plan.receives(1, 0, direction)]
            assert sources == sorted(sources)
            assert {0, 2} <= set(sources)

    def test_fused_blocks_cross_shard_borders(self):
        layout = layout_from_placements((12, 4), mesh_shape=(5,), placements=SHARD_ROWS)
        blocks = [
            matrix_of(layout, "qkv", Region((4 * i, 0), (4, 4)), index=i, rows=4) for i in range(3)
        ]
        plan = make_plan(blocks, world_size=5)
        found = set()
        for route in every_route(plan, "gather"):
            piece = tiling_of(blocks[route.task]).pieces[route.piece]
            # Pieces count from the corner of the matrix.
            row = blocks[route.task].region.offsets[0] + piece.region.offsets[0]
            found.add((route.task, row, route.source))
        assert found == {(0, 0, 0), (0, 3, 1), (1, 4, 1), (1, 6, 2), (2, 8, 2), (2, 9, 3)}


class TestExperts:
    def test_experts_sharded_whole_send_nothing(self):
        plan = make_plan(experts("moe", (8, 4, 6), (4,), SHARD_ROWS), world_size=4)
        assert plan.owners == tuple((e // 2,) for e in range(8))
        assert plan.alone == tuple(range(8))
        assert plan.buckets == ()
        assert set(plan.reasons) == {"stored whole on one rank: nothing to send"}

    def test_other_matrices_fill_the_ranks_without_experts(self):
        tasks = experts("moe", (2, 64, 64), (4,), SHARD_ROWS)
        tasks += [matrix(name, (64, 64), (4,), SHARD_ROWS) for name in "ab"]
        plan = make_plan(tasks, world_size=4)
        assert plan.owners == ((0,), (1,), (2,), (3,))
        assert plan.alone == (0, 1)
        assert plan.buckets == ((2, 3),)

    def test_experts_leave_their_rank_when_that_is_faster(self):
        stacked = [e for layer in "abcd" for e in experts(layer, (2, 64, 64), (8,), SHARD_ROWS)]
        slow_compute = CostModel(flops_per_second=1e6)
        slow_network = CostModel(bytes_per_second=1.0)
        moved = make_plan(stacked, world_size=8, cost_model=slow_compute)
        assert moved.imbalance == 1.0
        assert bytes_sent(moved, "gather").total() > 0
        assert any("balances the work" in reason for reason in moved.reasons)
        stayed = make_plan(stacked, world_size=8, cost_model=slow_network)
        assert stayed.buckets == ()
        assert stayed.imbalance == 4.0


class TestReplicas:
    fast_network = CostModel(flops_per_second=1e9, bytes_per_second=1e12, latency_seconds=0.0)
    slow_network = CostModel(flops_per_second=1e12, bytes_per_second=1e6)
    hsdp = ((2, 2), [("replicate",), ("shard", 0)])

    def test_replicated_matrices_are_split_when_sending_is_cheap(self):
        tasks = [matrix(name, (4, 8), (4,), [("replicate",)]) for name in "abcd"]
        plan = make_plan(tasks, world_size=4, cost_model=self.fast_network)
        assert sorted(plan.owners) == [(0,), (1,), (2,), (3,)]
        assert all(route.is_local for route in every_route(plan, "gather"))
        assert not plan.gathers(0)
        assert elements_by_peer(plan, 2, 0, "return") == [32, 32, 0, 32]
        assert plan.reasons[0].endswith("so one rank sends")

    def test_replicated_matrices_are_computed_everywhere_when_sending_is_dear(self):
        tasks = [matrix(name, (4, 8), (4,), [("replicate",)]) for name in "ab"]
        plan = make_plan(tasks, world_size=4, cost_model=self.slow_network)
        assert plan.owners == ((0, 1, 2, 3),) * 2
        assert plan.alone == (0, 1)
        assert plan.buckets == ()
        assert plan.flops_by_rank == (2 * plain_flops(4, 8),) * 4
        assert plan.imbalance == 1.0
        assert plan.reasons[0].endswith("so every replica computes")

    def test_hsdp_gathers_within_the_owners_replica_and_returns_to_all(self):
        tasks = [matrix(name, (4, 8), *self.hsdp) for name in "abcd"]
        plan = make_plan(tasks, world_size=4, cost_model=self.fast_network)
        assert sorted(plan.owners) == [(0,), (1,), (2,), (3,)]
        gathers = [r for r in every_route(plan, "gather") if not r.is_local]
        assert {(r.source, r.destination) for r in gathers} == {(0, 1), (1, 0), (2, 3), (3, 2)}
        assert len(gathers) == 4  # Replicas send once.
        returns = every_route(plan, "return")
        assert len(returns) == 4 * 4
        assert sum(r.numel for r in gathers) == 4 * 16
        assert sum(r.numel for r in returns if not r.is_local) == 4 * 3 * 16

    def test_hsdp_computes_once_per_replica_over_a_slow_link_between_them(self):
        model = replace(self.fast_network, replica_bytes_per_second=1.0)
        tasks = [matrix(name, (4, 8), *self.hsdp) for name in "ab"]
        plan = make_plan(tasks, world_size=4, cost_model=model)
        assert plan.owners == ((0, 2), (1, 3))
        for direction in ("gather", "return"):
            assert all(r.source // 2 == r.destination // 2 for r in every_route(plan, direction))

    def test_one_rank_sends_nothing(self):
        plan = make_plan([matrix("a", (4, 8), (1,), [("replicate",)])], world_size=1)
        assert (plan.owners, plan.alone, plan.buckets) == (((0,),), (0,), ())


class TestBuckets:
    def test_buckets_are_slices_of_time_over_all_owners(self):
        tasks = [matrix(f"w{i}", (8, 8), (4,), SHARD_ROWS) for i in range(12)]
        plan = make_plan(tasks, world_size=4, bucket_bytes=400)
        assert [len(bucket) for bucket in plan.buckets] == [4, 4, 4]
        for bucket in range(3):
            assert [len(owned(plan, rank, bucket)) for rank in range(4)] == [1, 1, 1, 1]

    def test_a_small_matrix_that_starts_early_goes_before_a_large_one_that_starts_late(self):
        shapes = [(8, 8), (8, 8), (2, 2)]
        tasks = [matrix(f"w{i}", shape, (2,), SHARD_ROWS) for i, shape in enumerate(shapes)]
        owners = [(0,), (0,), (1,)]
        assert form_buckets(tasks, owners, range(3), world_size=2, bucket_bytes=1) == ((2, 0), (1,))

    def test_only_the_chosen_matrices_are_in_buckets(self):
        tasks = [matrix(f"w{i}", (8, 8), (2,), SHARD_ROWS) for i in range(4)]
        owners = [(0,), (1,)] * 2
        buckets = form_buckets(tasks, owners, [3, 1], world_size=2, bucket_bytes=10**6)
        assert buckets == ((1, 3),)

    def test_a_bound_below_the_matrices_does_not_leave_owners_idle(self):
        tasks = [matrix(f"w{i}", (8, 8), (4,), SHARD_ROWS) for i in range(8)]
        plan = make_plan(tasks, world_size=4, bucket_bytes=1)
        assert [len(bucket) for bucket in plan.buckets] == [4, 4]

    def test_what_replicas_are_sent_counts_towards_the_bound(self):
        """Under DDP nothing is gathered, and every owner returns a copy to each of 7 others."""
        tasks = [matrix(f"w{i}", (8, 8), (8,), [("replicate",)]) for i in range(32)]
        returned = 8 * 8 * 2 + 8 * 4 + 4  # O in bfloat16, v and the scale
        network = CostModel(flops_per_second=1e3, bytes_per_second=1e12, latency_seconds=0.0)
        # A rank that owns one matrix of eight sends 7 copies and receives 7 others' matrices; its
        # own copies are counted too.
        plan = make_plan(tasks, world_size=8, cost_model=network, bucket_bytes=2 * 16 * returned)
        assert [len(bucket) for bucket in plan.buckets] == [16, 16]
        plan = make_plan(tasks, world_size=8, cost_model=network, bucket_bytes=10**6)
        assert [len(bucket) for bucket in plan.buckets] == [32]

    def test_one_bucket_has_one_wire_dtype(self):
        tasks = [
            matrix(f"w{i}", (8, 8), (2,), SHARD_ROWS, wire_bytes=[2, 4][i % 2]) for i in range(4)
        ]
        assert make_plan(tasks, world_size=2).buckets == ((0, 2), (1, 3))

    def test_one_bucket_has_one_dtype_of_vectors(self):
        tasks = [
            matrix(f"w{i}", (8, 8), (2,), SHARD_ROWS, side_bytes=[4, 8][i % 2]) for i in range(4)
        ]
        assert make_plan(tasks, world_size=2).buckets == ((0, 2), (1, 3))

    def test_matrices_of_one_shape_and_key_follow_one_another(self):
        keys = ["x", "y", "x", "x"]
        tasks = [matrix(f"w{i}", (8, 8), (2,), SHARD_ROWS, key=k) for i, k in enumerate(keys)]
        tasks.append(matrix("wide", (8, 16), (2,), SHARD_ROWS, key="x"))
        assert make_plan(tasks, world_size=2).buckets == ((0, 2, 3, 1, 4),)


class TestIdentity:
    def tasks(self):
        return [matrix(name, (4, 8), (2,), SHARD_ROWS) for name in "ab"]

    def plan_with_owners(self, *ranks):
        owners = tuple((rank,) for rank in ranks)
        return make_plan(
            self.tasks(),
            world_size=2,
            bucket_bytes=1000,
            assignment=Assignment(owners, ("",) * len(ranks)),
        )

    def difference(self, first, second):
        texts = ["\n".join(plan.lines()) for plan in (first, second)]
        return first_different_line(*texts, names=("rank 0", "rank 1"))

    def test_equal_inputs_give_equal_digests_and_lines(self):
        first, second = (make_plan(self.tasks(), world_size=2) for _ in range(2))
        assert first == second
        assert first.digest() == second.digest()
        assert list(first.lines()) == list(second.lines())

    def test_another_owner_changes_the_digest_and_is_named(self):
        first, second = self.plan_with_owners(0, 1), self.plan_with_owners(0, 0)
        assert first.digest() != second.digest()
        assert self.difference(first, second) == (
            "'b[0]: owners: (1,)' on rank 0, 'b[0]: owners: (0,)' on rank 1"
        )

    def test_another_shard_is_named_with_its_rank(self):
        tasks = self.tasks()
        columns = ((0, 8),)
        uneven = ShardLayout((4, 8), ((((0, 3),), columns), (((3, 4),), columns)), (0, 0))
        others = [replace(task, layout=uneven) for task in tasks]
        plans = [make_plan(t, world_size=2) for t in (tasks, others)]
        assert self.difference(*plans) == (
            "'a[0]: stored on rank 0: (((0, 2),), ((0, 8),)) of replica 0' on rank 0, "
            "'a[0]: stored on rank 0: (((0, 3),), ((0, 8),)) of replica 0' on rank 1"
        )

    @pytest.mark.parametrize(
        "changed",
        [
            {"key": "other"},
            {"flops": 7},
            {"layout": layout_from_placements((4, 8), mesh_shape=(2,), placements=[("shard", 1)])},
        ],
        ids=lambda changed: next(iter(changed)),
    )
    def test_a_matrix_of_which_anything_differs_is_named(self, changed):
        first, second = self.tasks()
        others = [first, replace(second, **changed)]
        plans = [make_plan(t, world_size=2) for t in (self.tasks(), others)]
        assert "b[0]" in self.difference(*plans)

    def test_a_missing_matrix_is_named(self):
        plan, shorter = (make_plan(t, world_size=2) for t in (self.tasks(), self.tasks()[:1]))
        assert self.difference(plan, shorter) == (
            "'b[0]: 4 x 8 at ((0, 0), (4, 8)) in layout 0, , 3200 FLOPs, vectors ((0,),) ((),), 2 "
            "and 4 bytes, None, None' on rank 0, 'a[0]: owners: (0,)' on rank 1"
        )

    def test_another_order_of_buckets_is_named(self):
        small = make_plan(self.tasks(), world_size=2, bucket_bytes=1000)
        swapped = replace(small, buckets=((1, 0),))
        assert small.buckets == ((0, 1),)
        assert small.digest() != swapped.digest()
        assert self.difference(small, swapped) == (
            "'bucket 0: (0, 1)' on rank 0, 'bucket 0: (1, 0)' on rank 1"
        )

    @pytest.mark.parametrize(
        "changed",
        [
            {"key": "other"},
            {"flops": 7},
            {"state_dims": ((1,),)},
            {"summary_dims": ()},
            {"wire_bytes": 4},
            {"side_bytes": 8},
        ],
        ids=str,
    )
    def test_whatever_changes_a_message_or_a_batch_changes_the_digest(self, changed):
        tasks = self.tasks()[:1]
        others = [replace(tasks[0], **changed)]
        plan, other = (make_plan(t, world_size=2) for t in (tasks, others))
        assert plan.digest() != other.digest()

    def test_reasons_are_in_words(self):
        reasons = make_plan(self.tasks(), world_size=2).reasons
        assert set(reasons) == {"sharded over 2 ranks: gathered to one owner"}


class TestRefusals:
    def test_layouts_of_another_world_size(self):
        with pytest.raises(ValueError, match=r"a\[0\] \[4, 8\]: its layout names 2 ranks"):
            make_plan([matrix("a", (4, 8), (2,), SHARD_ROWS)], world_size=4)

    def test_one_parameter_and_index_twice(self):
        with pytest.raises(ValueError, match=r"a\[0\]: two matrices"):
            make_plan([matrix("a", (4, 8), (1,), SHARD_ROWS)] * 2, world_size=1)

    def test_parameters_of_one_name_are_told_apart_by_their_place(self):
        task = matrix("a", (4, 8), (2,), SHARD_ROWS)
        plan = make_plan([replace(task, param=(1, 0)), task], world_size=2)
        assert plan.owners == ((1,), (0,))  # In the order of groups, whatever the list's.

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rows": 3}, r"a\[0\] \[4, 8\] of \[4, 8\]: pass rows and cols"),
            ({"rows": 0, "cols": 0}, "rows and cols"),
            ({"flops": 0}, r"a\[0\]: flops=0 must be at least 1"),
        ],
    )
    def test_malformed_matrices(self, options, message):
        task = matrix("a", (4, 8), (1,), SHARD_ROWS)
        with pytest.raises(ValueError, match=message):
            replace(task, **options)

    def test_no_matrices_make_an_empty_plan(self):
        plan = make_plan([], world_size=2)
        assert (plan.alone, plan.buckets, plan.imbalance) == ((), (), 1.0)
        assert plan.flops_by_rank == (0, 0)


def test_llama_70b_on_1024_ranks():
    """Owners and buckets without listing a route: 560 matrices times 1,024 ranks."""
    tasks = [
        matrix(f"w{i:03}", shape, (1024,), SHARD_ROWS)
        for i, shape in enumerate(MODELS["llama-3-70b"])
    ]
    plan = make_plan(tasks, world_size=1024)
    assert plan.imbalance == 1.0
    assert sorted(index for bucket in plan.buckets for index in bucket) == list(range(560))
    # One tiling for every shape.
    assert len({id(tiling_of(task)) for task in tasks}) == len(set(MODELS["llama-3-70b"]))
    numel = sum(m * n for m, n in MODELS["llama-3-70b"])
    for rank in (0, 511, 1023):
        sent = [route for b in range(len(plan.buckets)) for route in plan.sends(rank, b, "gather")]
        # A 1024th of every matrix, and one row of v or more with it.
        assert sum(route.numel for route in sent) == numel // 1024
        assert sorted(route.task for route in sent) == list(range(560))
        num_entries = sum(sum(route.entries) for route in sent)
        assert 4 * num_entries < 0.001 * 2 * numel // 1024


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (names if node.module == "normuon.distributed" else [str(node.module)])


def test_the_planner_imports_the_standard_library_alone():
    package = Path(normuon.distributed.__file__).parent
    reached, waiting = set(), ["plan", "layout"]
    while waiting:
        name = waiting.pop()
        if name in reached:
            continue
        reached.add(name)
        for module in imported_modules(package / f"{name}.py"):
            if module.startswith("normuon.distributed."):
                waiting.append(module.rsplit(".", 1)[1])
            else:
                assert module.split(".")[0] in sys.stdlib_module_names, (name, module)
    assert {"layout", "cost", "task", "tiling", "balance"} <= reached
