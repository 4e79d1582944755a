"""Messages: where elements and entries lie in them, and which of them share memory."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from normuon.distributed.cost import CostModel
from normuon.distributed.exchange import exchanges, message_bytes
from normuon.distributed.plan import make_plan
from normuon.distributed.tiling import Route
from tests.messages import elements_of, entries_of, laid_out
from tests.planned import SHARD_ROWS, matrix

DTYPES = [
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.float64),
    (torch.float64, torch.float64),
]

ROUTES = [
    # To rank 1 an odd number of elements, so that in bfloat16 the entries begin at 2 modulo 4.
    Route(0, 0, 0, 1, 5, (3,)),
    Route(1, 0, 0, 1, 2, (0,)),
    # To rank 3 nothing but elements, to rank 4 entries of two vectors.
    Route(2, 0, 0, 3, 7, ()),
    Route(3, 0, 0, 4, 1, (1, 2)),
    Route(4, 0, 0, 4, 4, (0, 5)),
]
PEERS = [route.destination for route in ROUTES]


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_message_by_hand(dtypes):
    wire, side = (dtype.itemsize for dtype in dtypes)
    message = laid_out(ROUTES, PEERS, world_size=5, dtypes=dtypes)
    assert message.split_bytes == [0, 7 * wire + 3 * side, 0, 7 * wire, 5 * wire + 8 * side]
    assert message_bytes(ROUTES, wire_bytes=wire, side_bytes=side) == sum(message.split_bytes)
    # The elements of a peer follow one another, and entries lie behind them.
    behind_rank_1 = 7 + 3 * side // wire
    behind_rank_3 = behind_rank_1 + 7
    assert message.element_offsets == [0, 5, behind_rank_1, behind_rank_3, behind_rank_3 + 1]
    # Staged, vectors lie side by side.
    assert message.entry_offsets == [(0,), (3,), (), (3, 4), (6, 6)]
    assert message.entries.shape == (11,)
    assert (message.elements.dtype, message.entries.dtype) == dtypes


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_elements_are_aligned_whatever_stands_before_them(dtypes):
    message = laid_out(ROUTES, PEERS, world_size=5, dtypes=dtypes)
    for values in elements_of(message, ROUTES):
        assert values.data_ptr() % dtypes[0].itemsize == 0
    for values in entries_of(message, ROUTES):
        assert values.data_ptr() % dtypes[1].itemsize == 0


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_what_is_staged_at_one_end_is_unstaged_at_the_other(dtypes):
    sent, received = (laid_out(ROUTES, PEERS, world_size=5, dtypes=dtypes) for _ in range(2))
    for number, values in enumerate(elements_of(sent, ROUTES)):
        values.copy_(10 * number + torch.arange(values.numel()))
    sent.entries.copy_(torch.arange(11) + 100)
    sent.stage_entries_()
    received.bytes.copy_(sent.bytes)
    received.unstage_entries_()
    assert received.entries.tolist() == list(range(100, 111))
    for number, values in enumerate(elements_of(received, ROUTES)):
        assert values.tolist() == [10 * number + i for i in range(values.numel())]


def test_staging_writes_nothing_but_entries():
    sent = laid_out(ROUTES, PEERS, world_size=5, dtypes=DTYPES[0])
    sent.bytes.fill_(7)
    before = [values.clone() for values in elements_of(sent, ROUTES)]
    sent.entries.zero_()
    sent.stage_entries_()
    # 7 and 5 elements of 2 bytes go to ranks with entries, 7 to one without.
    assert (sent.bytes == 7).sum() == (7 + 7 + 5) * 2
    for values, expected in zip(elements_of(sent, ROUTES), before, strict=True):
        assert torch.equal(values, expected)


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_a_message_of_nothing_is_empty(dtypes):
    message = laid_out([], [], world_size=3, dtypes=dtypes)
    message.stage_entries_()
    message.unstage_entries_()
    assert message.split_bytes == [0, 0, 0]
    assert (message.bytes.numel(), message.elements.numel(), message.entries.numel()) == (0, 0, 0)


@pytest.fixture
def rank_one_of_four():
    """Of which nothing is ever sent."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    yield dist.group.WORLD
    dist.destroy_process_group()


def laid_out_exchanges(plan, direction, group, num_slots=2):
    return exchanges(
        plan,
        direction,
        group=group,
        device=torch.device("cpu"),
        dtypes=[DTYPES[0]] * len(plan.buckets),
        num_slots=num_slots,
    )


def memory(message):
    return message.bytes.untyped_storage().data_ptr()


