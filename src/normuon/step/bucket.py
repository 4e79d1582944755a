"""What one rank does for one bucket: its pieces, the matrices it owns, and the copies between them.

All of it is laid out when the plan is made, so that a step is a few multi-tensor copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

from normuon.distributed.copies import Block, Copy, CopyPlan, contiguous
from normuon.distributed.exchange import Exchange
from normuon.distributed.layout import Region
from normuon.distributed.plan import Plan
from normuon.distributed.task import Dims, MatrixTask
from normuon.distributed.tiling import Route, tiling_of
from normuon.models.view import MatrixRun
from normuon.step.pieces import PieceBatch, PieceRun
from normuon.step.shared_params import SharedMatrix

PieceId = tuple[int, int]
"""A task, and a piece of its matrix."""


class SharedTasks:
    """The plan's tasks with the parameters that they are of."""

    def __init__(self, plan: Plan, rank: int, matrices: Sequence[SharedMatrix]) -> None:
        self.plan, self.rank = plan, rank
        self.matrices = list(matrices)
        numbers = {matrix.place: number for number, matrix in enumerate(self.matrices)}
        self._param_of = [numbers[task.param] for task in plan.tasks]
        self._runs: list[list[MatrixRun]] = [
            [
                run
                for run in matrix.owner.view.runs(matrix.owner.param.shape)
                for _ in range(run.count)
            ]
            for matrix in self.matrices
        ]

    def param_of(self, task: int) -> SharedMatrix:
        """The parameter that a task is of."""
        return self.matrices[self._param_of[task]]

    def region(self, piece_id: PieceId) -> Region:
        """A piece as a rectangle of its matrix."""
        task, piece = piece_id
        return tiling_of(self.plan.tasks[task]).pieces[piece].region

    def runs_of(self, pieces: Iterable[PieceId]) -> list[PieceRun]:
        """Pieces that this rank stores; those that follow one another in a parameter are one run.

        Args:
            pieces: equal ones, in the order in which they are wanted.
        """
        found: list[PieceRun] = []
        for piece_id in pieces:
            task = piece_id[0]
            planned = self.plan.tasks[task]
            owner, run = self.param_of(task).owner, self._runs[self._param_of[task]][planned.index]
            region = self.region(piece_id)
            slices = planned.layout.local_slices(self.rank, region.shifted(planned.region.offsets))
            piece = PieceRun(
                owner,
                offsets=tuple(s.start for s in slices),
                shape=region.shape,
                dim=run.dim,
                step=run.step,
                count=1,
                first=planned.index,
                origin=region.shifted(planned.region.offsets).offsets,
            )
            if found and planned.index > run.first and found[-1].is_continued_by(piece):
                found[-1] = found[-1].longer()
            else:
                found.append(piece)
        return found


@dataclass(slots=True)
class StoredPieces:
    """Equal pieces of a bucket that this rank stores; those that it sends come first.

    Args:
        batch: the pieces.
        num_sent: how many of them this rank sends to their owners, itself included.
        matrix: the parameter of the first.
        task: of the first.
        vector_sizes: a piece's entries of each vector that comes back; the state's come first.
        first_vector: the place of the first of them among the bucket's vectors of pieces.
    """

    batch: PieceBatch
    num_sent: int
    matrix: SharedMatrix
    task: MatrixTask
    vector_sizes: tuple[int, ...]
    first_vector: int


@dataclass(slots=True)
class OwnedMatrices:
    """Equal matrices of a bucket that this rank orthogonalises.

    Args:
        tasks: which.
        matrices: the parameters that they are of.
        task: the first.
        are_stored_here: whether this rank stores a piece of each.
        vector_sizes: entries of each vector that comes back; the state's come first.
        first_vector: the place of the first of them among the bucket's vectors of matrices.
    """

    tasks: list[int]
    matrices: list[SharedMatrix]
    task: MatrixTask
    are_stored_here: bool
    vector_sizes: tuple[int, ...]
    first_vector: int

    @property
    def matrix(self) -> SharedMatrix:
        """The parameter of the first."""
        return self.matrices[0]


@dataclass(slots=True)
class Transfer:
    """One direction of a bucket as copies: into the message, within this rank, out of the message.

    Each in two: of elements, and of the entries of vectors. Tensors of pieces and of matrices are
    flat and listed by class, vectors as `first_vector` counts; a message's are its only ones.
    """

    into_message: tuple[CopyPlan, CopyPlan]
    within: tuple[CopyPlan, CopyPlan]
    out_of_message: tuple[CopyPlan, CopyPlan]


