"""The momenta of a batch of pieces that are kept as 8-bit codes: taken out, and put back.

Shapes: K pieces of R rows and C columns; as lines and blocks, A lines of N blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from normuon.models.blocks import blocks_of_region
from normuon.step.int8 import Blocks, decode_, encode_in_chunks_, salts
from normuon.step.pieces import PieceBatch, PieceRun, local_tensor


@dataclass(slots=True)
class Momenta:
    """What a step holds of a batch's momenta.

    Args:
        codes_KRC: as they were kept.
        absmax_KAN: the largest magnitudes of their blocks.
        values_KRC: in at least float32; to be advanced.
    """

    codes_KRC: Tensor
    absmax_KAN: Tensor
    values_KRC: Tensor


class CodedMomenta:
    """Where the codes and blocks of a batch lie."""

    def __init__(self, batch: PieceBatch) -> None:
        """Lays them out.

        Args:
            batch: of a group whose momentum is in int8.
        """
        self._batch = batch
        first = batch.first
        self._is_shared = first.shares_blocks
        self._along_rows = first.grid.along_rows
        self._lines, length = (
            (batch.cols, batch.rows) if self._along_rows else (batch.rows, batch.cols)
        )
        if self._is_shared:
            of_pieces = [_blocks(run, piece) for run in batch.runs for piece in range(run.count)]
            num_blocks = first.grid.num_blocks
            self._blocks = Blocks(of_pieces, num_blocks=num_blocks)
            self._spans = [(0, num_blocks)] * len(batch.runs)
        else:
            # A piece has all of its matrix's blocks, which begin with the matrix.
            self._blocks = Blocks.regular(length)
            self._spans = [(_blocks(run, 0)[0], self._blocks.num_blocks) for run in batch.runs]
        self._shared_maxima: list[Tensor] | None = None

    def take(self) -> Momenta:
        """The momenta of all pieces."""
        batch = self._batch
        codes_KRC = _empty(batch, torch.int8)
        torch._foreach_copy_(batch.views(codes_KRC), self._codes())
        kept = self._maxima_of_state()
        absmax_KAN = self._load_maxima(kept)
        values_KRC = _empty(batch, absmax_KAN.dtype)
        decode_(
            self._in_lines(values_KRC), self._in_lines(codes_KRC), absmax_KAN, blocks=self._blocks
        )
        return Momenta(codes_KRC, absmax_KAN, values_KRC)

    def maxima(self, momenta: Momenta) -> Tensor:
        """``[K, A, N]``: the largest magnitudes of the values."""
        return self._blocks.absmax(self._in_lines(momenta.values_KRC))

    def keep_(self, momenta: Momenta, moves_K: Tensor | None) -> None:
        """Rounds the values and writes them to the state.

        Args:
            momenta: what `take` gave, advanced.
            moves_K: booleans: the codes of other pieces stay as they are, bit by bit. None: all.
        """
        batch = self._batch
        if self._shared_maxima is None:
            absmax_KAN = self.maxima(momenta)
        else:
            absmax_KAN = self._load_maxima(self._shared_maxima)
        codes_KRC = momenta.codes_KRC if moves_K is None else torch.empty_like(momenta.codes_KRC)
        encode_in_chunks_(
            self._in_lines(codes_KRC),
            self._in_lines(momenta.values_KRC),
            absmax_KAN,
            blocks=self._blocks,
            salt_K=salts(self._roundings()),
        )
        if moves_K is not None:
            moves_K11 = moves_K[:, None, None]
            codes_KRC = torch.where(moves_K11, codes_KRC, momenta.codes_KRC)
            absmax_KAN = torch.where(moves_K11, absmax_KAN, momenta.absmax_KAN)
        torch._foreach_copy_(self._codes(), batch.views(codes_KRC))
        if self._shared_maxima is None:
            kept = self._maxima_of_state()
            torch._foreach_copy_(kept, self._by_run(absmax_KAN, kept))

    def share_maxima(self, of_parameters: Sequence[Tensor]) -> None:
        """From now on, takes the maxima of blocks from there when momenta are kept.

        Args:
            of_parameters: for each run those of its whole parameter, ``[*lines, N]``.
        """
        pairs = zip(self._batch.runs, of_parameters, strict=True)
        self._shared_maxima = [_at_lines(run, maxima, run.origin) for run, maxima in pairs]

    def note_maxima_(self, maxima_KAN: Tensor) -> None:
        """Raises those that are shared to what this rank's pieces have."""
        assert self._shared_maxima is not None
        parts = torch.split(maxima_KAN, self._batch.counts)
        for run, part, shared in zip(self._batch.runs, parts, self._shared_maxima, strict=True):
            if _follow_along_blocks(run):
                part, shared = part.amax(0), shared[0]
            torch.maximum(shared, part.view(shared.shape), out=shared)

    def _in_lines(self, x_KRC: Tensor) -> Tensor:
        return x_KRC.mT if self._along_rows else x_KRC

    def _codes(self) -> list[Tensor]:
        return [run.of(local_tensor(run.owner.state["momentum_codes"])) for run in self._batch.runs]

    def _roundings(self) -> Tensor:
        counts = [
            local_tensor(run.owner.state["momentum_roundings"]).narrow(0, run.first, run.count)
            for run in self._batch.runs
        ]
        return torch.cat(counts)

    def _maxima_of_state(self) -> list[Tensor]:
        """Views of the state, each ``[*lines, N]``, or ``[count, *lines, N]``."""
        found = []
        for run, (start, length) in zip(self._batch.runs, self._spans, strict=True):
            kept = local_tensor(run.owner.state["momentum_absmax"])
            if self._is_shared:
                found.append(_at_lines(run, kept, run.offsets))
            elif _follow_along_blocks(run):
                # Matrices that follow one another along the dim that blocks follow have their own.
                blocks = _lines_of(run, kept, run.offsets).narrow(-1, start, length * run.count)
                found.append(blocks.view(*blocks.shape[:-1], run.count, length).movedim(-2, 0))
            else:
                found.append(_lines_of(run, kept, run.offsets).narrow(-1, start, length))
        return found

    def _load_maxima(self, views: Sequence[Tensor]) -> Tensor:
        batch = self._batch
        shape = (batch.count, self._lines, self._blocks.num_blocks)
        absmax_KAN = torch.empty(shape, dtype=views[0].dtype, device=views[0].device)
        torch._foreach_copy_(self._by_run(absmax_KAN, views), list(views))
        return absmax_KAN

    def _by_run(self, absmax_KAN: Tensor, views: Sequence[Tensor]) -> list[Tensor]:
        parts = torch.split(absmax_KAN, self._batch.counts)
        return [part.view(view.shape) for part, view in zip(parts, views, strict=True)]


