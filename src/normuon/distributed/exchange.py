"""The only issuer of collectives during a step: packed all-to-alls with exact split sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from normuon.distributed.copies import Copy, CopyPlan, contiguous
from normuon.distributed.plan import Direction, Plan
from normuon.distributed.tiling import Route


class Message:
    """One side of an all-to-all: a byte buffer, cut by peer, and where each route's data lies.

    A peer's part holds all matrix elements first, which keeps them aligned, then the entries of
    vectors. Those are written and read in a staging tensor, since they may lie at any even byte.

    Attributes:
        elements: the whole buffer in the wire dtype, flat.
        entries: the staging tensor of vectors, flat, in the side dtype.
        element_offsets: for each route, where its elements begin in ``elements``.
        entry_offsets: for each route and vector, where its entries begin in ``entries``.
        split_bytes: what each peer's part takes.
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
            wire_dtype: of matrix elements.
            side_dtype: of vectors, at least as wide.
        """
        self.element_offsets: list[int] = []
        self.entry_offsets: list[tuple[int, ...]] = []
        self.split_bytes = [0] * world_size
        wire, side = wire_dtype.itemsize, side_dtype.itemsize
        staged: list[Copy] = []
        end = num_entries = position = 0
        for peer in range(world_size):
            start, first_entry = end, num_entries
            while position < len(routes) and peers[position] == peer:
                route = routes[position]
                self.element_offsets.append(end // wire)
                end += route.numel * wire
                offsets = []
                for count in route.entries:
                    offsets.append(num_entries)
                    num_entries += count
                self.entry_offsets.append(tuple(offsets))
                position += 1
            num_bytes = (num_entries - first_entry) * side
            if num_bytes:
                inside = contiguous(first_entry * side, (num_bytes,))
                staged.append(Copy(0, inside, 0, contiguous(end, (num_bytes,))))
            end += num_bytes
            self.split_bytes[peer] = end - start
        self.bytes = storage[:end]
        self.elements = self.bytes.view(wire_dtype)
        self.entries = torch.empty(num_entries, dtype=side_dtype, device=storage.device)
        self._entry_bytes = self.entries.view(torch.uint8)
        self._stage = CopyPlan(staged)
        self._unstage = CopyPlan(Copy(0, copy.put, 0, copy.taken) for copy in staged)

    def stage_entries_(self) -> None:
        """Copies the vectors into the message, before it is sent."""
        self._stage.run_([self._entry_bytes], [self.bytes])

    def unstage_entries_(self) -> None:
        """Copies the vectors out of the message, after it has arrived."""
        self._unstage.run_([self.bytes], [self._entry_bytes])


def message_bytes(routes: Sequence[Route], *, wire_bytes: int, side_bytes: int) -> int:
    """Bytes of a message of these routes."""
    return sum(route.numel * wire_bytes + sum(route.entries) * side_bytes for route in routes)


class Exchange:
    """One direction of one bucket on this rank.

    Attributes:
        outgoing: the routes to other ranks, in the order of the message.
        incoming: the routes from other ranks, in the order of the message.
        local: what this rank sends to itself: copies, no messages.
        sent: the message to fill in.
        received: the message to read.
    """

    def __init__(
        self, plan: Plan, bucket: int, direction: Direction, *, group: dist.ProcessGroup
    ) -> None:
        rank = dist.get_rank(group)
        sends = plan.sends(rank, bucket, direction)
        self.outgoing = [route for route in sends if not route.is_local]
        self.local = [route for route in sends if route.is_local]
        receives = plan.receives(rank, bucket, direction)
        self.incoming = [route for route in receives if not route.is_local]
        self.is_needed = direction == "return" or plan.gathers(bucket)
        self._group = group
        self._work: dist.Work | None = None
        self.sent: Message
        self.received: Message

    def start(self) -> None:
        """Sends, without waiting. Every rank of the group calls it, with nothing to send too."""
        if not self.is_needed:
            return
        self.sent.stage_entries_()
        self._work = dist.all_to_all_single(
            self.received.bytes,
            self.sent.bytes,
            self.received.split_bytes,
            self.sent.split_bytes,
            group=self._group,
            async_op=True,
        )

    def finish(self) -> None:
        """Waits for the data: the host on CPU, the current stream on an accelerator."""
        if not self.is_needed:
            return
        assert self._work is not None
        self._work.wait()
        self._work = None
        self.received.unstage_entries_()


def exchanges(
    plan: Plan,
    direction: Direction,
    *,
    group: dist.ProcessGroup,
    device: torch.device,
    dtypes: Sequence[tuple[torch.dtype, torch.dtype]],
    num_slots: int,
) -> list[Exchange]:
    """Lays out every bucket's messages of one direction, once for the plan's life.

    Buffers are shared by buckets that are never in flight together.

    Args:
        plan: equal on all ranks of the group.
        direction: "gather" to owners or "return" from them.
        group: the ranks that exchange.
        device: of the buffers.
        dtypes: of matrices and of vectors on the wire, by bucket.
        num_slots: how many buckets of this direction may be in flight at once.
    """
    found = [Exchange(plan, n, direction, group=group) for n in range(len(plan.buckets))]
    sizes = [
        [
            message_bytes(routes, wire_bytes=wire.itemsize, side_bytes=side.itemsize)
            for routes in (exchange.outgoing, exchange.incoming)
        ]
        for exchange, (wire, side) in zip(found, dtypes, strict=True)
    ]
    storages = [
        [
            torch.empty(
                max((size[end] for size in sizes[slot::num_slots]), default=0),
                dtype=torch.uint8,
                device=device,
            )
            for slot in range(num_slots)
        ]
        for end in range(2)
    ]
    for number, (exchange, (wire, side)) in enumerate(zip(found, dtypes, strict=True)):
        exchange.sent, exchange.received = (
            Message(
                routes,
                peers,
                world_size=plan.world_size,
                storage=storage[number % num_slots],
                wire_dtype=wire,
                side_dtype=side,
            )
            for routes, peers, storage in (
                (exchange.outgoing, [r.destination for r in exchange.outgoing], storages[0]),
                (exchange.incoming, [r.source for r in exchange.incoming], storages[1]),
            )
        )
    return found


ALIGNMENT = 16
"""Bytes at which every tensor of `exchange_tensors` begins: no dtype is wider."""


def exchange_tensors(
    send: Mapping[int, Sequence[Tensor]],
    receive: Mapping[int, Sequence[Tensor]],
    *,
    group: dist.ProcessGroup,
    device: torch.device,
) -> None:
    """Sends tensors to some ranks and writes what they send, in one all-to-all.

    Every rank of the group calls it, with nothing to send too.

    Args:
        send: by rank; nothing to this rank itself.
        receive: by rank, what is written: as many tensors of the same shapes and dtypes as that
            rank sends here.
        group: the ranks.
        device: of the tensors.
    """
    world_size = dist.get_world_size(group)
    sent, sent_views, sent_bytes = _packed(send, world_size, device)
    received, received_views, received_bytes = _packed(receive, world_size, device)
    if sent_views:
        torch._foreach_copy_(sent_views, [t for r in sorted(send) for t in send[r]])
    dist.all_to_all_single(received, sent, received_bytes, sent_bytes, group=group)
    if received_views:
        torch._foreach_copy_([t for r in sorted(receive) for t in receive[r]], received_views)


def _packed(
    tensors: Mapping[int, Sequence[Tensor]], world_size: int, device: torch.device
) -> tuple[Tensor, list[Tensor], list[int]]:
    """Memory for tensors by rank, its views of their shapes, and the bytes of every rank."""
    split_bytes = [0] * world_size
    starts: list[tuple[int, Tensor]] = []
    end = 0
    for rank in sorted(tensors):
        first = end
        for tensor in tensors[rank]:
            starts.append((end, tensor))
            end += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        split_bytes[rank] = end - first
    memory = torch.empty(end, dtype=torch.uint8, device=device)
    views = [
        memory[start : start + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
        for start, t in starts
    ]
    return memory, views, split_bytes
