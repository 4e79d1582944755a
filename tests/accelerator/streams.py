"""Streams of the fake accelerator, and a watch for what they might do too early or too late.

Nothing runs at all: which operation may run before which is told by vector clocks. The host, every
stream and the collectives each have a clock of what is known to have ended when their next
operation begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from normuon.distributed.exchange import Exchange
from tests.accelerator.device import NAME
from tests.accelerator.watch import PRODUCTS, QUESTIONS, READS, Fault, _place

HOST, MAIN, COLLECTIVES = "the host", "the main stream", "the collectives"

Clock = dict[str, int]
"""For each of them, how many of its operations have ended."""


class Event:
    """The end of what a stream had been given."""

    def __init__(self, line: Timeline) -> None:
        self.line, self.clock = line, Clock()

    def synchronize(self) -> None:
        """The host waits."""
        self.line.follow(HOST, self.clock)


class Stream:
    """One stream."""

    def __init__(self, line: Timeline, name: str) -> None:
        self.line, self.name = line, name
        self.device = torch.device(NAME, 0)  # Known where the device has been registered.
        line.clocks.setdefault(name, {})

    def wait_stream(self, other: Stream) -> None:
        """What follows here begins after what the other has been given."""
        self.line.follow(self.name, self.line.clocks[other.name])

    def wait_event(self, event: Event) -> None:
        """What follows here begins after the event."""
        self.line.follow(self.name, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        """The end of what has been given so far."""
        event = event or Event(self.line)
        event.clock = dict(self.line.clocks[self.name])
        return event


class Timeline:
    """What `torch.cuda` says of streams, for the fake accelerator."""

    def __init__(self) -> None:
        self.clocks: dict[str, Clock] = {HOST: {}, COLLECTIVES: {}}
        self.current = Stream(self, MAIN)
        self._num_sides = 0

    def follow(self, name: str, clock: Clock) -> None:
        """What follows there begins when all of a clock has ended."""
        own = self.clocks[name]
        own.update({other: max(n, own.get(other, 0)) for other, n in clock.items()})

    def next_operation(self, name: str) -> int:
        """Gives one an operation; the host is where it stands."""
        self.follow(name, self.clocks[HOST])
        own = self.clocks[name]
        own[name] = own.get(name, 0) + 1
        return own[name]

    def Stream(self, device: object) -> Stream:  # noqa: N802
        """A new one."""
        self._num_sides += 1
        return Stream(self, f"side stream {self._num_sides}")

    def current_stream(self, device: object) -> Stream:
        """The one that is given operations."""
        return self.current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Gives operations to another."""
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


@dataclass(slots=True)
class Access:
    """Who read or wrote bytes of some memory, by which of its operations."""

    who: str
    number: int
    start: int
    stop: int
    writes: bool
    place: str


@dataclass(slots=True)
class Memory:
    """A storage: who allocated it, and what was done with it."""

    storage: StorageWeakRef
    allocated_by: str
    on_device: bool
    accesses: list[Access]


