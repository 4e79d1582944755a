"""Whatever the plan: what is written into the messages of one end is read at the other."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normuon.distributed.exchange import message_bytes
from tests.messages import Delivery, elements_of, entries_of
from tests.planned import route_bytes
from tests.property.plans import plans

quick = settings(max_examples=60, deadline=None)

DTYPES = {
    (2, 4): (torch.bfloat16, torch.float32),
    (4, 4): (torch.float32, torch.float32),
    (4, 8): (torch.float32, torch.float64),
}


def deliveries(plan):
    for bucket, content in enumerate(plan.buckets):
        first = plan.tasks[content[0]]
        for direction in ("gather", "return"):
            yield Delivery(plan, bucket, direction, DTYPES[first.wire_bytes, first.side_bytes])


def numbers(tensors, random):
    """Fills tensors with numbers that every dtype holds exactly, and gives copies."""
    for tensor in tensors:
        values = [float(random.randint(-128, 128)) for _ in range(tensor.numel())]
        tensor.copy_(torch.tensor(values, dtype=tensor.dtype))
    return [tensor.clone() for tensor in tensors]


@quick
@given(plans(), st.randoms(use_true_random=False))
def test_every_element_and_every_entry_arrives_where_its_route_says(plan, random):
    for delivery in deliveries(plan):
        sent = {}
        for rank, message in enumerate(delivery.sent):
            routes = delivery.outgoing[rank]
            elements = numbers(elements_of(message, routes), random)
            entries = iter(numbers(entries_of(message, routes), random))
            for route, values in zip(routes, elements, strict=True):
                sent[route] = (values, [next(entries) for _ in route.entries])
        delivery.run()
        for rank, message in enumerate(delivery.received):
            routes = delivery.incoming[rank]
            entries = iter(entries_of(message, routes))
            for route, values in zip(routes, elements_of(message, routes), strict=True):
                expected, vectors = sent.pop(route)
                assert torch.equal(values, expected)
                assert all(torch.equal(next(entries), vector) for vector in vectors)
        assert not sent


@quick
@given(plans())
def test_the_parts_of_a_message_are_as_long_as_their_routes(plan):
    for delivery in deliveries(plan):
        ends = [("destination", delivery.outgoing, delivery.sent)]
        ends += [("source", delivery.incoming, delivery.received)]
        for end, routes_by_rank, messages in ends:
            for routes, message in zip(routes_by_rank, messages, strict=True):
                expected = [0] * plan.world_size
                for route in routes:
                    expected[getattr(route, end)] += route_bytes(plan, route)
                assert message.split_bytes == expected
                assert message.bytes.numel() == sum(expected)
                wire, side = message.elements.element_size(), message.entries.element_size()
                assert message_bytes(routes, wire_bytes=wire, side_bytes=side) == sum(expected)
                assert message.entries.numel() == sum(sum(route.entries) for route in routes)