def test_every_second_bucket_uses_the_same_memory(rank_one_of_four):
    """Of five buckets two of a direction are in flight at once."""
    tasks = [matrix(f"w{i:02}", (8, 8), (4,), SHARD_ROWS) for i in range(20)]
    plan = make_plan(tasks, world_size=4, bucket_bytes=400)
    assert len(plan.buckets) == 5
    found = {
        direction: laid_out_exchanges(plan, direction, rank_one_of_four)
        for direction in ("gather", "return")
    }
    places = []
    for of_direction in found.values():
        for messages in ([e.sent for e in of_direction], [e.received for e in of_direction]):
            places.append([memory(message) for message in messages])
            assert [place == places[-1][0] for place in places[-1]] == [True, False] * 2 + [True]
            assert places[-1][1] == places[-1][3]
    # What is sent and what is received, there and back, never share any.
    assert len({place for of_kind in places for place in of_kind}) == 8


@pytest.mark.parametrize("direction", ["gather", "return"])
@pytest.mark.parametrize("end", ["sent", "received"])
def test_memory_is_that_of_the_largest_bucket_of_its_turn(rank_one_of_four, end, direction):
    """What a rank sends and what it receives differ, and so do the buckets."""
    shapes = [(16, 16)] * 4 + [(8, 8)] * 6 + [(4, 4)] * 5
    tasks = [matrix(f"w{i:02}", shape, (4,), SHARD_ROWS) for i, shape in enumerate(shapes)]
    plan = make_plan(tasks, world_size=4, bucket_bytes=1)
    found = laid_out_exchanges(plan, direction, rank_one_of_four)
    messages = [getattr(exchange, end) for exchange in found]
    sizes = [message.bytes.numel() for message in messages]
    assert sizes == [sum(message.split_bytes) for message in messages]
    assert len(set(sizes)) > 1
    assert sizes != [
        (exchange.received if end == "sent" else exchange.sent).bytes.numel() for exchange in found
    ]
    for number, message in enumerate(messages):
        assert message.bytes.untyped_storage().nbytes() == max(sizes[number % 2 :: 2])


def test_an_exchange_splits_routes_into_messages_and_copies(rank_one_of_four):
    tasks = [matrix(name, (8, 8), (4,), SHARD_ROWS) for name in "abcd"]
    plan = make_plan(tasks, world_size=4)
    for direction in ("gather", "return"):
        (exchange,) = laid_out_exchanges(plan, direction, rank_one_of_four)
        assert [route.destination for route in exchange.outgoing] == [0, 2, 3]
        assert [route.source for route in exchange.incoming] == [0, 2, 3]
        (local,) = exchange.local
        assert (local.source, local.destination) == (1, 1)
        wire_and_vectors = {"gather": 16 * 2 + 2 * 4, "return": 16 * 2 + 3 * 4}[direction]
        assert exchange.sent.split_bytes == [
            wire_and_vectors,
            0,
            wire_and_vectors,
            wire_and_vectors,
        ]
        assert exchange.received.split_bytes == exchange.sent.split_bytes


def test_an_exchange_in_which_nobody_sends_issues_no_collective(rank_one_of_four, monkeypatch):
    """Under DDP every owner has its matrices already, and every rank knows that."""
    tasks = [matrix(name, (8, 8), (4,), [("replicate",)]) for name in "abcd"]
    network = CostModel(flops_per_second=1e3, bytes_per_second=1e12, latency_seconds=0.0)
    plan = make_plan(tasks, world_size=4, cost_model=network)
    issued = []
    issue = dist.all_to_all_single
    monkeypatch.setattr(
        dist, "all_to_all_single", lambda *args, **kw: issued.append(1) or issue(*args, **kw)
    )
    for direction, expected in (("gather", 0), ("return", 1)):
        (exchange,) = laid_out_exchanges(plan, direction, rank_one_of_four)
        issued.clear()
        exchange.start()
        exchange.finish()
        assert len(issued) == expected


def test_a_rank_with_nothing_to_say_issues_the_collective_all_the_same(
    rank_one_of_four, monkeypatch
):
    """Ranks 0 and 2 store a row each, and rank 1 neither stores nor owns anything."""
    grid = [("shard", 0), ("shard", 1)]
    plan = make_plan([matrix("a", (2, 1), (2, 2), grid)], world_size=4)
    assert plan.owners == ((0,),)
    issued = []
    monkeypatch.setattr(dist, "all_to_all_single", lambda *args, **kw: issued.append(args))
    for direction in ("gather", "return"):
        (exchange,) = laid_out_exchanges(plan, direction, rank_one_of_four)
        assert exchange.outgoing == exchange.incoming == exchange.local == []
        exchange.start()
    assert [splits for _, _, *splits in issued] == [[[0] * 4, [0] * 4]] * 2
