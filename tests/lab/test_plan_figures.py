"""What the lab adds up of a plan: the bytes that its routes carry, the FLOPs that are done."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings

import normuon
from normuon.distributed.cost import CostModel
from normuon.distributed.plan import Plan, make_plan
from normuon.orthogonalize import flops_per_matrix, resolve_coefficients
from normuon_lab.plan.alternatives import compute_everywhere, pad_to_world_size
from normuon_lab.plan.bounds import packing_bound
from normuon_lab.plan.contents import PlanRequest, plan_contents, plan_model
from normuon_lab.plan.figures import figures_of, owner_bytes
from normuon_lab.plan.mesh import Mesh
from normuon_lab.plan.model_matrices import model_shapes
from tests.planned import SHARD_ROWS, every_route, matrix, plain_flops, route_bytes
from tests.property.plans import plans


@settings(max_examples=60, deadline=None)
@given(plans())
def test_byte_totals_are_those_of_the_routes(plan: Plan) -> None:
    sent: Counter[int] = Counter()
    received: Counter[int] = Counter()
    least = 0
    for direction in ("gather", "return"):
        for route in every_route(plan, direction):
            if not route.is_local:
                sent[route.source] += route_bytes(plan, route)
                received[route.destination] += route_bytes(plan, route)
                least += route.numel * plan.tasks[route.task].wire_bytes
    figures = figures_of(plan)
    ranks = range(plan.world_size)
    assert figures.bytes_sent_by_rank == tuple(sent[rank] for rank in ranks)
    assert figures.bytes_received_by_rank == tuple(received[rank] for rank in ranks)
    assert figures.bytes_least_total == least


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_float64_on_four_ranks_sends_what_is_planned(dtype: torch.dtype) -> None:
    """Scalars and vectors are as wide on the wire as they are counted."""
    with torch.device("meta"):
        linear = torch.nn.Linear(16, 12, bias=False, dtype=dtype)
    plan = normuon.plan_for(
        normuon.param_groups(linear), mesh_shape=(4,), placements=SHARD_ROWS, wire_dtype=dtype
    )
    total = sum(
        route_bytes(plan, route)
        for direction in ("gather", "return")
        for route in every_route(plan, direction)
        if not route.is_local
    )
    # Three of four shards there and back, their rows of v, and a scale for each of three ranks.
    side = max(4, dtype.itemsize)
    assert total == 2 * 3 * (3 * 16 * dtype.itemsize + 3 * side) + 3 * side
    assert figures_of(plan).bytes_sent_total == total


def test_predicted_time_hides_exchanges_behind_compute() -> None:
    model = CostModel(flops_per_second=1.0, bytes_per_second=1e9, latency_seconds=0.0)
    tasks = [matrix(f"w{i}", (8, 8), (2,), SHARD_ROWS) for i in range(4)]
    plan = make_plan(tasks, world_size=2, cost_model=model, bucket_bytes=1)
    assert len(plan.buckets) == 2
    seconds = figures_of(plan).predicted_step_seconds
    assert seconds == pytest.approx(2 * plain_flops(8, 8), rel=1e-6)


def test_no_matrices_add_up_to_nothing() -> None:
    figures = figures_of(make_plan([], world_size=2))
    assert (figures.bytes_sent_total, figures.predicted_step_seconds) == (0, 0.0)
    assert figures.scratch_bytes_max == 0


def test_matrices_that_need_no_message_are_a_stage_of_their_own() -> None:
    model = CostModel(bytes_per_second=1.0)
    tasks = [matrix(f"w{i}", (8, 8), (2,), [("replicate",)]) for i in range(3)]
    plan = make_plan(tasks, world_size=2, cost_model=model)
    (stage,) = figures_of(plan).buckets
    assert plan.buckets == ()
    assert (stage.flops, stage.gather_bytes, stage.return_bytes) == (3 * plain_flops(8, 8), 0, 0)


def test_padding_one_matrix_to_eight_ranks_costs_eight_of_everything() -> None:
    plan = make_plan([matrix("a", (8, 8), (8,), SHARD_ROWS)], world_size=8)
    padded = pad_to_world_size(plan, plan.makespan_bound)
    assert padded.num_orthogonalisations == 8
    assert padded.flops_total == 8 * plain_flops(8, 8)
    assert padded.bytes_sent_total == 8 * figures_of(plan).bytes_least_total


def test_computing_everywhere_multiplies_compute_by_the_ranks() -> None:
    tasks = [matrix(name, (8, 8), (4,), SHARD_ROWS) for name in "ab"]
    plan = make_plan(tasks, world_size=4)
    everywhere = compute_everywhere(plan, plan.makespan_bound)
    assert everywhere.flops_total == 4 * sum(plan.flops_by_rank)
    assert everywhere.bytes_sent_total == 2 * 3 * 64 * 2  # Each rank lacks 3/4 of each.


def test_scratch_grows_with_the_batch_and_not_with_the_batches() -> None:
    one, two, other = (
        matrix("a", (8, 16), (2,), SHARD_ROWS),
        matrix("b", (8, 16), (2,), SHARD_ROWS),
        matrix("c", (16, 16), (2,), SHARD_ROWS),
    )
    alone = owner_bytes([one], [(0,)], [0])
    assert owner_bytes([one, two], [(0,), (0,)], [0, 1]) == 2 * alone
    assert owner_bytes([one, other], [(0,), (0,)], [0, 1]) < alone + owner_bytes(
        [other], [(0,)], [0]
    )


def request_for(mesh: Mesh) -> PlanRequest:
    return PlanRequest(
        mesh=mesh,
        balance="flops",
        bucket_bytes=2**28,
        wire_dtype="bfloat16",
        cost_model=CostModel(),
    )


def test_the_lab_plans_what_the_optimizer_computes() -> None:
    """The optimizer's own FLOPs, which decide who owns what: its Gram Newton-Schulz takes others
    than the plain iteration, by which 44 of these 48 matrices would have other owners."""
    shapes = model_shapes("gpt2-124m")
    planned = plan_model(shapes, request_for(Mesh(dp_shard=8)))
    contents = plan_contents(planned)
    live = normuon.plan_for(
        shapes.groups, mesh_shape=(8,), placements=SHARD_ROWS, wire_dtype=torch.bfloat16
    )
    assert planned.plan.owners == live.owners
    for task, flops in zip(live.tasks, contents["flops_by_matrix"], strict=True):
        assert flops == flops_per_matrix(
            task.rows,
            task.cols,
            coefficients=resolve_coefficients("jordan", 5),
            dtype=torch.bfloat16,
            device_type="cuda",
        )
    assert contents["packing_bound"] == packing_bound(contents["flops_by_matrix"], world_size=8)