class Races(TorchDispatchMode):
    """Fails where one may touch memory before another has done with it.

    Attributes:
        bytes_up, bytes_down: copied to the device and back, by dtype.
        host_waits: where a copy made the host wait.
        products: the device types of all matrix products.
    """

    def __init__(self, line: Timeline) -> None:
        super().__init__()
        self.line = line
        self.bytes_up: dict[torch.dtype, int] = {}
        self.bytes_down: dict[torch.dtype, int] = {}
        self.host_waits: list[str] = []
        self.products: set[str] = set()
        self._memories: dict[int, Memory] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation and notes what it touches."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        self._check_freed()
        results = func(*args, **kwargs)
        name = func._schema.name
        if func.is_view or name in QUESTIONS or name == "aten::detach":
            return results
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        found = [x for x in tree_leaves(results) if isinstance(x, Tensor)]
        written = {id(t) for t in _written(func, args, kwargs)} | {id(t) for t in found}
        everything = {id(t): t for t in (*given, *found)}.values()
        on_device = any(not t.is_cpu for t in everything)
        if on_device and name in READS:
            raise Fault(f"{func} reads a value on the host, at {_place()}")
        if name in PRODUCTS:
            self.products |= {t.device.type for t in found or given}
        who = self.line.current.name if on_device else HOST
        if name.startswith("c10d::"):
            self.line.follow(COLLECTIVES, self.line.clocks[who])
            who = COLLECTIVES
        number = self.line.next_operation(who)
        for tensor in everything:
            self._note(tensor, who, number, writes=id(tensor) in written)
        if name.startswith("c10d::") and "alltoall" not in name:
            self.line.follow(self.line.current.name, self.line.clocks[COLLECTIVES])
        if on_device and any(t.is_cpu and t.ndim for t in everything):
            self._note_transfer(func, args, kwargs, found)
        return results

    def _note(self, tensor: Tensor, who: str, number: int, *, writes: bool) -> None:
        storage = tensor.untyped_storage()
        memory = self._memories.get(storage._cdata)
        if memory is None:
            allocated_by = HOST if tensor.is_cpu else self.line.current.name
            memory = Memory(StorageWeakRef(storage), allocated_by, not tensor.is_cpu, [])
            self._memories[storage._cdata] = memory
        start = tensor.storage_offset() * tensor.itemsize
        span = sum((s - 1) * step for s, step in zip(tensor.shape, tensor.stride(), strict=True))
        stop = start + (span + 1) * tensor.itemsize if tensor.numel() else start
        clock = self.line.clocks[who]
        for old in memory.accesses:
            meets = old.start < stop and start < old.stop and (writes or old.writes)
            if meets and clock.get(old.who, 0) < old.number:
                raise Fault(
                    f"{who} {'writes' if writes else 'reads'} at {_place()}, and {old.who} may not "
                    f"have {'written' if old.writes else 'read'} yet at {old.place}"
                )
        access = Access(who, number, start, stop, writes, _place())
        memory.accesses = [old for old in memory.accesses if not _is_replaced(old, access)]
        memory.accesses.append(access)

    def _check_freed(self) -> None:
        """Memory of the device goes to the next who allocates on the same stream."""
        for key, memory in [(k, m) for k, m in self._memories.items() if m.storage.expired()]:
            del self._memories[key]
            known = dict(self.line.clocks[HOST])
            for other, number in self.line.clocks.get(memory.allocated_by, {}).items():
                known[other] = max(number, known.get(other, 0))
            for old in memory.accesses if memory.on_device else ():
                if known.get(old.who, 0) < old.number:
                    raise Fault(f"memory is let go that {old.who} still needs, at {old.place}")

    def _note_transfer(self, func: Any, args: Any, kwargs: Any, found: list[Tensor]) -> None:
        name = func._schema.name
        if name != "aten::copy_":
            self.host_waits.append(f"{func}, at {_place()}")
            return
        target, source = args[0], args[1]
        counts = self.bytes_down if target.is_cpu else self.bytes_up
        assert target.dtype == source.dtype, "nothing is converted on the way"
        counts[source.dtype] = counts.get(source.dtype, 0) + source.numel() * source.itemsize
        is_async = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if not is_async:
            self.host_waits.append(f"{func}, at {_place()}")


def _is_replaced(old: Access, new: Access) -> bool:
    same = (old.who, old.start, old.stop) == (new.who, new.start, new.stop)
    return same and new.writes >= old.writes


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What an operation writes to; a collective may write to all that it is given."""
    if func._schema.name.startswith("c10d::"):
        return [x for x in tree_leaves(args) if isinstance(x, Tensor)]
    found = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            found += [x for x in tree_leaves(value) if isinstance(x, Tensor)]
    return found


@contextmanager
def streams() -> Iterator[Timeline]:
    """Here the fake accelerator has streams, and an all-to-all ends when it is waited for."""
    line = Timeline()
    module = torch.get_device_module(NAME)
    start, finish = Exchange.start, Exchange.finish
    ends: dict[int, Clock] = {}

    def started(exchange: Exchange) -> None:
        start(exchange)
        ends[id(exchange)] = dict(line.clocks[COLLECTIVES])

    def finished(exchange: Exchange) -> None:
        line.follow(line.current.name, ends.pop(id(exchange)))
        finish(exchange)

    named = {"Stream": line.Stream, "current_stream": line.current_stream, "stream": line.stream}
    with (
        mock.patch.multiple(module, create=True, **named),
        mock.patch.multiple(Exchange, start=started, finish=finished),
    ):
        yield line
