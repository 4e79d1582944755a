"""Copies that repeat one another are one copy, for the patterns that evenly sharded models make."""

from __future__ import annotations

import pytest
import torch

from normuon.distributed.copies import Block, Copy, CopyPlan, contiguous
from normuon.distributed.exchange import Message
from normuon.distributed.plan import make_plan
from normuon.distributed.tiling import tiling_of
from tests.planned import SHARD_ROWS, experts, matrix

WORLD_SIZE = 4


def test_a_block_is_a_view_of_a_flat_tensor_wherever_that_begins():
    memory = torch.arange(20.0)
    view = Block(1, (2, 3), (6, 2)).of(memory[4:])
    assert view.tolist() == [[5, 7, 9], [11, 13, 15]]
    view.zero_()
    assert memory[5] == 0
    assert Block(3, (), ()).of(memory[4:]).item() == 0


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3)])
def test_contiguous_strides_are_torchs(shape):
    assert contiguous(5, shape) == Block(5, shape, torch.empty(shape).stride())


def test_nothing_to_copy_is_no_operation():
    plan = CopyPlan([])
    plan.run_([], [])
    assert plan.num_blocks == 0


def test_copies_that_continue_one_another_in_both_tensors_are_one_stretch():
    plan = CopyPlan(Copy(0, contiguous(3 * i, (3,)), 0, contiguous(3 * i, (3,))) for i in range(5))
    assert plan.num_blocks == 1