def coded_momenta(batch: PieceBatch) -> CodedMomenta | None:
    """Those of a batch; None where momenta are kept as numbers."""
    if "momentum_codes" not in batch.first.state:
        return None
    if batch.coded is None:
        batch.coded = CodedMomenta(batch)
    assert isinstance(batch.coded, CodedMomenta)
    return batch.coded


def count_roundings_(batch: PieceBatch, moves_K: Tensor | None) -> None:
    """Counts that whole matrices' momenta are rounded once more; see `coded_momenta`.

    Args:
        batch: whole matrices.
        moves_K: booleans: which are; None: all.
    """
    if coded_momenta(batch) is None:
        return
    counts = [
        run.owner.state["momentum_roundings"].narrow(0, run.first, run.count) for run in batch.runs
    ]
    if moves_K is None:
        torch._foreach_add_(counts, 1)
    else:
        torch._foreach_add_(counts, list(torch.split(moves_K.to(torch.int32), batch.counts)))


def _empty(batch: PieceBatch, dtype: torch.dtype) -> Tensor:
    device = batch.first.param.device
    return torch.empty((batch.count, batch.rows, batch.cols), dtype=dtype, device=device)


def _blocks(run: PieceRun, piece: int) -> tuple[int, ...]:
    """For each element of a line of a piece, its block."""
    owner = run.owner
    return blocks_of_region(owner.grid, owner.param.shape, run.origin_of(piece), run.shape)


def _follow_along_blocks(run: PieceRun) -> bool:
    """Whether pieces follow one another along the dim that blocks follow."""
    return run.count > 1 and run.dim not in run.owner.grid.line_dims


def _lines_of(run: PieceRun, maxima: Tensor, offsets: Sequence[int]) -> Tensor:
    """The lines that a run's pieces have, where the first begins at ``offsets``."""
    extent = run.extent
    dims = run.owner.grid.line_dims
    return maxima[tuple(slice(offsets[dim], offsets[dim] + extent[dim]) for dim in dims)]


def _at_lines(run: PieceRun, maxima: Tensor, offsets: Sequence[int]) -> Tensor:
    """All blocks of the lines that each piece of a run has."""
    lines = _lines_of(run, maxima, offsets)
    return lines.expand(run.count, *lines.shape) if _follow_along_blocks(run) else lines
