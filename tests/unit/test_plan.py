"""Owners, buckets, routes and figures: small plans by hand, whole models by their bounds."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import normuon.distributed
from normuon.distributed.alternatives import alternatives, compute_everywhere, pad_to_world_size
from normuon.distributed.assignment import Assignment
from normuon.distributed.buckets import form_buckets
from normuon.distributed.canonical import first_difference
from normuon.distributed.cost import SCALAR_BYTES, CostModel, newton_schulz_flops
from normuon.distributed.mesh_layout import layout_from_placements
from normuon.distributed.ownership import (
    Job,
    balance_jobs,
    longest_processing_time,
    makespan_bound,
    packing_bound,
    round_robin,
)
from normuon.distributed.plan import make_plan, plan_from_assignment
from normuon.distributed.region import Region, ShardLayout
from normuon.distributed.task import MatrixTask

SHARD_ROWS = [("shard", 0)]


def matrix(name, shape, mesh_shape, placements, **options):
    layout = layout_from_placements(shape, mesh_shape=mesh_shape, placements=placements)
    return MatrixTask(
        name=name,
        region=Region.whole(shape),
        rows=shape[0],
        cols=shape[1],
        layout=layout,
        **options,
    )


def experts(name, shape, mesh_shape, placements):
    layout = layout_from_placements(shape, mesh_shape=mesh_shape, placements=placements)
    return [
        MatrixTask(
            name=name,
            index=e,
            region=Region((e, 0, 0), (1, *shape[1:])),
            rows=shape[1],
            cols=shape[2],
            layout=layout,
            neuron_dims=(1,),
        )
        for e in range(shape[0])
    ]


def every_route(plan, direction):
    return [
        route
        for bucket in range(len(plan.buckets))
        for rank in range(plan.world_size)
        for route in plan.sends(rank, bucket, direction=direction)
    ]


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


class TestBounds:
    def test_mean_largest_and_pigeonhole(self):
        assert makespan_bound([4, 3, 3], world_size=2) == 6  # Two of the three share a rank.
        assert makespan_bound([9, 1, 1], world_size=2) == 9
        assert makespan_bound([2, 2, 2, 2, 2, 1], world_size=2) == 6
        assert makespan_bound([5, 4, 3, 3, 3], world_size=2) == 9
        assert makespan_bound([], world_size=2) == 0

    def test_packing_bound_sees_that_loads_are_multiples(self):
        # 15 over 2 ranks in steps of 3: one rank gets 9.
        assert makespan_bound([3] * 5, world_size=2) == 9
        assert packing_bound([6, 3, 3, 3], world_size=2) == 9

    @pytest.mark.parametrize("world_size", [8, 16, 64, 256, 1024])
    @pytest.mark.parametrize("model", MODELS)
    def test_no_rank_of_a_real_model_has_much_more_work_than_it_must(self, model, world_size):
        """5% above the makespan bound, or provably the best there is."""
        costs = [newton_schulz_flops(*shape) for shape in MODELS[model]]
        jobs = [Job(cost, (model, i)) for i, cost in enumerate(costs)]
        _, loads = balance_jobs(jobs, world_size=world_size)
        within = max(loads) <= 1.05 * makespan_bound(costs, world_size=world_size)
        assert within or max(loads) == packing_bound(costs, world_size=world_size)
        assert sum(loads) == sum(costs)

    def test_the_papers_round_robin_is_not_balanced(self):
        costs = [newton_schulz_flops(*shape) for shape in MODELS["llama-1.1b"]]
        sizes = [m * n for m, n in MODELS["llama-1.1b"]]
        ranks = round_robin(sizes, world_size=64, names=[("w", i) for i in range(len(sizes))])
        loads = [sum(c for c, r in zip(costs, ranks, strict=True) if r == q) for q in range(64)]
        assert max(loads) > 1.3 * makespan_bound(costs, world_size=64)


class TestOwnership:
    def test_ties_are_broken_by_name_not_by_place(self):
        jobs = [Job(5, (name, 0)) for name in ("c", "a", "b")]
        assert longest_processing_time(jobs, world_size=3)[0] == [2, 0, 1]

    def test_among_equals_the_rank_that_stores_most_wins(self):
        jobs = [Job(5, ("a", 0), preferred=(2, 1)), Job(5, ("b", 0), preferred=(2, 1))]
        assert longest_processing_time(jobs, world_size=3)[0] == [2, 1]

    def test_balance_goes_before_locality(self):
        jobs = [Job(5, ("a", 0), preferred=(1,)), Job(1, ("b", 0), preferred=(1,))]
        assert longest_processing_time(jobs, world_size=2)[0] == [1, 0]

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


class TestFullySharded:
    def test_two_matrices_on_two_ranks_by_hand(self):
        tasks = [matrix(name, (4, 8), (2,), SHARD_ROWS) for name in "ab"]
        plan = make_plan(tasks, world_size=2)
        # Each rank sends half of a matrix: 16 elements, 2 rows of v, a flag; back with a scale.
        one_way = 16 * 2 + 2 * 4 + SCALAR_BYTES
        assert plan.owners == ((0,), (1,))
        assert plan.bytes_sent_by_rank == (2 * one_way, 2 * one_way)
        assert plan.bytes_received_by_rank == plan.bytes_sent_by_rank
        assert plan.bytes_least_total == 2 * 2 * 16 * 2
        assert plan.flops_by_rank == (newton_schulz_flops(4, 8),) * 2
        assert plan.imbalance == 1.0
        assert plan.send_counts(0, 0, stream="neurons") == [0, 2]
        assert plan.receive_counts(0, 0, stream="scalars") == [0, 1]

    def test_local_pieces_are_routes_but_not_messages(self):
        plan = make_plan([matrix("a", (4, 8), (2,), SHARD_ROWS)], world_size=2)
        (route,) = plan.sends(0, 0)
        assert route.is_local
        assert plan.send_counts(0, 0) == [0, 0]

    def test_uneven_and_empty_shards(self):
        plan = make_plan([matrix("a", (5, 3), (4,), SHARD_ROWS)], world_size=4)
        assert plan.owner(0) == 0  # Ranks 0 and 1 store most.
        assert plan.receive_counts(0, 0) == [0, 6, 3, 0]
        assert plan.sends(3, 0) == []
        assert plan.receives(3, 0, direction="return") == []

    def test_v_travels_once_when_columns_are_split(self):
        plan = make_plan(
            [matrix(name, (4, 8), (4,), [("shard", 1)]) for name in "ab"], world_size=4
        )
        assert plan.owners == ((0,), (1,))
        # Each owner stores columns, so it has every row of v already.
        assert all(r.num_neurons == 0 for r in every_route(plan, "gather") if not r.is_local)
        # Every rank gets all four rows of v back, once per matrix.
        assert plan.send_counts(0, 0, direction="return", stream="neurons") == [0, 4, 4, 4]

    def test_v_of_a_grid_comes_from_one_rank_per_row_block(self):
        grid = [("shard", 0), ("shard", 1)]
        plan = make_plan([matrix("a", (4, 8), (2, 2), grid)], world_size=4)
        carriers = [(r.source, r.num_neurons) for r in plan.receives(0, 0)]
        assert carriers == [(0, 2), (1, 0), (2, 2), (3, 0)]

    def test_neurons_may_be_columns(self):
        task = matrix("conv1d", (4, 8), (2,), SHARD_ROWS, neuron_dims=(1,))
        plan = make_plan([task], world_size=2)
        assert plan.send_counts(1, 0, stream="neurons") == [0, 0]
        assert plan.send_counts(0, 0, direction="return", stream="neurons") == [0, 8]

    def test_both_ends_list_a_message_in_the_same_order(self):
        tasks = [matrix(name, (6, 4), (3,), SHARD_ROWS) for name in "abcdef"]
        plan = make_plan(tasks, world_size=3)
        for direction in ("gather", "return"):
            sent = [r for r in plan.sends(0, 0, direction=direction) if r.destination == 1]
            got = [r for r in plan.receives(1, 0, direction=direction) if r.source == 0]
            assert sent == got

    def test_routes_are_listed_by_peer_as_split_sizes_are(self):
        tasks = [matrix(name, (6, 4), (3,), SHARD_ROWS) for name in "abcdef"]
        plan = make_plan(tasks, world_size=3)
        for direction in ("gather", "return"):
            peers = [r.destination for r in plan.sends(1, 0, direction=direction)]
            assert peers == sorted(peers)
            assert {0, 2} <= set(peers)
            sources = [r.source for r in plan.receives(1, 0, direction=direction)]
            assert sources == sorted(sources)
            assert {0, 2} <= set(sources)

    def test_fused_blocks_cross_shard_borders(self):
        layout = layout_from_placements((12, 4), mesh_shape=(5,), placements=SHARD_ROWS)
        blocks = [
            MatrixTask(
                name="qkv",
                index=i,
                region=Region((4 * i, 0), (4, 4)),
                rows=4,
                cols=4,
                layout=layout,
            )
            for i in range(3)
        ]
        plan = make_plan(blocks, world_size=5)
        regions = {(r.task, r.region.offsets[0], r.source) for r in every_route(plan, "gather")}
        assert regions == {(0, 0, 0), (0, 3, 1), (1, 4, 1), (1, 6, 2), (2, 8, 2), (2, 9, 3)}


class TestExperts:
    def test_experts_sharded_whole_send_nothing(self):
        plan = make_plan(experts("moe", (8, 4, 6), (4,), SHARD_ROWS), world_size=4)
        assert plan.owners == tuple((e // 2,) for e in range(8))
        assert plan.bytes_sent_total == 0
        assert set(plan.reasons) == {"stored whole on one rank: nothing to send"}

    def test_other_matrices_fill_the_ranks_without_experts(self):
        tasks = experts("moe", (2, 64, 64), (4,), SHARD_ROWS)
        tasks += [matrix(name, (64, 64), (4,), SHARD_ROWS) for name in "ab"]
        plan = make_plan(tasks, world_size=4)
        assert plan.owners == ((0,), (1,), (2,), (3,))

    def test_experts_leave_their_rank_when_that_is_faster(self):
        stacked = [e for layer in "abcd" for e in experts(layer, (2, 64, 64), (8,), SHARD_ROWS)]
        slow_compute = CostModel(flops_per_second=1e6)
        slow_network = CostModel(bytes_per_second=1.0)
        moved = make_plan(stacked, world_size=8, cost_model=slow_compute)
        assert moved.imbalance == 1.0
        assert moved.bytes_sent_total > 0
        assert any("evens out the work" in reason for reason in moved.reasons)
        stayed = make_plan(stacked, world_size=8, cost_model=slow_network)
        assert stayed.bytes_sent_total == 0
        assert stayed.imbalance == 4.0


class TestReplicas:
    fast_network = CostModel(flops_per_second=1e9, bytes_per_second=1e12, latency_seconds=0.0)
    slow_network = CostModel(flops_per_second=1e12, bytes_per_second=1e6)
    hsdp = ((2, 2), [("replicate",), ("shard", 0)])

    def test_replicated_matrices_are_split_when_sending_is_cheap(self):
        tasks = [matrix(name, (4, 8), (4,), [("replicate",)]) for name in "abcd"]
        plan = make_plan(tasks, world_size=4, cost_model=self.fast_network)
        assert sorted(plan.owners) == [(0,), (1,), (2,), (3,)]
        assert all(plan.send_counts(rank, 0) == [0] * 4 for rank in range(4))
        assert plan.send_counts(2, 0, direction="return") == [32, 32, 0, 32]
        assert plan.reasons[0].endswith("so one rank sends")

    def test_replicated_matrices_are_computed_everywhere_when_sending_is_dear(self):
        tasks = [matrix(name, (4, 8), (4,), [("replicate",)]) for name in "ab"]
        plan = make_plan(tasks, world_size=4, cost_model=self.slow_network)
        assert plan.owners == ((0, 1, 2, 3),) * 2
        assert plan.owner(0) is None
        assert plan.bytes_sent_total == 0
        assert all(plan.owned(rank, 0) == (0, 1) for rank in range(4))
        assert all(route.is_local for route in every_route(plan, "gather"))
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
        assert plan.bytes_least_total == 4 * (16 + 3 * 16) * 2

    def test_hsdp_computes_once_per_replica_over_a_slow_link_between_them(self):
        model = replace(self.fast_network, replica_bytes_per_second=1.0)
        tasks = [matrix(name, (4, 8), *self.hsdp) for name in "ab"]
        plan = make_plan(tasks, world_size=4, cost_model=model)
        assert plan.owners == ((0, 2), (1, 3))
        for direction in ("gather", "return"):
            assert all(r.source // 2 == r.destination // 2 for r in every_route(plan, direction))

    def test_one_rank_sends_nothing(self):
        plan = make_plan([matrix("a", (4, 8), (1,), [("replicate",)])], world_size=1)
        assert (plan.owners, plan.bytes_sent_total) == (((0,),), 0)


class TestBuckets:
    def test_buckets_are_slices_of_time_over_all_owners(self):
        tasks = [matrix(f"w{i}", (8, 8), (4,), SHARD_ROWS) for i in range(12)]
        plan = make_plan(tasks, world_size=4, bucket_bytes=400)
        assert [len(bucket.tasks) for bucket in plan.buckets] == [4, 4, 4]
        for bucket in range(3):
            assert [len(plan.owned(rank, bucket)) for rank in range(4)] == [1, 1, 1, 1]

    def test_a_small_matrix_that_starts_early_goes_before_a_large_one_that_starts_late(self):
        shapes = [(8, 8), (8, 8), (2, 2)]
        tasks = [matrix(f"w{i}", shape, (2,), SHARD_ROWS) for i, shape in enumerate(shapes)]
        flops = [newton_schulz_flops(*shape) for shape in shapes]
        owners = [(0,), (0,), (1,)]
        assert form_buckets(tasks, owners, flops, world_size=2, bucket_bytes=10**6) == ((0, 2, 1),)

    def test_a_bound_below_the_matrices_does_not_leave_owners_idle(self):
        tasks = [matrix(f"w{i}", (8, 8), (4,), SHARD_ROWS) for i in range(8)]
        plan = make_plan(tasks, world_size=4, bucket_bytes=1)
        assert [len(bucket.tasks) for bucket in plan.buckets] == [4, 4]

    def test_what_replicas_are_sent_counts_towards_the_bound(self):
        """Under DDP nothing is gathered, and every owner returns a copy to each of 7 others."""
        tasks = [matrix(f"w{i}", (8, 8), (8,), [("replicate",)]) for i in range(32)]
        returned = 8 * 8 * 2 + 8 * 4 + 4  # O in bfloat16, v and the scale
        network = CostModel(flops_per_second=1e3, bytes_per_second=1e12, latency_seconds=0.0)
        # A rank that owns one matrix of eight sends 7 copies and receives 7 others' matrices.
        plan = make_plan(tasks, world_size=8, cost_model=network, bucket_bytes=2 * 14 * returned)
        assert [len(bucket.tasks) for bucket in plan.buckets] == [16, 16]
        plan = make_plan(tasks, world_size=8, cost_model=network, bucket_bytes=10**6)
        assert [len(bucket.tasks) for bucket in plan.buckets] == [32]

    def test_one_bucket_has_one_wire_dtype(self):
        tasks = [
            matrix(f"w{i}", (8, 8), (2,), SHARD_ROWS, wire_dtype=["bfloat16", "float32"][i % 2])
            for i in range(4)
        ]
        plan = make_plan(tasks, world_size=2)
        assert [(b.tasks, b.wire_dtype) for b in plan.buckets] == [
            ((0, 2), "bfloat16"),
            ((1, 3), "float32"),
        ]

    def test_batches_are_of_one_shape_and_key(self):
        keys = ["x", "y", "x", "x"]
        tasks = [matrix(f"w{i}", (8, 8), (1,), SHARD_ROWS, key=k) for i, k in enumerate(keys)]
        tasks.append(matrix("wide", (8, 16), (1,), SHARD_ROWS, key="x"))
        plan = make_plan(tasks, world_size=1)
        assert plan.batches(0, 0) == ((4,), (0, 2, 3), (1,))

    def test_predicted_time_hides_exchanges_behind_compute(self):
        model = CostModel(flops_per_second=1.0, bytes_per_second=1e9, latency_seconds=0.0)
        tasks = [matrix(f"w{i}", (8, 8), (2,), SHARD_ROWS) for i in range(4)]
        plan = make_plan(tasks, world_size=2, cost_model=model, bucket_bytes=1)
        compute = 2 * newton_schulz_flops(8, 8)
        assert len(plan.buckets) == 2
        assert plan.predicted_step_seconds == pytest.approx(compute, rel=1e-6)


class TestIdentity:
    def tasks(self):
        return [matrix(name, (4, 8), (2,), SHARD_ROWS) for name in "ab"]

    def plan_with_owners(self, *ranks):
        return plan_from_assignment(
            self.tasks(),
            Assignment(tuple((rank,) for rank in ranks), ("",) * len(ranks)),
            world_size=2,
            cost_model=CostModel(),
            balance="flops",
            bucket_bytes=1000,
        )

    def test_equal_inputs_give_equal_digests_and_texts(self):
        first, second = (make_plan(self.tasks(), world_size=2) for _ in range(2))
        assert first == second
        assert first.digest() == second.digest()
        assert first.to_json() == second.to_json()
        assert first.first_difference(second) is None

    def test_another_owner_changes_the_digest_and_is_named(self):
        first, second = self.plan_with_owners(0, 1), self.plan_with_owners(0, 0)
        assert first.digest() != second.digest()
        assert first.first_difference(second) == (
            "matrix 1, b[0]: owners: [1] in this plan, [0] in the other"
        )

    def test_another_shard_is_named_with_its_rank(self):
        tasks = self.tasks()
        other_layout = ShardLayout(
            (4, 8), ((Region((0, 0), (3, 8)),), (Region((3, 0), (1, 8)),)), (0, 0)
        )
        others = [tasks[0], replace(tasks[1], layout=other_layout)]
        texts = [make_plan(t, world_size=2).canonical() for t in (tasks, others)]
        sentence = first_difference(*texts, names=("rank 0", "rank 1"))
        assert sentence == (
            "matrix 1, b[0]: (offsets, shape) stored on rank 0: "
            "[[[0, 0], [2, 8]]] in rank 0, [[[0, 0], [3, 8]]] in rank 1"
        )

    def test_a_missing_matrix_is_named(self):
        plan, shorter = (make_plan(t, world_size=2) for t in (self.tasks(), self.tasks()[:1]))
        assert plan.first_difference(shorter) == (
            "number of matrices: 2 in this plan, 1 in the other; "
            "the first that only one has is b[0]"
        )

    def test_another_order_of_buckets_is_named(self):
        plan = self.plan_with_owners(0, 1)
        assert json.loads(plan.canonical())["buckets"] == [[0, 1]]
        swapped = plan.canonical().replace('"buckets":[[0,1]]', '"buckets":[[1,0]]')
        sentence = first_difference(plan.canonical(), swapped)
        assert sentence == "bucket 0: [0, 1] in this plan, [1, 0] in the other"

    def test_json_says_who_owns_what(self):
        content = json.loads(make_plan(self.tasks(), world_size=2).to_json())
        assert [m["owners"] for m in content["matrices"]] == [0, 1]
        assert content["imbalance"] == 1.0

    def test_the_description_names_shapes_and_reasons(self):
        text = make_plan(self.tasks(), world_size=2).describe()
        assert "2 matrices on 2 ranks" in text
        assert "4 x 8" in text
        assert "sharded over 2 ranks: gathered to one owner" in text


class TestRefusals:
    def test_layouts_of_another_world_size(self):
        with pytest.raises(ValueError, match=r"a\[0\] \[4, 8\]: its layout names 2 ranks"):
            make_plan([matrix("a", (4, 8), (2,), SHARD_ROWS)], world_size=4)

    def test_one_name_twice(self):
        with pytest.raises(ValueError, match=r"a\[0\]: two matrices"):
            make_plan([matrix("a", (4, 8), (1,), SHARD_ROWS)] * 2, world_size=1)

    def test_elements_that_nobody_stores(self):
        layout = ShardLayout((4, 8), ((Region((0, 0), (2, 8)),), ()))
        task = MatrixTask(name="a", region=Region.whole((4, 8)), rows=4, cols=8, layout=layout)
        with pytest.raises(ValueError, match=r"a \[4, 8\]: the stored regions cover 16 of 32"):
            make_plan([task], world_size=2)

    def test_layouts_that_cut_neurons_at_different_places(self):
        pieces = [((0, 0), (4, 4)), ((0, 4), (2, 4)), ((2, 4), (2, 4))]
        layout = ShardLayout((4, 8), tuple((Region(*piece),) for piece in pieces))
        task = MatrixTask(name="a", region=Region.whole((4, 8)), rows=4, cols=8, layout=layout)
        with pytest.raises(ValueError, match=r"a\[0\] .* overlapping but different neurons"):
            make_plan([task], world_size=3)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rows": 3}, "rows and cols"),
            ({"neuron_dims": (2,)}, "neuron_dims"),
            ({"neuron_dims": (0, 1)}, "neurons"),
            ({"wire_dtype": "int8"}, "dtype"),
            ({"region": Region((1, 0), (4, 8))}, "not a rectangle"),
        ],
    )
    def test_malformed_matrices(self, options, message):
        task = matrix("a", (4, 8), (1,), SHARD_ROWS)
        with pytest.raises(ValueError, match=message):
            replace(task, **options)

    def test_unknown_balance_and_empty_buckets(self):
        with pytest.raises(ValueError, match="balance"):
            make_plan([], world_size=1, balance="size")
        with pytest.raises(ValueError, match="bucket_bytes"):
            make_plan([], world_size=1, bucket_bytes=0)

    def test_no_matrices_make_an_empty_plan(self):
        plan = make_plan([], world_size=2)
        assert (plan.buckets, plan.imbalance, plan.predicted_step_seconds) == ((), 1.0, 0.0)
        assert "0 matrices" in plan.describe()


class TestAlternatives:
    def test_padding_one_matrix_to_eight_ranks_costs_eight_of_everything(self):
        plan = make_plan([matrix("a", (8, 8), (8,), SHARD_ROWS)], world_size=8)
        padded = pad_to_world_size(plan, plan.makespan_bound)
        assert padded.num_orthogonalisations == 8
        assert padded.flops_total == 8 * newton_schulz_flops(8, 8)
        assert padded.bytes_sent_total == 8 * plan.bytes_least_total

    def test_computing_everywhere_multiplies_compute_by_the_ranks(self):
        tasks = [matrix(name, (8, 8), (4,), SHARD_ROWS) for name in "ab"]
        plan = make_plan(tasks, world_size=4)
        everywhere = compute_everywhere(plan, plan.makespan_bound)
        assert everywhere.flops_total == 4 * sum(plan.flops_by_rank)
        assert everywhere.bytes_sent_total == 2 * 3 * 64 * 2  # Each rank lacks 3/4 of each.

    def test_the_plan_comes_first_and_beats_round_robin(self):
        tasks = [
            matrix(f"w{i}", shape, (64,), SHARD_ROWS)
            for i, shape in enumerate(MODELS["llama-1.1b"])
        ]
        plan, paper, *_ = alternatives(make_plan(tasks, world_size=64))
        assert (plan.imbalance, round(paper.imbalance, 2)) == (1.0, 1.33)


def test_llama_70b_on_1024_ranks():
    """Owners, buckets and totals without listing a route: 560 matrices times 1,024 ranks."""
    tasks = [
        matrix(f"w{i:03}", shape, (1024,), SHARD_ROWS)
        for i, shape in enumerate(MODELS["llama-3-70b"])
    ]
    plan = make_plan(tasks, world_size=1024)
    assert plan.imbalance == 1.0
    numel = sum(m * n for m, n in MODELS["llama-3-70b"])
    assert plan.bytes_least_total == 2 * 2 * numel * 1023 // 1024
    assert plan.bytes_sent_total < 1.001 * plan.bytes_least_total


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (names if node.module == "normuon.distributed" else [str(node.module)])


def test_the_planner_imports_the_standard_library_alone():
    package = Path(normuon.distributed.__file__).parent
    reached, waiting = set(), ["plan", "alternatives", "mesh_layout"]
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
    assert {"region", "cost", "routes", "tiling", "ownership"} <= reached
