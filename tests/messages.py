"""The messages of every rank of a plan, filled in and delivered within one process."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normuon.distributed.exchange import Message
from normuon.distributed.plan import Direction, Plan
from normuon.distributed.tiling import Route

UNUSED_BYTES = 24
"""What every storage is longer than its message: buckets share memory."""


def laid_out(
    routes: Sequence[Route],
    peers: Sequence[int],
    *,
    world_size: int,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> Message:
    """A message in memory of its own, in which nothing is zero by chance."""
    wire, side = dtypes
    num_bytes = sum(r.numel * wire.itemsize + sum(r.entries) * side.itemsize for r in routes)
    return Message(
        routes,
        peers,
        world_size=world_size,
        storage=torch.full((num_bytes + UNUSED_BYTES,), 255, dtype=torch.uint8),
        wire_dtype=wire,
        side_dtype=side,
    )


class Delivery:
    """One exchange of one bucket, on all ranks at once.

    Attributes:
        outgoing: for each rank, the routes to others.
        incoming: for each rank, the routes from others.
        sent: for each rank, its message.
        received: for each rank, the message that it gets.
    """

    def __init__(
        self,
        plan: Plan,
        bucket: int,
        direction: Direction,
        dtypes: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self.world_size = plan.world_size
        ranks = range(plan.world_size)
        self.outgoing = [
            [r for r in plan.sends(rank, bucket, direction) if not r.is_local] for rank in ranks
        ]
        self.incoming = [
            [r for r in plan.receives(rank, bucket, direction) if not r.is_local] for rank in ranks
        ]
        common = {"world_size": plan.world_size, "dtypes": dtypes}
        self.sent = [
            laid_out(routes, [r.destination for r in routes], **common) for routes in self.outgoing
        ]
        self.received = [
            laid_out(routes, [r.source for r in routes], **common) for routes in self.incoming
        ]

    def run(self) -> None:
        """What every rank does around an all-to-all, and the all-to-all."""
        for message in self.sent:
            message.stage_entries_()
        for rank, message in enumerate(self.received):
            parts = [
                self.sent[peer].bytes.split(self.sent[peer].split_bytes)[rank]
                for peer in range(self.world_size)
            ]
            assert [part.numel() for part in parts] == message.split_bytes
            message.bytes.copy_(torch.cat(parts))
            message.unstage_entries_()


def elements_of(message: Message, routes: Sequence[Route]) -> list[Tensor]:
    """The matrix elements of each route, as a view of the message."""
    return [
        message.elements[offset : offset + route.numel]
        for route, offset in zip(routes, message.element_offsets, strict=True)
    ]


def entries_of(message: Message, routes: Sequence[Route]) -> list[Tensor]:
    """The entries of each vector of each route in turn, as views of the staging tensor."""
    return [
        message.entries[offset : offset + count]
        for route, offsets in zip(routes, message.entry_offsets, strict=True)
        for count, offset in zip(route.entries, offsets, strict=True)
    ]
