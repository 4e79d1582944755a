"""Bytes that a set of matrices moves, per rank and in each direction, without listing routes.

Matrices with the same tiling move the same bytes but for what their owners store themselves, so the
work is per tiling and per owner, never per (matrix, rank). `routes` lists what is counted here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from normuon.distributed.routes import owner_for
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import GatherBytes, tiling_of


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes on the wire by rank; local copies are not counted.

    Args:
        gather_sent: by the ranks that store, to owners.
        gather_received: by owners.
        return_sent: by owners.
        return_received: by the ranks that store.
        least: what any scheme with these owners must send: every stored region that is not on its
            owner, there and back, without v, flags or scales.
    """

    gather_sent: list[int]
    gather_received: list[int]
    return_sent: list[int]
    return_received: list[int]
    least: int

    @property
    def total(self) -> int:
        """All bytes sent, both ways."""
        return sum(self.gather_sent) + sum(self.return_sent)

    @property
    def gather_busiest(self) -> int:
        """What the busiest rank sends or receives on the way to owners."""
        return max(max(self.gather_sent), max(self.gather_received))

    @property
    def return_busiest(self) -> int:
        """What the busiest rank sends or receives on the way back."""
        return max(max(self.return_sent), max(self.return_received))


def count_traffic(
    tasks: Sequence[MatrixTask],
    owners: Sequence[Sequence[int]],
    indices: Iterable[int],
    *,
    world_size: int,
) -> Traffic:
    """The traffic of the matrices `indices`.

    Args:
        tasks: the plan's matrices.
        owners: for each, one rank, or one per full replica.
        indices: which matrices to count.
        world_size: ranks of the group.
    """
    counter = _Counter(world_size)
    for index in indices:
        task = tasks[index]
        tiling = tiling_of(task)
        if len(owners[index]) == len(tiling.numel_by_rank) == len(tiling.whole_ranks) and (
            set(owners[index]) == set(tiling.whole_ranks)
        ):
            continue  # Every rank that stores the matrix computes it.
        for owner in owners[index]:
            counter.add_gather(task, owner)
        counter.add_return(task, owners[index])
    return counter.finish()


class _Counter:
    """Sums vectors of bytes by rank: whole vectors once at the end, corrections as they come."""

    def __init__(self, world_size: int) -> None:
        self.gather_sent = [0] * world_size
        self.gather_received = [0] * world_size
        self.return_sent = [0] * world_size
        self.return_received = [0] * world_size
        self.least = 0
        self.gather_tables: dict[int, tuple[GatherBytes, int]] = {}
        self.return_tables: dict[int, tuple[GatherBytes, int]] = {}

    def add_gather(self, task: MatrixTask, owner: int) -> None:
        tiling = tiling_of(task)
        sizes = {"wire_bytes": task.wire_bytes, "neuron_bytes": task.neuron_bytes}
        table = tiling.gather_bytes(tiling.layout.replica_of(owner), **sizes)
        self.gather_tables[id(table)] = (
            table,
            self.gather_tables.get(id(table), (table, 0))[1] + 1,
        )
        received = table.total
        for rank, correction in tiling.gather_corrections(owner, **sizes).items():
            self.gather_sent[rank] += correction
            received += correction
        self.gather_received[owner] += received
        self.least += (task.numel - tiling.numel_by_rank.get(owner, 0)) * task.wire_bytes

    def add_return(self, task: MatrixTask, owners: Sequence[int]) -> None:
        tiling = tiling_of(task)
        table = tiling.return_bytes(wire_bytes=task.wire_bytes, neuron_bytes=task.neuron_bytes)
        if len(owners) == 1:
            owner = owners[0]
            own = table.by_rank.get(owner, 0)
            count = self.return_tables.get(id(table), (table, 0))[1] + 1
            self.return_tables[id(table)] = (table, count)
            self.return_received[owner] -= own
            self.return_sent[owner] += table.total - own
        else:
            for rank, num_bytes in table.by_rank.items():
                owner = owner_for(tiling, owners, rank)
                if owner != rank:
                    self.return_sent[owner] += num_bytes
                    self.return_received[rank] += num_bytes
        stored = sum(tiling.numel_by_rank.values())
        at_owners = sum(tiling.numel_by_rank.get(owner, 0) for owner in owners)
        self.least += (stored - at_owners) * task.wire_bytes

    def finish(self) -> Traffic:
        for sums, tables in (
            (self.gather_sent, self.gather_tables),
            (self.return_received, self.return_tables),
        ):
            for table, count in tables.values():
                for rank, num_bytes in table.by_rank.items():
                    sums[rank] += count * num_bytes
        return Traffic(
            self.gather_sent,
            self.gather_received,
            self.return_sent,
            self.return_received,
            self.least,
        )