class Bucket:
    """One bucket on this rank.

    Attributes:
        stored: the pieces, by class.
        owned: the matrices, by class.
        gather, back: the exchanges to owners and from them.
        there: copies on the way to owners, from pieces to matrices.
        home: copies on the way back, from matrices to pieces.
    """

    def __init__(self, tasks: SharedTasks, number: int, gather: Exchange, back: Exchange) -> None:
        self._tasks = tasks
        self.gather, self.back = gather, back
        self._piece_places: dict[PieceId, tuple[int, int]] = {}
        self._matrix_places: dict[int, tuple[int, int]] = {}
        self.stored = list(self._store(number))
        self.owned = list(self._own(number))
        self.there = self._lay_out_there()
        self.home = self._lay_out_home()

    def _store(self, number: int) -> Iterator[StoredPieces]:
        tasks, plan, rank = self._tasks, self._tasks.plan, self._tasks.rank
        sent = [(r.task, r.piece) for r in plan.sends(rank, number, "gather")]
        returned = [(r.task, r.piece) for r in plan.receives(rank, number, "return")]
        are_sent = set(sent)
        classes: dict[object, tuple[list[PieceId], list[PieceId]]] = {}
        for piece_id in (*sent, *returned):
            of_class = classes.setdefault(self._kind(piece_id), ([], []))
            if piece_id in are_sent:
                are_sent.discard(piece_id)
                of_class[0].append(piece_id)
            elif piece_id not in self._piece_places:
                of_class[1].append(piece_id)
            self._piece_places[piece_id] = (-1, -1)
        first_vector = 0
        for place, (sent_pieces, kept_pieces) in enumerate(classes.values()):
            pieces = [*sent_pieces, *kept_pieces]
            self._piece_places.update({piece: (place, k) for k, piece in enumerate(pieces)})
            matrix, task = tasks.param_of(pieces[0][0]), plan.tasks[pieces[0][0]]
            region = tasks.region(pieces[0])
            rows = region.shape[matrix.owner.view.neuron_dim]
            runs = [*tasks.runs_of(sent_pieces), *tasks.runs_of(kept_pieces)]
            sizes = tuple(region.along(dims).numel for dims in task.returned_dims)
            batch = PieceBatch(runs, rows, region.numel // rows)
            yield StoredPieces(batch, len(sent_pieces), matrix, task, sizes, first_vector)
            first_vector += len(sizes)

    def _kind(self, piece_id: PieceId) -> object:
        """Equal for pieces that may share a batch."""
        matrix = self._tasks.param_of(piece_id[0])
        owner, shape = matrix.owner, self._tasks.region(piece_id).shape
        rows = shape[owner.view.neuron_dim]
        batch_key = self._tasks.plan.tasks[piece_id[0]].batch_key
        return (batch_key, rows, prod(shape), owner.momentum_kind)

    def _own(self, number: int) -> Iterator[OwnedMatrices]:
        plan, rank = self._tasks.plan, self._tasks.rank
        classes: dict[object, list[int]] = {}
        for index in plan.buckets[number]:
            if rank in plan.owners[index]:
                classes.setdefault(plan.tasks[index].batch_key, []).append(index)
        first_vector = 0
        for place, indices in enumerate(classes.values()):
            self._matrix_places.update({index: (place, b) for b, index in enumerate(indices)})
            task = plan.tasks[indices[0]]
            sizes = tuple(task.region.along(dims).numel for dims in task.returned_dims)
            matrices = list({id(m): m for m in map(self._tasks.param_of, indices)}.values())
            here = all(rank in tiling_of(plan.tasks[i]).pieces_by_rank for i in indices)
            yield OwnedMatrices(indices, matrices, task, here, sizes, first_vector)
            first_vector += len(sizes)

    # Where things lie in flat tensors.

    def _piece_block(self, route: Route) -> tuple[int, Block]:
        place, k = self._piece_places[route.task, route.piece]
        shape = self._element_shape(route)
        return place, contiguous(k * route.numel, shape)

    def _element_shape(self, route: Route) -> tuple[int, ...]:
        region = self._tasks.region((route.task, route.piece))
        return tuple(region.shape[dim] for dim in self._element_dims(route.task))

    def _element_dims(self, task: int) -> Dims:
        """A matrix's dims in the order in which its elements lie: the neurons, then the inputs."""
        view = self._tasks.param_of(task).owner.view
        inputs = range(view.batch_dims, len(self._tasks.plan.tasks[task].region.shape))
        return (view.neuron_dim, *(dim for dim in inputs if dim != view.neuron_dim))

    def _matrix_block(self, route: Route) -> tuple[int, Block]:
        place, b = self._matrix_places[route.task]
        task = self._tasks.plan.tasks[route.task]
        region = self._tasks.region((route.task, route.piece))
        return place, _part(task, region, self._element_dims(route.task), b)

    def _piece_vector(self, route: Route, vector: int) -> tuple[int, Block]:
        place, k = self._piece_places[route.task, route.piece]
        stored = self.stored[place]
        dims = self._tasks.plan.tasks[route.task].returned_dims[vector]
        span = self._tasks.region((route.task, route.piece)).along(dims)
        return stored.first_vector + vector, contiguous(k * span.numel, span.shape)

    def _matrix_vector(self, route: Route, vector: int) -> tuple[int, Block]:
        place, b = self._matrix_places[route.task]
        task = self._tasks.plan.tasks[route.task]
        region = self._tasks.region((route.task, route.piece))
        block = _part(task, region, task.returned_dims[vector], b)
        return self.owned[place].first_vector + vector, block

    # The copies of both directions.

    def _lay_out_there(self) -> Transfer:
        sent, received = self.gather.sent, self.gather.received
        elements: list[list[Copy]] = [[], [], []]
        entries: list[list[Copy]] = [[], [], []]
        for number, route in enumerate(self.gather.outgoing):
            shape = self._element_shape(route)
            offset = sent.element_offsets[number]
            elements[0].append(Copy(*self._piece_block(route), 0, contiguous(offset, shape)))
            for vector, count in enumerate(route.entries):
                if count:
                    taken = self._piece_vector(route, vector)
                    put = contiguous(sent.entry_offsets[number][vector], taken[1].shape)
                    entries[0].append(Copy(*taken, 0, put))
        for route in self.gather.local:
            elements[1].append(Copy(*self._piece_block(route), *self._matrix_block(route)))
            for vector, count in enumerate(route.entries):
                if count:
                    taken, put_at = (
                        self._piece_vector(route, vector),
                        self._matrix_vector(route, vector),
                    )
                    entries[1].append(Copy(*taken, *put_at))
        for number, route in enumerate(self.gather.incoming):
            shape = self._element_shape(route)
            offset = received.element_offsets[number]
            elements[2].append(Copy(0, contiguous(offset, shape), *self._matrix_block(route)))
            for vector, count in enumerate(route.entries):
                if count:
                    put_at = self._matrix_vector(route, vector)
                    taken_at = contiguous(received.entry_offsets[number][vector], put_at[1].shape)
                    entries[2].append(Copy(0, taken_at, *put_at))
        return _transfer(elements, entries)

    def _lay_out_home(self) -> Transfer:
        sent, received = self.back.sent, self.back.received
        elements: list[list[Copy]] = [[], [], []]
        entries: list[list[Copy]] = [[], [], []]
        for number, route in enumerate(self.back.outgoing):
            shape = self._element_shape(route)
            offset = sent.element_offsets[number]
            elements[0].append(Copy(*self._matrix_block(route), 0, contiguous(offset, shape)))
            for vector, count in enumerate(route.entries):
                if count:
                    taken = self._matrix_vector(route, vector)
                    put = contiguous(sent.entry_offsets[number][vector], taken[1].shape)
                    entries[0].append(Copy(*taken, 0, put))
        for route in self.back.local:
            elements[1].append(Copy(*self._matrix_block(route), *self._piece_block(route)))
            for vector in range(len(route.entries)):
                taken, put_at = (
                    self._matrix_vector(route, vector),
                    self._piece_vector(route, vector),
                )
                entries[1].append(Copy(*taken, *put_at))
        carried: dict[object, int] = {}
        for number, route in enumerate(self.back.incoming):
            shape = self._element_shape(route)
            offset = received.element_offsets[number]
            elements[2].append(Copy(0, contiguous(offset, shape), *self._piece_block(route)))
            tiling = tiling_of(self._tasks.plan.tasks[route.task])
            dims = self._tasks.plan.tasks[route.task].returned_dims
            for vector, count in enumerate(route.entries):
                # The entries came with the first piece that spans them, and serve them all.
                span = tiling.spans(dims[vector]).of_piece[route.piece]
                if count:
                    offset = received.entry_offsets[number][vector]
                    carried[route.task, vector, span] = offset
                put_at = self._piece_vector(route, vector)
                taken_at = contiguous(carried[route.task, vector, span], put_at[1].shape)
                entries[2].append(Copy(0, taken_at, *put_at))
        return _transfer(elements, entries)


def _part(task: MatrixTask, region: Region, dims: Dims, place: int) -> Block:
    """What a region of a matrix spans of a tensor over `dims`, matrix ``place`` of several."""
    sizes = [task.region.shape[dim] for dim in dims]
    strides = contiguous(0, sizes).strides
    offset = sum(region.offsets[dim] * step for dim, step in zip(dims, strides, strict=True))
    shape = tuple(region.shape[dim] for dim in dims)
    return Block(place * prod(sizes) + offset, shape, strides)


def _transfer(elements: Sequence[list[Copy]], entries: Sequence[list[Copy]]) -> Transfer:
    # By tensor, so that copies that continue one another follow one another.
    pairs = [
        (
            CopyPlan(sorted(of_elements, key=lambda copy: (copy.source, copy.target))),
            CopyPlan(sorted(of_entries, key=lambda copy: (copy.source, copy.target))),
        )
        for of_elements, of_entries in zip(elements, entries, strict=True)
    ]
    return Transfer(*pairs)
