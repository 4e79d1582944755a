"""Blocks of 8-bit momentum of which several ranks store parts: their largest magnitudes over all.

Where a parameter is sharded along the dim that blocks follow, every rank keeps the maxima of all
blocks of its lines. They are found before anything moves, in one small all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from normuon.options import MatrixOptions
from normuon.step.coded_momenta import CodedMomenta, coded_momenta
from normuon.step.flags import GradientFlags
from normuon.step.order import coming_maxima
from normuon.step.pieces import PieceBatch, local_tensor
from normuon.step.shared_params import SharedMatrix, SharedParams
from normuon.step.staging import Staging


class SharedMaxima:
    """The maxima of all parameters of one set of ranks that are sharded along their blocks."""

    def __init__(
        self,
        shared: SharedParams,
        batches: Iterable[PieceBatch],
        *,
        rank: int,
        staging: Staging,
    ) -> None:
        """Lays them out.

        Args:
            shared: all parameters.
            batches: all pieces that this rank stores.
            rank: this rank's place in the group.
            staging: to where ranks exchange, with memory that nothing else uses.
        """
        self._shared, self._staging = shared, staging
        self._matrices: list[tuple[int, SharedMatrix]] = []
        for number, matrix in enumerate(shared.matrices):
            owner = matrix.owner
            if "momentum_codes" in owner.state and owner.shares_blocks:
                self._matrices.append((number, matrix))
        self._pieces: list[tuple[PieceBatch, CodedMomenta]] = []
        self._views: dict[int, Tensor] = {}
        if not self._matrices:
            return
        kept = [matrix.owner.state["momentum_absmax"] for _, matrix in self._matrices]
        dtype = reduce(torch.promote_types, {tensor.dtype for tensor in kept})
        ends = [0, *accumulate(tensor.shape.numel() for tensor in kept)]
        self._maxima = torch.zeros(ends[-1], dtype=dtype, device=shared.device)
        for place, (_, matrix) in enumerate(self._matrices):
            part = self._maxima[ends[place] : ends[place + 1]]
            self._views[id(matrix.owner)] = part.view(kept[place].shape)
        for batch in batches:
            coded = coded_momenta(batch)
            if coded is not None and batch.first.shares_blocks:
                self._pieces.append((batch, coded))
                views = [self._views[id(run.owner)] for run in batch.runs]
                coded.share_maxima(views)
        self._rank = rank
        self._matrix_of_block = [
            _stored_lines(_matrix_of_block(matrix), matrix, rank).to(shared.device)
            for _, matrix in self._matrices
        ]

    def agree_(self) -> None:
        """Takes the maximum over all ranks of what blocks will have; nothing has moved yet."""
        if not self._matrices:
            return
        self._maxima.zero_()
        for batch, coded in self._pieces:
            options = MatrixOptions.from_group(batch.first.group)
            coded.note_maxima_(coming_maxima(batch, coded, options=options))
        sent = self._maxima
        size = [(len(sent), sent.dtype)]
        if self._staging.is_needed:
            loan = self._staging.lend("maxima up", size)
            loan.parts[0].copy_(sent)
            sent = loan.up(0)
            loan.give_back()
        dist.all_reduce(sent, op=dist.ReduceOp.MAX, group=self._shared.group)
        if self._staging.is_needed:
            home = self._staging.lend("maxima home", size)
            home.down_(0, sent)
            home.wait()
            self._maxima.copy_(home.parts[0])
            home.give_back()

    def keep_(self, flags: GradientFlags) -> None:
        """Writes them to the state, of what has been stepped."""
        for place, (number, matrix) in enumerate(self._matrices):
            kept = local_tensor(matrix.owner.state["momentum_absmax"])
            if kept.numel():
                whole = self._views[id(matrix.owner)]
                found = _stored_lines(whole, matrix, self._rank).to(kept.dtype)
                moves = flags.steps(number)[self._matrix_of_block[place]]
                kept.copy_(torch.where(moves, found, kept))


def count_shared_roundings_(matrices: Iterable[SharedMatrix], flags: GradientFlags) -> None:
    """Counts, on every rank alike, that the momenta of what is stepped are rounded once more."""
    counts, steps = [], []
    for number, matrix in enumerate(matrices):
        if "momentum_codes" in matrix.owner.state:
            counts.append(local_tensor(matrix.owner.state["momentum_roundings"]))
            steps.append(flags.steps(number).to(torch.int32))
    if counts:
        torch._foreach_add_(counts, steps)


def _stored_lines(of_blocks: Tensor, matrix: SharedMatrix, rank: int) -> Tensor:
    """What a rank keeps of a tensor of a parameter's lines and blocks; dims of size 1 are whole."""
    intervals = matrix.shards.layout.intervals_by_rank[rank]
    for place, dim in enumerate(matrix.owner.grid.line_dims):
        if of_blocks.shape[place] != 1:
            spans = intervals[dim]
            parts = [of_blocks.narrow(place, start, stop - start) for start, stop in spans]
            of_blocks = torch.cat(parts, place) if len(parts) != 1 else parts[0]
    return of_blocks


def _matrix_of_block(matrix: SharedMatrix) -> Tensor:
    """For each block the place of its matrix, of size 1 along dims that do not matter."""
    owner = matrix.owner
    grid, shape = owner.grid, owner.param.shape
    sizes = list(grid.shape)
    sizes[-2 if grid.along_rows else -1] = 1
    found = torch.zeros(sizes, dtype=torch.int64, device="cpu")
    for run in owner.view.runs(shape):
        for index in range(run.count):
            offsets = run.offsets_of(index)
            ends = [start + size for start, size in zip(offsets, run.shape, strict=True)]
            part = [slice(offsets[dim], ends[dim]) for dim in grid.line_dims]
            blocks = slice(0, 1)
            if grid.along_rows:
                start, stop = offsets[owner.view.neuron_dim], ends[owner.view.neuron_dim]
                blocks = slice(grid.blocks[start], grid.blocks[stop - 1] + 1)
                part[-1] = slice(0, 1)
            found[(*part, blocks)] = run.first + index
    return found