def test_copies_between_other_tensors_are_not_joined():
    plan = CopyPlan(Copy(0, contiguous(i, (1,)), i // 2, contiguous(i % 2, (1,))) for i in range(4))
    assert plan.num_blocks == 2
    targets = {0: torch.zeros(2), 1: torch.zeros(2)}
    plan.run_({0: torch.arange(4.0)}, targets)
    assert [targets[0].tolist(), targets[1].tolist()] == [[0, 1], [2, 3]]


def test_copies_that_go_backwards_are_not_joined():
    """A tensor has no negative strides."""
    plan = CopyPlan(Copy(0, contiguous(2 - i, (1,)), 0, contiguous(i, (1,))) for i in range(3))
    target = torch.zeros(3)
    plan.run_([torch.arange(3.0)], [target])
    assert target.tolist() == [2, 1, 0]


def test_one_source_may_be_copied_to_many_places():
    plan = CopyPlan(Copy(0, contiguous(0, (2,)), 0, contiguous(2 * i, (2,))) for i in range(3))
    assert plan.num_blocks == 1
    target = torch.zeros(6)
    plan.run_([torch.tensor([1.0, 2.0])], [target])
    assert target.tolist() == [1, 2] * 3


@pytest.mark.parametrize("target_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_dtypes_are_converted_as_copies_do(source_dtype, target_dtype):
    copies = [Copy(0, contiguous(3 * i, (3,)), 0, Block(i, (3,), (4,))) for i in range(4)]
    source = torch.randn(12, dtype=torch.float64).to(source_dtype)
    target = torch.zeros(12, dtype=target_dtype)
    plan = CopyPlan(copies)
    plan.run_([source], [target])
    assert plan.num_blocks == 1
    assert torch.equal(target, source.view(4, 3).t().flatten().to(target_dtype))


# What an owner reads out of a message, and what a rank writes into one, when shards are equal.


def message_of(routes, peers, storage):
    return Message(
        routes,
        peers,
        world_size=WORLD_SIZE,
        storage=storage,
        wire_dtype=torch.bfloat16,
        side_dtype=torch.float32,
    )


def strided(region, shape, place):
    """What a region spans of matrix ``place`` of a batch of matrices of one shape."""
    rows_and_cols = [(o, s) for o, s in zip(*region, strict=True)][-2:]
    (row, num_rows), (col, num_cols) = rows_and_cols
    offset = (place * shape[0] + row) * shape[1] + col
    return Block(offset, (num_rows, num_cols), (shape[1], 1))


PATTERNS = {
    "rows": [matrix(f"w{i}", (8, 12), (WORLD_SIZE,), SHARD_ROWS) for i in range(8)],
    "columns": [matrix(f"w{i}", (8, 12), (WORLD_SIZE,), [("shard", 1)]) for i in range(8)],
    "experts": experts("moe", (16, 8, 12), (WORLD_SIZE,), [("shard", 1)]),
    "expert columns": experts("moe", (16, 8, 12), (WORLD_SIZE,), [("shard", 2)]),
}


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_an_owner_reads_equal_shards_of_equal_matrices_by_one_copy(pattern):
    """From all other ranks at once: rank 0's are the ranks after it, so nothing lies between."""
    tasks = PATTERNS[pattern]
    plan = make_plan(tasks, world_size=WORLD_SIZE)
    routes = [route for route in plan.receives(0, 0, "gather") if not route.is_local]
    storage = torch.empty(10_000, dtype=torch.uint8)
    message = message_of(routes, [route.source for route in routes], storage)
    own = [index for index in plan.buckets[0] if plan.owners[index] == (0,)]
    copies = []
    for route, offset in zip(routes, message.element_offsets, strict=True):
        region = tiling_of(tasks[route.task]).pieces[route.piece].region
        into = strided(region, (8, 12), own.index(route.task))
        copies.append(Copy(0, contiguous(offset, into.shape), 0, into))
    assert len(copies) == len(own) * (WORLD_SIZE - 1) > 3
    assert CopyPlan(copies).num_blocks == 1


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_a_rank_writes_its_equal_pieces_by_one_copy(pattern):
    tasks = PATTERNS[pattern]
    plan = make_plan(tasks, world_size=WORLD_SIZE)
    sends = plan.sends(0, 0, "gather")
    routes = [route for route in sends if not route.is_local]
    storage = torch.empty(10_000, dtype=torch.uint8)
    message = message_of(routes, [route.destination for route in routes], storage)
    places = {route.task: place for place, route in enumerate(sends)}
    copies = [
        Copy(
            0,
            contiguous(places[route.task] * route.numel, (route.numel,)),
            0,
            contiguous(offset, (route.numel,)),
        )
        for route, offset in zip(routes, message.element_offsets, strict=True)
    ]
    assert len(copies) == len(tasks) * (WORLD_SIZE - 1) // WORLD_SIZE
    assert CopyPlan(copies).num_blocks == 1


@pytest.mark.parametrize("pattern", list(PATTERNS))
def test_an_owner_writes_what_goes_back_by_one_copy(pattern):
    tasks = PATTERNS[pattern]
    plan = make_plan(tasks, world_size=WORLD_SIZE)
    routes = [route for route in plan.sends(0, 0, "return") if not route.is_local]
    storage = torch.empty(10_000, dtype=torch.uint8)
    message = message_of(routes, [route.destination for route in routes], storage)
    own = [index for index in plan.buckets[0] if plan.owners[index] == (0,)]
    copies = []
    for route, offset in zip(routes, message.element_offsets, strict=True):
        region = tiling_of(tasks[route.task]).pieces[route.piece].region
        taken = strided(region, (8, 12), own.index(route.task))
        copies.append(Copy(0, taken, 0, contiguous(offset, taken.shape)))
    assert CopyPlan(copies).num_blocks == 1


def test_the_parts_of_peers_are_staged_by_one_copy():
    """Equal shards give every peer's part one size, with the entries at its end."""
    plan = make_plan(PATTERNS["rows"], world_size=WORLD_SIZE)
    routes = [route for route in plan.sends(0, 0, "gather") if not route.is_local]
    message = message_of(
        routes, [route.destination for route in routes], torch.empty(10_000, dtype=torch.uint8)
    )
    assert message._stage.num_blocks == 1
    assert message._unstage.num_blocks == 1
