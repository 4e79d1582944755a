"""Who sends which piece of which matrix to whom: routes to owners, and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from normuon.distributed.task import Dims, MatrixTask
from normuon.distributed.tiling import MatrixTiling, tiling_of

Owners = Sequence[tuple[int, ...]]
"""For each matrix its owner, or one owner per full replica in replica order."""


@dataclass(frozen=True, slots=True)
class Route:
    """One piece of one matrix, from one rank to another.

    Args:
        task: index of the matrix in the plan's tasks.
        piece: index of the piece in the matrix's tiling.
        source: rank that sends.
        destination: rank that receives.
        numel: matrix elements that travel.
        entries: for each vector of this direction, how many of its entries ride along: those that
            the piece spans, or 0 where another piece carries them.
    """

    task: int
    piece: int
    source: int
    destination: int
    numel: int
    entries: tuple[int, ...]

    @property
    def is_local(self) -> bool:
        """Whether source and destination are one rank: a copy, not a message."""
        return self.source == self.destination


def gather_sends(
    tasks: Sequence[MatrixTask], owners: Owners, bucket: Iterable[int], rank: int
) -> list[Route]:
    """Every piece that `rank` sends to owners, local copies included.

    Args:
        tasks: the plan's matrices.
        owners: for each, its owners.
        bucket: indices of the matrices exchanged together.
        rank: the sender.

    Returns:
        Routes sorted by destination, then by place in the bucket, then by piece: the order in which
        the destination's `gather_receives` lists the same routes.
    """
    found: list[Route] = []
    for index in bucket:
        tiling = tiling_of(tasks[index])
        stored = tiling.pieces_by_rank.get(rank)
        if stored is None:
            continue
        # Several owners means one in each full replica, and each gathers within its own.
        owner = tiling.owner_for(owners[index], rank)
        sent = [piece for piece in stored if tiling.source(piece, owner) == rank]
        found += _gather_routes(tiling, tasks[index].state_dims, index, sent, owner)
    found.sort(key=lambda route: route.destination)  # Stable: keeps bucket and piece order.
    return found


def gather_receives(
    tasks: Sequence[MatrixTask], owners: Owners, bucket: Iterable[int], rank: int
) -> list[Route]:
    """Every piece that `rank` needs as an owner, by source, place in the bucket and piece."""
    found: list[Route] = []
    for index in bucket:
        if rank in owners[index]:
            tiling = tiling_of(tasks[index])
            pieces = range(len(tiling.pieces))
            found += _gather_routes(tiling, tasks[index].state_dims, index, pieces, rank)
    found.sort(key=lambda route: route.source)
    return found


def _gather_routes(
    tiling: MatrixTiling,
    vectors: Sequence[Dims],
    index: int,
    pieces: Iterable[int],
    owner: int,
) -> Iterator[Route]:
    spans = [tiling.spans(dims) for dims in vectors]
    carriers = [tiling.carriers(dims, owner) for dims in vectors]
    for piece in pieces:
        entries = tuple(
            span.sizes[span.of_piece[piece]] if carrier[span.of_piece[piece]] == piece else 0
            for span, carrier in zip(spans, carriers, strict=True)
        )
        numel = tiling.pieces[piece].region.numel
        yield Route(index, piece, tiling.source(piece, owner), owner, numel, entries)


def return_sends(
    tasks: Sequence[MatrixTask], owners: Owners, bucket: Iterable[int], rank: int
) -> list[Route]:
    """Every piece that `rank` returns as an owner, sorted as `gather_sends`."""
    found: list[Route] = []
    for index in bucket:
        if rank not in owners[index]:
            continue
        tiling = tiling_of(tasks[index])
        for destination in tiling.pieces_by_rank:
            if tiling.owner_for(owners[index], destination) == rank:
                found += _return_routes(tiling, tasks[index], index, rank, destination)
    found.sort(key=lambda route: route.destination)
    return found


def return_receives(
    tasks: Sequence[MatrixTask], owners: Owners, bucket: Iterable[int], rank: int
) -> list[Route]:
    """Every piece that comes back to `rank`, sorted as `gather_receives`."""
    found: list[Route] = []
    for index in bucket:
        tiling = tiling_of(tasks[index])
        if rank in tiling.pieces_by_rank:
            owner = tiling.owner_for(owners[index], rank)
            found += _return_routes(tiling, tasks[index], index, owner, rank)
    found.sort(key=lambda route: route.source)
    return found


def _return_routes(
    tiling: MatrixTiling, task: MatrixTask, index: int, owner: int, destination: int
) -> Iterator[Route]:
    spans = [tiling.spans(dims) for dims in task.returned_dims]
    first = [set(tiling.first_pieces(dims, destination).values()) for dims in task.returned_dims]
    for piece in tiling.pieces_by_rank[destination]:
        entries = tuple(
            span.sizes[span.of_piece[piece]] if piece in firsts else 0
            for span, firsts in zip(spans, first, strict=True)
        )
        numel = tiling.pieces[piece].region.numel
        yield Route(index, piece, owner, destination, numel, entries)
