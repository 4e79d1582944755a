"""How a layout cuts one matrix into pieces, and which rank sends each piece to an owner.

Knows nothing of other matrices, FLOPs or buckets. Tilings are kept with their layout, so matrices
of the same shape and placement share one, and nothing here grows with the number of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass

from normuon.distributed.cost import SCALAR_BYTES
from normuon.distributed.region import Piece, ShardLayout
from normuon.distributed.task import MatrixTask


@dataclass(frozen=True, slots=True)
class GatherBytes:
    """What the ranks of one replica would send to an owner that stores nothing itself."""

    by_rank: dict[int, int]
    total: int


@dataclass(frozen=True, slots=True, eq=False)
class MatrixTiling:
    """The pieces of one matrix, by index and by rank.

    A *span* is the set of neurons that a piece covers. Pieces that split columns cover the same
    span, of which v's entries must travel once.
    """

    layout: ShardLayout
    pieces: tuple[Piece, ...]
    span_of_piece: tuple[int, ...]
    neurons_of_span: tuple[int, ...]
    pieces_by_rank: dict[int, tuple[int, ...]]
    numel_by_rank: dict[int, int]
    ranks_by_numel: tuple[int, ...]
    whole_ranks: tuple[int, ...]
    first_piece_of_span: tuple[int, ...]

    def sources(self, replica: int) -> tuple[int, ...]:
        """For each piece, the rank that sends it to an owner in `replica` that does not store it.

        That is the holder in the owner's own replica, so that replicas send once and from nearby;
        the lowest holder when the replica stores no copy.
        """
        return self.layout.remember(("sources", self, replica), lambda: self._sources(replica))

    def _sources(self, replica: int) -> tuple[int, ...]:
        replicas = self.layout.replicas
        return tuple(
            next((rank for rank in piece.ranks if replicas[rank] == replica), piece.ranks[0])
            for piece in self.pieces
        )

    def source(self, piece: int, owner: int) -> int:
        """The rank that sends `piece` to `owner`: the owner itself when it stores the piece."""
        if piece in self.pieces_by_rank.get(owner, ()):
            return owner
        return self.sources(self.layout.replica_of(owner))[piece]

    def carriers(self, owner: int) -> dict[int, int]:
        """For each span, the piece that carries v's entries to `owner`.

        A piece that the owner stores itself, if there is one: then they do not travel at all.
        """
        carrier_of = dict(enumerate(self.first_piece_of_span))
        for piece in reversed(self.pieces_by_rank.get(owner, ())):
            carrier_of[self.span_of_piece[piece]] = piece
        return carrier_of

    def spans_on(self, rank: int) -> dict[int, int]:
        """The spans that `rank` stores, each with the first of its pieces, in piece order."""
        spans: dict[int, int] = {}
        for piece in self.pieces_by_rank.get(rank, ()):
            spans.setdefault(self.span_of_piece[piece], piece)
        return spans

    def gather_bytes(self, replica: int, *, wire_bytes: int, neuron_bytes: int) -> GatherBytes:
        """Bytes by source when the owner is in `replica` and stores nothing itself."""

        def compute() -> GatherBytes:
            by_rank: dict[int, int] = {}
            carriers = set(self.first_piece_of_span)
            for index, source in enumerate(self.sources(replica)):
                num_bytes = self.pieces[index].region.numel * wire_bytes + SCALAR_BYTES
                if index in carriers:
                    num_bytes += self.neurons_of_span[self.span_of_piece[index]] * neuron_bytes
                by_rank[source] = by_rank.get(source, 0) + num_bytes
            return GatherBytes(by_rank, sum(by_rank.values()))

        key = ("gather_bytes", self, replica, wire_bytes, neuron_bytes)
        return self.layout.remember(key, compute)

    def gather_corrections(
        self, owner: int, *, wire_bytes: int, neuron_bytes: int
    ) -> dict[int, int]:
        """What to add to `gather_bytes(...).by_rank` because `owner` stores some pieces itself."""
        replica = self.layout.replica_of(owner)
        sources = self.sources(replica)
        corrections: dict[int, int] = {}
        spans: set[int] = set()
        for piece in self.pieces_by_rank.get(owner, ()):
            source, span = sources[piece], self.span_of_piece[piece]
            saved = self.pieces[piece].region.numel * wire_bytes + SCALAR_BYTES
            corrections[source] = corrections.get(source, 0) - saved
            if span not in spans:
                spans.add(span)
                carrier = sources[self.first_piece_of_span[span]]
                saved = self.neurons_of_span[span] * neuron_bytes
                corrections[carrier] = corrections.get(carrier, 0) - saved
        return corrections

    def return_bytes(self, *, wire_bytes: int, neuron_bytes: int) -> GatherBytes:
        """Bytes that each storing rank receives: its region of O, its rows of v and one scale."""

        def compute() -> GatherBytes:
            by_rank = {
                rank: numel * wire_bytes
                + sum(self.neurons_of_span[span] for span in self.spans_on(rank)) * neuron_bytes
                + SCALAR_BYTES
                for rank, numel in self.numel_by_rank.items()
            }
            return GatherBytes(by_rank, sum(by_rank.values()))

        key = ("return_bytes", self, wire_bytes, neuron_bytes)
        return self.layout.remember(key, compute)


def tiling_of(task: MatrixTask) -> MatrixTiling:
    """The tiling of a task's matrix; the same object for equal regions of the same layout.

    Raises:
        ValueError: the layout does not store every element exactly once, or pieces cover
            overlapping but different sets of neurons, which no mesh of shards does.
    """
    key = ("tiling", task.region, task.neuron_dims)
    return task.layout.remember(key, lambda: _make_tiling(task))


def _make_tiling(task: MatrixTask) -> MatrixTiling:
    layout = task.layout
    layout.validate(task.name)
    pieces = layout.pieces(task.region)
    span_ids: dict[object, int] = {}
    neurons: list[int] = []
    first_piece: list[int] = []
    span_of_piece: list[int] = []
    by_rank: dict[int, list[int]] = {}
    numel_by_rank: dict[int, int] = {}
    for index, piece in enumerate(pieces):
        span = piece.region.along(task.neuron_dims)
        if span not in span_ids:
            span_ids[span] = len(span_ids)
            neurons.append(span.numel if task.neuron_dims else 0)
            first_piece.append(index)
        span_of_piece.append(span_ids[span])
        for rank in piece.ranks:
            by_rank.setdefault(rank, []).append(index)
            numel_by_rank[rank] = numel_by_rank.get(rank, 0) + piece.region.numel
    if sum(neurons) != task.num_neurons:
        raise ValueError(
            f"{task.label} {list(layout.global_shape)}: the stored regions cover overlapping but "
            f"different neurons along dims {task.neuron_dims}; pass a layout that cuts these dims "
            f"at the same places on every rank"
        )
    return MatrixTiling(
        layout=layout,
        pieces=pieces,
        span_of_piece=tuple(span_of_piece),
        neurons_of_span=tuple(neurons),
        pieces_by_rank={rank: tuple(by_rank[rank]) for rank in sorted(by_rank)},
        numel_by_rank={rank: numel_by_rank[rank] for rank in sorted(by_rank)},
        ranks_by_numel=tuple(sorted(by_rank, key=lambda rank: (-numel_by_rank[rank], rank))),
        whole_ranks=tuple(r for r in sorted(by_rank) if numel_by_rank[r] == task.numel),
        first_piece_of_span=tuple(first_piece),
    )
