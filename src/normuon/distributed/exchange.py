"""The only issuer of collectives: packed all-to-alls with exact split sizes.

One message carries, for each peer, the matrix entries of every route to it and then their neurons'
second moments and scalars. What the entries mean is the caller's business; when the messages are
started and awaited is `pipeline`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from normuon.distributed.plan import Plan
from normuon.distributed.routes import Direction, Route


@dataclass(slots=True)
class Slots:
    """Where one route's data lies in a message: views that stay valid for the plan's life.

    Args:
        elements: flat, in the wire dtype; matrix entries in the region's row-major order.
        neurons: flat, in the side dtype; empty when another route carries them.
        scalars: flat, in the side dtype; 0 or 1 entries.
    """

    elements: Tensor
    neurons: Tensor
    scalars: Tensor


class Message:
    """One side of an all-to-all: a byte buffer, cut by peer, and the slots of its routes.

    A peer's part holds all matrix entries first, which keeps them aligned, then the side data.
    Side data is written and read in a staging tensor, since it may lie at any even byte.
    """

    def __init__(
        self,
        routes: Sequence[Route],
        peers: Sequence[int],
        *,
        world_size: int,
        storage: Tensor,
        wire_dtype: torch.dtype,
        side_dtype: torch.dtype,
    ) -> None:
        """Lays out a message.

        Args:
            routes: sorted by peer; none of them local.
            peers: each route's other end.
            world_size: ranks of the group.
            storage: bytes, at least `message_bytes` of them.
            wire_dtype: of matrix entries.
            side_dtype: of second moments and scalars, at least as wide.
        """
        elements = [0] * world_size
        side = [0] * world_size
        for route, peer in zip(routes, peers, strict=True):
            elements[peer] += route.num_elements
            side[peer] += route.num_neurons + route.num_scalars
        wire_size, side_size = wire_dtype.itemsize, side_dtype.itemsize
        self.split_bytes = [
            e * wire_size + s * side_size for e, s in zip(elements, side, strict=True)
        ]
        self.bytes = storage[: sum(self.split_bytes)]
        self.side = torch.empty(sum(side), dtype=side_dtype, device=storage.device)
        self.slots: list[Slots] = []
        self._side_parts: list[tuple[Tensor, Tensor]] = []
        side_bytes = self.side.view(torch.uint8)
        start = side_start = position = 0
        for peer in range(world_size):
            end = start + elements[peer] * wire_size
            entries = self.bytes[start:end].view(wire_dtype)
            taken, side_taken = 0, side_start
            while position < len(routes) and peers[position] == peer:
                route = routes[position]
                middle = side_taken + route.num_neurons
                last = middle + route.num_scalars
                self.slots.append(
                    Slots(
                        entries[taken : taken + route.num_elements],
                        self.side[side_taken:middle],
                        self.side[middle:last],
                    )
                )
                taken += route.num_elements
                side_taken = last
                position += 1
            stop = end + side[peer] * side_size
            if stop > end:
                staged = side_bytes[side_start * side_size : side_taken * side_size]
                self._side_parts.append((self.bytes[end:stop], staged))
            start, side_start = stop, side_taken

    def stage_side_(self) -> None:
        """Copies the side data into the message, before it is sent."""
        for packed, staged in self._side_parts:
            packed.copy_(staged)

    def unstage_side_(self) -> None:
        """Copies the side data out of the message, after it has arrived."""
        for packed, staged in self._side_parts:
            staged.copy_(packed)


def message_bytes(routes: Sequence[Route], *, wire_size: int, side_size: int) -> int:
    """Bytes of a message of these routes."""
    return sum(
        route.num_elements * wire_size + (route.num_neurons + route.num_scalars) * side_size
        for route in routes
    )


class Exchange:
    """One packed all-to-all: what this rank sends, and what it receives."""

    def __init__(self, group: dist.ProcessGroup, outgoing: Message, incoming: Message) -> None:
        self.group = group
        self.outgoing = outgoing
        self.incoming = incoming
        self._work: dist.Work | None = None

    def start(self) -> None:
        """Sends, without waiting. Every rank of the group calls it, with nothing to send too."""
        self.outgoing.stage_side_()
        self._work = dist.all_to_all_single(
            self.incoming.bytes,
            self.outgoing.bytes,
            self.incoming.split_bytes,
            self.outgoing.split_bytes,
            group=self.group,
            async_op=True,
        )

    def finish(self) -> None:
        """Waits for the data: the host on CPU, the current stream on an accelerator."""
        assert self._work is not None
        self._work.wait()
        self._work = None
        self.incoming.unstage_side_()


@dataclass(slots=True)
class BucketRoutes:
    """One direction of one bucket on this rank: its routes, where their data lies, the exchange.

    Args:
        outgoing: what this rank sends to others, with the slots to fill.
        incoming: what it receives, with the slots to read.
        local: what it sends to itself: copies, no messages.
        exchange: None when no rank of the group sends anything.
    """

    outgoing: list[tuple[Route, Slots]]
    incoming: list[tuple[Route, Slots]]
    local: list[Route]
    exchange: Exchange | None


def bucket_routes(
    plan: Plan,
    *,
    group: dist.ProcessGroup,
    direction: Direction,
    device: torch.device,
    num_slots: int,
) -> list[BucketRoutes]:
    """Lays out every bucket's messages of one direction, once for the plan's life.

    Buffers are shared by buckets that are never in flight together: ``num_slots`` of each kind,
    each as large as its largest bucket.

    Args:
        plan: equal on all ranks of the group.
        group: the ranks that exchange.
        direction: ``"gather"`` to owners or ``"return"`` from them.
        device: of the buffers.
        num_slots: how many buckets of this direction may be in flight at once.
    """
    rank = dist.get_rank(group)
    sends, receives, dtypes = [], [], []
    for index, bucket in enumerate(plan.buckets):
        sends.append(plan.sends(rank, index, direction=direction))
        receives.append(plan.receives(rank, index, direction=direction))
        dtypes.append((getattr(torch, bucket.wire_dtype), getattr(torch, bucket.neuron_dtype)))
    out_storage = _storages(sends, dtypes, num_slots, device)
    in_storage = _storages(receives, dtypes, num_slots, device)
    found = []
    for index, bucket in enumerate(plan.buckets):
        outgoing = [route for route in sends[index] if not route.is_local]
        incoming = [route for route in receives[index] if not route.is_local]
        exchange, out_slots, in_slots = None, [], []
        busiest = bucket.gather_bytes if direction == "gather" else bucket.return_bytes
        if busiest:
            wire_dtype, side_dtype = dtypes[index]
            ends = (
                (outgoing, [route.destination for route in outgoing], out_storage),
                (incoming, [route.source for route in incoming], in_storage),
            )
            messages = [
                Message(
                    routes,
                    peers,
                    world_size=plan.world_size,
                    storage=storage[index % num_slots],
                    wire_dtype=wire_dtype,
                    side_dtype=side_dtype,
                )
                for routes, peers, storage in ends
            ]
            exchange = Exchange(group, *messages)
            out_slots, in_slots = messages[0].slots, messages[1].slots
        found.append(
            BucketRoutes(
                list(zip(outgoing, out_slots, strict=True)),
                list(zip(incoming, in_slots, strict=True)),
                [route for route in sends[index] if route.is_local],
                exchange,
            )
        )
    return found


def _storages(
    routes: Sequence[Sequence[Route]],
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    num_slots: int,
    device: torch.device,
) -> list[Tensor]:
    sizes = [0] * num_slots
    for index, (bucket, (wire, side)) in enumerate(zip(routes, dtypes, strict=True)):
        sent = [route for route in bucket if not route.is_local]
        needed = message_bytes(sent, wire_size=wire.itemsize, side_size=side.itemsize)
        sizes[index % num_slots] = max(sizes[index % num_slots], needed)
    return [torch.empty(size, dtype=torch.uint8, device=device) for size in sizes]
