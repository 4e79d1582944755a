"""Who sends what to whom for one bucket: routes to owners, and back.

Computes routes on demand for one rank, in an order on which both ends agree, so that nothing is
ever stored per (matrix, rank). Who owns what is `plan`'s decision, moving bytes `exchange`'s work.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from normuon.distributed.region import Region
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import MatrixTiling, tiling_of

Direction: TypeAlias = Literal["gather", "return"]
Stream: TypeAlias = Literal["elements", "neurons", "scalars"]


@dataclass(frozen=True, slots=True)
class Route:
    """One piece of one matrix, from one rank to another, in one direction.

    Args:
        task: index of the matrix in the plan's tasks.
        piece: index of the piece in the matrix's tiling.
        region: the piece, in the parameter's global coordinates.
        source: rank that sends.
        destination: rank that receives.
        num_neurons: entries of v that ride along: those of `region` along the neuron dims, or 0
            when another piece carries them.
        num_scalars: 1 when a scalar rides along: each gathered piece brings its has-gradient flag;
            each rank gets a matrix's step scale with the first piece returned to it.
    """

    task: int
    piece: int
    region: Region
    source: int
    destination: int
    num_neurons: int
    num_scalars: int

    @property
    def num_elements(self) -> int:
        """Matrix entries that travel."""
        return self.region.numel

    @property
    def is_local(self) -> bool:
        """Whether source and destination are one rank: a copy, not a message."""
        return self.source == self.destination

    def count(self, stream: Stream) -> int:
        """How many entries the route adds to one stream of its message."""
        if stream == "elements":
            return self.num_elements
        return self.num_neurons if stream == "neurons" else self.num_scalars


def owner_for(tiling: MatrixTiling, owners: Sequence[int], rank: int) -> int:
    """The owner that serves `rank`: the only one, or the one of the rank's replica.

    Args:
        tiling: of the matrix.
        owners: one rank, or one rank per full replica in ascending replica order.
        rank: any rank of the group.
    """
    if len(owners) == 1:
        return owners[0]
    position = tiling.layout.remember(
        "replica_positions",
        lambda: {replica: i for i, replica in enumerate(tiling.layout.full_replicas)},
    )
    return owners[position.get(tiling.layout.replica_of(rank), 0)]


def gather_sends(
    tasks: Sequence[MatrixTask], owners: Sequence[Sequence[int]], bucket: Sequence[int], rank: int
) -> list[Route]:
    """Every piece that `rank` sends to owners, local copies included.

    Args:
        tasks: the plan's matrices.
        owners: for each, its owners.
        bucket: indices of the matrices exchanged together.
        rank: the sender.

    Returns:
        Routes sorted by destination, then by place in the bucket, then by piece.
    """
    routes: list[Route] = []
    for index in bucket:
        tiling = tiling_of(tasks[index])
        stored = tiling.pieces_by_rank.get(rank, ())
        if not stored:
            continue
        # Several owners means one in each full replica, and each gathers within its own.
        owner = owner_for(tiling, owners[index], rank)
        carriers = tiling.carriers(owner)
        for piece in stored:
            if tiling.source(piece, owner) == rank:
                routes.append(_gather_route(tiling, carriers, index, piece, rank, owner))
    routes.sort(key=lambda route: route.destination)  # Stable: keeps bucket and piece order.
    return routes


def gather_receives(
    tasks: Sequence[MatrixTask], owners: Sequence[Sequence[int]], bucket: Sequence[int], rank: int
) -> list[Route]:
    """Every piece that `rank` needs as an owner, by source, place in the bucket and piece."""
    routes: list[Route] = []
    for index in bucket:
        if rank not in owners[index]:
            continue
        tiling = tiling_of(tasks[index])
        carriers = tiling.carriers(rank)
        for piece in range(len(tiling.pieces)):
            source = tiling.source(piece, rank)
            routes.append(_gather_route(tiling, carriers, index, piece, source, rank))
    routes.sort(key=lambda route: route.source)
    return routes


def _gather_route(
    tiling: MatrixTiling, carriers: dict[int, int], index: int, piece: int, source: int, owner: int
) -> Route:
    span = tiling.span_of_piece[piece]
    num_neurons = tiling.neurons_of_span[span] if carriers[span] == piece else 0
    return Route(index, piece, tiling.pieces[piece].region, source, owner, num_neurons, 1)


def return_sends(
    tasks: Sequence[MatrixTask], owners: Sequence[Sequence[int]], bucket: Sequence[int], rank: int
) -> list[Route]:
    """Every piece that `rank` returns as an owner, sorted as `gather_sends`."""
    routes: list[Route] = []
    for index in bucket:
        if rank not in owners[index]:
            continue
        tiling = tiling_of(tasks[index])
        for destination in tiling.pieces_by_rank:
            if owner_for(tiling, owners[index], destination) == rank:
                routes.extend(_return_routes(tiling, index, rank, destination))
    routes.sort(key=lambda route: route.destination)
    return routes


def return_receives(
    tasks: Sequence[MatrixTask], owners: Sequence[Sequence[int]], bucket: Sequence[int], rank: int
) -> list[Route]:
    """Every piece that comes back to `rank`, sorted as `gather_receives`."""
    routes: list[Route] = []
    for index in bucket:
        tiling = tiling_of(tasks[index])
        if rank in tiling.pieces_by_rank:
            owner = owner_for(tiling, owners[index], rank)
            routes.extend(_return_routes(tiling, index, owner, rank))
    routes.sort(key=lambda route: route.source)
    return routes


def _return_routes(
    tiling: MatrixTiling, index: int, owner: int, destination: int
) -> Iterator[Route]:
    first_pieces = set(tiling.spans_on(destination).values())
    for position, piece in enumerate(tiling.pieces_by_rank[destination]):
        span = tiling.span_of_piece[piece]
        num_neurons = tiling.neurons_of_span[span] if piece in first_pieces else 0
        region = tiling.pieces[piece].region
        yield Route(index, piece, region, owner, destination, num_neurons, int(position == 0))
