"""What the lab adds up of a plan: the bytes that its routes carry, the FLOPs that are done."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import normuon
from normuon.distributed.cost import CostModel
from normuon.distributed.plan import Plan, make_plan
from normuon.orthogonalize import flops_per_matrix, resolve_coefficients
from normuon_lab.plan.alternatives import compute_everywhere, pad_to_world_size
from normuon_lab.plan.bounds import packing_bound
from normuon_lab.plan.contents import plan_contents, plan_model
from normuon_lab.plan.figures import batch_bytes, figures_of, owner_bytes
from normuon_lab.plan.mesh import Mesh
from normuon_lab.plan.model_matrices import model_shapes
from tests.lab.plan.planned_models import request_for
from tests.planned import SHARD_ROWS, every_route, experts, matrix, plain_flops, route_bytes
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


class Counted:
    """Stands in for an all-to-all: counts what a rank sends, and receives zeros at once."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def __call__(
        self,
        received: torch.Tensor,
        sent: torch.Tensor,
        received_splits: list[int],
        sent_splits: list[int],
        **_: object,
    ) -> Counted:
        assert sum(sent_splits) == sent.nbytes
        assert sum(received_splits) == received.nbytes
        self.num_bytes += sent.nbytes
        received.zero_()
        return self

    def wait(self) -> None:
        pass


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_every_rank_sends_the_bytes_that_its_plan_counts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted once as 4 bytes while float64 parameters sent 8: scalars, on every rank.

    Shards are even, uneven and empty, and one matrix is stored [in, out].
    """
    sent, planned = [], []
    for rank in range(4):
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
        try:
            mesh = init_device_mesh("cpu", (4,))

            def shard(shape: tuple[int, int], mesh=mesh) -> torch.Tensor:
                whole = torch.randn(shape, dtype=dtype)
                return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

            params = [torch.nn.Parameter(shard(s)) for s in ((12, 16), (10, 7), (5, 3), (8, 8))]
            for param in params:
                param.grad = shard(tuple(param.shape))
            transposed = normuon.MatrixView(neuron_dim=1)
            groups = [{"params": params[:3]}, {"params": params[3:], "view": transposed}]
            optimizer = normuon.NorMuon(groups, lr=1e-3)
            counted = Counted()
            monkeypatch.setattr(dist, "all_to_all_single", counted)
            optimizer.step()
            monkeypatch.undo()
            sent.append(counted.num_bytes)
            plan = normuon.plan_for(optimizer.param_groups)
            planned.append(figures_of(plan).bytes_sent_by_rank)
        finally:
            dist.destroy_process_group()
    assert min(sent) > 0
    assert planned == [tuple(sent)] * 4


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


def test_the_first_gather_hides_behind_matrices_that_need_no_message() -> None:
    flops = plain_flops(8, 8)
    model = CostModel(flops_per_second=flops / 50, bytes_per_second=1.0, latency_seconds=0.0)
    tasks = [matrix(name, (8, 8), (2,), [("replicate",)]) for name in "ab"]
    tasks += [matrix(name, (8, 8), (2,), SHARD_ROWS) for name in "cd"]
    plan = make_plan(tasks, world_size=2, cost_model=model)
    assert plan.alone == (0, 1)
    assert plan.owners[2:] == ((0,), (1,))
    assert plan.flops_by_rank == (3 * flops, 3 * flops)
    figures = figures_of(plan)
    assert [stage.num_matrices for stage in figures.buckets] == [2, 2]
    # Half a matrix and half of its v, there and back with a scale: 80 s and 84 s. Behind the 100 s
    # of the first two matrices the gather is free; the 50 s of a third and its return are not.
    assert figures.predicted_step_seconds == pytest.approx(100 + 50 + 84)


def test_padding_one_matrix_to_eight_ranks_costs_eight_of_everything() -> None:
    plan = make_plan([matrix("a", (8, 8), (8,), SHARD_ROWS)], world_size=8)
    padded = pad_to_world_size(plan)
    assert padded.num_orthogonalisations == 8
    assert sum(padded.flops_by_rank) == 8 * plain_flops(8, 8)
    assert padded.bytes_sent_total == 8 * figures_of(plan).bytes_least_total


def test_computing_everywhere_multiplies_compute_by_the_ranks() -> None:
    tasks = [matrix(name, (8, 8), (4,), SHARD_ROWS) for name in "ab"]
    plan = make_plan(tasks, world_size=4)
    everywhere = compute_everywhere(plan)
    assert sum(everywhere.flops_by_rank) == 4 * sum(plan.flops_by_rank)
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


def test_scratch_of_one_matrix_by_hand() -> None:
    """128 elements: float32, their cast, the rounded ones; the next iterate and four 8 x 8."""
    task = matrix("a", (8, 16), (2,), SHARD_ROWS)
    assert batch_bytes(task, 1) == (4 + 2 + 2) * 128 + 2 * (128 + 4 * 64)
    assert owner_bytes([task], [(0,)], [0]) == batch_bytes(task, 1) + 2 * 128
    # The dtype on the wire is that of whole matrices, not of Newton-Schulz.
    wide = matrix("a", (8, 16), (2,), SHARD_ROWS, wire_bytes=4)
    assert owner_bytes([wide], [(0,)], [0]) == batch_bytes(task, 1) + 4 * 128


def test_matrices_that_need_no_message_take_the_scratch_of_a_batch_alone() -> None:
    """The step takes them from where they are stored, one batch after another."""
    slow = CostModel(bytes_per_second=1.0)
    tasks = [matrix(f"w{i}", (8, 8), (4,), [("replicate",)]) for i in range(3)]
    plan = make_plan(tasks, world_size=4, cost_model=slow)
    assert plan.alone == (0, 1, 2)
    assert figures_of(plan).scratch_bytes_max == batch_bytes(tasks[0], 3)
    # With experts on each rank besides, which are a batch of their own where their shape is.
    for shape, of, number in (((8, 64, 64), -1, 2), ((4, 4, 4), 0, 3), ((4, 8, 8), 0, 4)):
        both = tasks + experts("moe", shape, (4,), SHARD_ROWS)
        plan = make_plan(both, world_size=4, cost_model=slow)
        assert len(plan.alone) == len(both)
        assert figures_of(plan).scratch_bytes_max == batch_bytes(both[of], number)


def test_a_large_matrix_goes_alone_through_its_scratch() -> None:
    task = matrix("a", (8192, 28672), (2,), SHARD_ROWS)
    assert batch_bytes(task, 5) == batch_bytes(task, 1) < 2**32


def test_on_one_rank_scratch_is_a_batch_whatever_the_wire() -> None:
    shapes = model_shapes("gpt2-124m")
    for wire_dtype in ("bfloat16", "float32"):
        contents = plan_contents(plan_model(shapes, request_for(Mesh(), wire_dtype=wire_dtype)))
        # The twelve feed-forward matrices of one shape.
        numel = 768 * 3072
        each = 8 * numel + 2 * (numel + 4 * 768**2)
        assert contents["scratch_bytes_max"] == 12 * each
        assert contents["alternatives"]["replicate"]["scratch_bytes_max"] == each
        assert contents["alternatives"]["padding"]["scratch_bytes_max"] == each


def test_the_least_bytes_of_llama_3_70b_on_1024_ranks() -> None:
    """Totals without listing a route: 560 matrices times 1,024 ranks."""
    planned = plan_model(model_shapes("llama3-70b"), request_for(Mesh(dp_shard=1024)))
    assert planned.asked.plan.imbalance == 1.0
    numel = sum(task.numel for task in planned.asked.plan.tasks)
    figures = planned.asked.figures
    assert figures.bytes_least_total == 2 * 2 * numel * 1023 // 1024
    assert figures.bytes_sent_total < 1.001 * figures.bytes_least_total


def test_the_plan_beats_round_robin_and_nothing_beats_the_plan() -> None:
    """The paper's 1.1B on 64 ranks."""
    contents = plan_contents(plan_model(model_shapes("llama-1.1b"), request_for(Mesh(dp_shard=64))))
    assert contents["packing_imbalance"] == 1.0
    assert contents["imbalance"] < 1.01
    assert contents["alternatives"]["round_robin"]["imbalance"] > 1.4


def test_the_lab_plans_what_the_optimizer_computes() -> None:
    """The optimizer's own FLOPs, which decide who owns what: its Gram Newton-Schulz takes others
    than the plain iteration, by which 44 of these 48 matrices would have other owners."""
    shapes = model_shapes("gpt2-124m")
    planned = plan_model(shapes, request_for(Mesh(dp_shard=8)))
    contents = plan_contents(planned)
    live = normuon.plan_for(
        shapes.groups, mesh_shape=(8,), placements=SHARD_ROWS, wire_dtype=torch.bfloat16
    )
    assert planned.asked.plan.owners == live.owners
    for task, flops in zip(live.tasks, contents["flops_by_matrix"], strict=True):
        assert flops == flops_per_matrix(
            task.rows,
            task.cols,
            coefficients=resolve_coefficients("jordan", 5),
            dtype=torch.bfloat16,
            device_type="cuda",
        )
    assert contents["packing_bound"] == packing_bound(contents["flops_by_matrix"], world_size=8)
