"""How a layout cuts one matrix into pieces, and which piece of it goes from whom to whom.

Matrices of one shape that a layout cuts alike share one tiling, so that nothing here grows with the
number of matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod
from typing import NamedTuple

from normuon.distributed.layout import Region, ShardLayout, ranks_in
from normuon.distributed.task import Dims, MatrixTask


class Piece(NamedTuple):
    """A rectangle of a matrix, counted from its corner, and the ranks that hold a copy of it."""

    region: Region
    ranks: tuple[int, ...]
    mask: int


class Spans(NamedTuple):
    """What of a vector the pieces of a matrix cover.

    Pieces that differ in other dims only cover the same span, whose entries must travel once.

    Args:
        of_piece: for each piece, its span.
        sizes: entries of each span.
        first_piece: of each span.
    """

    of_piece: tuple[int, ...]
    sizes: tuple[int, ...]
    first_piece: tuple[int, ...]


class PeerBytes(NamedTuple):
    """Bytes by rank, their sum, and the largest of them."""

    by_rank: dict[int, int]
    total: int
    largest: int


@dataclass(frozen=True, eq=False)
class MatrixTiling:
    """The pieces of one matrix, by index and by rank."""

    layout: ShardLayout
    numel: int
    pieces: tuple[Piece, ...]

    @cached_property
    def pieces_by_rank(self) -> dict[int, tuple[int, ...]]:
        """For each rank that stores some of the matrix, its pieces; ranks ascend."""
        found: dict[int, list[int]] = {}
        for index, piece in enumerate(self.pieces):
            for rank in piece.ranks:
                found.setdefault(rank, []).append(index)
        return {rank: tuple(found[rank]) for rank in sorted(found)}

    @cached_property
    def numel_by_rank(self) -> dict[int, int]:
        """How many elements of the matrix each rank stores; ranks that store none are absent."""
        return {
            rank: sum(self.pieces[index].region.numel for index in indices)
            for rank, indices in self.pieces_by_rank.items()
        }

    @cached_property
    def ranks_by_numel(self) -> tuple[int, ...]:
        """The storing ranks, those that store most first."""
        numel = self.numel_by_rank
        return tuple(sorted(numel, key=lambda rank: (-numel[rank], rank)))

    @cached_property
    def whole_ranks(self) -> tuple[int, ...]:
        """The ranks that store all of the matrix."""
        return tuple(r for r, numel in self.numel_by_rank.items() if numel == self.numel)

    @property
    def is_stored_whole(self) -> bool:
        """Whether every rank that stores some of the matrix stores all of it."""
        return len(self.whole_ranks) == len(self.pieces_by_rank)

    def owner_for(self, owners: tuple[int, ...], rank: int) -> int:
        """The owner that serves `rank`: the only one, or the one of the rank's replica.

        Args:
            owners: one rank, or one rank per full replica in ascending replica order.
            rank: any rank of the group.
        """
        if len(owners) == 1:
            return owners[0]
        replicas = self.layout.full_replicas
        replica = self.layout.replicas[rank]
        return owners[replicas.index(replica)] if replica in replicas else owners[0]

    def needs_no_message(self, owners: tuple[int, ...]) -> bool:
        """Whether every rank that stores the matrix stores it whole and computes it itself."""
        return self.is_stored_whole and set(owners) == set(self.whole_ranks)

    def sources(self, replica: int) -> tuple[int, ...]:
        """For each piece, the rank that sends it to an owner in `replica` that does not store it.

        That is the holder in the owner's own replica, so that replicas send once and from nearby;
        the lowest holder when the replica stores no copy.
        """

        def compute() -> tuple[int, ...]:
            inside = self.layout.replica_masks[replica]
            return tuple(ranks_in(piece.mask & inside or piece.mask)[0] for piece in self.pieces)

        return self.layout.remember(("sources", self, replica), compute)

    def source(self, piece: int, owner: int) -> int:
        """The rank that sends `piece` to `owner`: the owner itself when it stores the piece."""
        if self.pieces[piece].mask >> owner & 1:
            return owner
        return self.sources(self.layout.replicas[owner])[piece]

    def spans(self, dims: Dims) -> Spans:
        """The spans of a vector that lies along `dims`."""

        def compute() -> Spans:
            ids: dict[Region, int] = {}
            first, of_piece = [], []
            for index, piece in enumerate(self.pieces):
                span = piece.region.along(dims)
                if span not in ids:
                    ids[span] = len(ids)
                    first.append(index)
                of_piece.append(ids[span])
            return Spans(tuple(of_piece), tuple(span.numel for span in ids), tuple(first))

        return self.layout.remember(("spans", self, dims), compute)

    def carriers(self, dims: Dims, owner: int) -> dict[int, int]:
        """For each span of a vector, the piece that carries its entries to `owner`.

        A piece that the owner stores itself, if there is one: then they do not travel at all.
        """
        spans = self.spans(dims)
        found = dict(enumerate(spans.first_piece))
        for piece in reversed(self.pieces_by_rank.get(owner, ())):
            found[spans.of_piece[piece]] = piece
        return found

    def first_pieces(self, dims: Dims, rank: int) -> dict[int, int]:
        """The spans that `rank` stores, each with the first of its pieces, in piece order."""
        spans = self.spans(dims)
        found: dict[int, int] = {}
        for piece in self.pieces_by_rank.get(rank, ()):
            found.setdefault(spans.of_piece[piece], piece)
        return found

    def gather_bytes(self, task: MatrixTask, replica: int) -> PeerBytes:
        """Bytes by source when the owner is in `replica` and stores nothing itself."""

        def compute() -> PeerBytes:
            by_rank: dict[int, int] = {}
            sources = self.sources(replica)
            for piece, source in zip(self.pieces, sources, strict=True):
                by_rank[source] = by_rank.get(source, 0) + piece.region.numel * task.wire_bytes
            for dims in task.state_dims:
                spans = self.spans(dims)
                for size, piece_index in zip(spans.sizes, spans.first_piece, strict=True):
                    by_rank[sources[piece_index]] += size * task.side_bytes
            return PeerBytes(by_rank, sum(by_rank.values()), max(by_rank.values()))

        key = ("gather", self, replica, task.state_dims, task.wire_bytes, task.side_bytes)
        return self.layout.remember(key, compute)

    def gather_corrections(self, task: MatrixTask, owner: int) -> dict[int, int]:
        """What to add to `gather_bytes(...).by_rank` because `owner` stores some pieces itself."""
        sources = self.sources(self.layout.replicas[owner])
        found: dict[int, int] = {}
        for index in self.pieces_by_rank.get(owner, ()):
            saved = self.pieces[index].region.numel * task.wire_bytes
            found[sources[index]] = found.get(sources[index], 0) - saved
        for dims in task.state_dims:
            spans = self.spans(dims)
            for span in self.first_pieces(dims, owner):
                carrier = sources[spans.first_piece[span]]
                saved = spans.sizes[span] * task.side_bytes
                found[carrier] = found.get(carrier, 0) - saved
        return found

    def return_bytes(self, task: MatrixTask) -> PeerBytes:
        """Bytes that each storing rank receives: its region of O, and its part of each vector."""

        def compute() -> PeerBytes:
            by_rank = {rank: n * task.wire_bytes for rank, n in self.numel_by_rank.items()}
            for dims in task.returned_dims:
                sizes = self.spans(dims).sizes
                for rank in by_rank:
                    entries = sum(sizes[span] for span in self.first_pieces(dims, rank))
                    by_rank[rank] += entries * task.side_bytes
            return PeerBytes(by_rank, sum(by_rank.values()), max(by_rank.values()))

        key = ("return", self, task.returned_dims, task.wire_bytes, task.side_bytes)
        return self.layout.remember(key, compute)


def tiling_of(task: MatrixTask) -> MatrixTiling:
    """The tiling of a task's matrix; the same object for matrices that a layout cuts alike."""
    layout, region = task.layout, task.region

    def find() -> MatrixTiling:
        cuts = tuple(
            layout.segments(dim, offset, offset + size)
            for dim, (offset, size) in enumerate(zip(*region, strict=True))
        )
        return layout.remember(("cuts", cuts), lambda: _make_tiling(layout, region, cuts))

    return layout.remember(("tiling", region), find)


def _make_tiling(layout: ShardLayout, region: Region, cuts: tuple) -> MatrixTiling:  # type: ignore[type-arg]
    pieces = []
    for box in product(*cuts):
        mask = -1
        for segment in box:
            mask &= segment.ranks
        offsets = tuple(segment.start for segment in box)
        shape = tuple(segment.stop - segment.start for segment in box)
        assert mask > 0, "a mesh of shards stores every element"
        pieces.append(Piece(Region(offsets, shape), ranks_in(mask), mask))
    return MatrixTiling(layout, prod(region.shape), tuple(pieces))


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
