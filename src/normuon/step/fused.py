"""Lines 2 and 7 in one pass over memory each, by Triton kernels, where a device runs them.

`order` says what is computed; this says only how. Results are those of torch's own operations but
for the last bits, since a kernel rounds once where they round several times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from normuon.options import MatrixOptions
from normuon.orthogonalize.fused import FUSED_DTYPES, device_of, runs_fused, why_not_fused
from normuon.step.addresses import Addresses
from normuon.step.normalizer import Factor
from normuon.step.pieces import PieceBatch, local_tensor

TILE = 4096
"""Elements of one program's tile."""

LONGEST_ROW = 1024
"""Columns of a tile where memory goes along the rows."""

SQUARE = 64
"""Rows and columns of a tile where some memory goes along the rows and some along the columns."""


@dataclass(frozen=True, slots=True)
class Passes:
    """A batch whose line 2 is one kernel and whose line 7 is another.

    Args:
        batch: the pieces.
        weights: where they begin in the weights.
        momenta: in the momenta; None where they are in 8 bits, whose line 2 is not this kernel's.
        gradients: in the gradients; None where this rank has none.
        residuals: in what rounding has taken from the weights, where that is kept.
    """

    batch: PieceBatch
    weights: Addresses
    momenta: Addresses | None
    gradients: Addresses | None
    residuals: Addresses | None

    def advance_(
        self, direction_KRC: Tensor | None, *, options: MatrixOptions, moves_K: Tensor | None
    ) -> Tensor | None:
        """Line 2 and what line 3 takes; see `order.advance_`.

        Returns:
            The directions' sums of squares, ``[K]`` in float64; None where there are none.
        """
        from normuon.step import triton_passes

        momenta, batch = self.momenta, self.batch
        assert momenta is not None
        nothing = momenta.table_K  # For arguments that the kernel does not read.
        gradients = self.gradients or replace(momenta, table_K=torch.zeros_like(nothing))
        rows, cols, tiles_along, tiles = _tiles(batch, gradients, momenta)
        count = 0 if direction_KRC is None else len(direction_KRC)
        sums = torch.empty((count, tiles), dtype=torch.float64, device=nothing.device)
        with device_of(nothing):
            triton_passes.advance_kernel[(batch.count * tiles,)](
                gradients.table_K,
                momenta.table_K,
                nothing if direction_KRC is None else direction_KRC,
                sums,
                nothing if moves_K is None else moves_K.view(torch.uint8),
                count,
                tiles,
                tiles_along,
                batch.rows,
                batch.cols,
                gradients.row_stride,
                gradients.col_stride,
                momenta.row_stride,
                momenta.col_stride,
                1.0 - options.momentum,
                float(options.momentum),
                GRADIENT=triton_passes.DTYPES[gradients.dtype],
                MOMENTUM=triton_passes.DTYPES[momenta.dtype],
                HAS_DIRECTIONS=direction_KRC is not None,
                HAS_MOVES=moves_K is not None,
                NESTEROV=options.nesterov,
                MAXIMIZE=options.maximize,
                ALIGNED=gradients.is_aligned and momenta.is_aligned,
                ROWS=rows,
                COLS=cols,
            )
        return None if direction_KRC is None else sums.sum(-1)

    def apply_(
        self,
        o_KRC: Tensor,
        factors: Sequence[Factor],
        *,
        rate: float | Tensor,
        decay: float | Tensor,
        cautious: bool,
        moves_K: Tensor | None,
    ) -> None:
        """Line 7; see `order.apply_`.

        Args:
            o_KRC: contiguous; not written to.
            factors: at most one for rows and one for columns.
            rate: what all of O is multiplied by besides.
            decay: the part of the weights that is taken from them.
            cautious: only where the step moves them towards zero.
            moves_K: booleans: which matrices are stepped; None: all.
        """
        from normuon.step import triton_passes

        batch, weights = self.batch, self.weights
        residuals = self.residuals or weights
        rows, cols, tiles_along, tiles = _tiles(batch, weights, residuals)
        by_dim = {dim: factor_KV.contiguous() for dim, factor_KV in factors}
        assert len(by_dim) == len(factors), "at most one factor for each dim"
        scalars = _on_device(rate, decay, o_KRC.device)
        numbers = (0.0, 0.0, 0.0)
        if scalars is None:
            numbers = (float(rate), float(decay), 1 - float(decay))
        nothing = weights.table_K
        with device_of(o_KRC):
            triton_passes.apply_kernel[(batch.count * tiles,)](
                weights.table_K,
                residuals.table_K,
                o_KRC,
                by_dim.get(-2, nothing),
                by_dim.get(-1, nothing),
                nothing if scalars is None else scalars,
                nothing if moves_K is None else moves_K.view(torch.uint8),
                tiles,
                tiles_along,
                batch.rows,
                batch.cols,
                weights.row_stride,
                weights.col_stride,
                residuals.row_stride,
                residuals.col_stride,
                *numbers,
                WEIGHT=triton_passes.DTYPES[weights.dtype],
                HAS_RESIDUALS=self.residuals is not None,
                HAS_ROW_FACTOR=-2 in by_dim,
                HAS_COL_FACTOR=-1 in by_dim,
                HAS_SCALARS=scalars is not None,
                HAS_MOVES=moves_K is not None,
                CAUTIOUS=cautious,
                ALIGNED=weights.is_aligned and residuals.is_aligned,
                ROWS=rows,
                COLS=cols,
            )


def passes_for(batch: PieceBatch, fused: bool | None) -> Passes | None:
    """The kernels' passes over a batch as its tensors are now, or None where they cannot serve it.

    Args:
        batch: the pieces.
        fused: the group's option; True to raise with the reason if they cannot.

    Raises:
        ValueError: they were asked for and cannot.
    """
    if fused is False:
        return None
    owner = batch.first
    found = _found_passes(batch) if runs_fused(local_tensor(owner.param)) else None
    if found is None and fused:
        device_type = local_tensor(owner.param).device.type
        reason = why_not_fused(device_type) or (
            "its weights, momenta or gradients are float64, traced, or have a memory layout that "
            "matrix strides cannot describe"
        )
        raise ValueError(
            f"{owner.label}: fused=True, but {reason}; fused=None fuses where possible"
        )
    return found


def _found_passes(batch: PieceBatch) -> Passes | None:
    weights, residuals = batch.addresses("weight"), None
    if batch.keeps_residuals:
        residuals = batch.addresses("weight_residual")
    found = [weights, residuals] if batch.keeps_residuals else [weights]
    momenta = gradients = None
    if "momentum_codes" not in batch.first.state:
        momenta, gradients = batch.addresses("momentum_buffer"), batch.addresses("gradient")
        found += [momenta]
        found += [gradients] if any(run.owner.grad is not None for run in batch.runs) else []
    if any(one is None or one.dtype not in FUSED_DTYPES for one in found):
        return None
    assert weights is not None
    return Passes(batch, weights, momenta, gradients, residuals)


def _tiles(batch: PieceBatch, *kinds: Addresses) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, how many lie side by side, and how many a piece has."""
    by_rows = all(kind.col_stride == 1 for kind in kinds)
    cols = min(LONGEST_ROW if by_rows else SQUARE, _power_of_two(batch.cols))
    rows = min(TILE // cols, _power_of_two(batch.rows))
    along = -(-batch.cols // cols)
    return rows, cols, along, along * -(-batch.rows // rows)


def _power_of_two(size: int) -> int:
    """The least that is no smaller."""
    return 1 << (size - 1).bit_length()


def _on_device(rate: float | Tensor, decay: float | Tensor, device: torch.device) -> Tensor | None:
    """Rate, decay and what decay leaves, as one tensor; None where both are numbers."""
    if not isinstance(rate, Tensor) and not isinstance(decay, Tensor):
        return None
    values = []
    for value in (rate, decay):
        if isinstance(value, Tensor) and value.device == device:
            values.append(value.to(torch.float32).reshape(()))
        else:  # A number, or a tensor on the host, which nothing waits for.
            values.append(torch.full((), float(value), dtype=torch.float32, device=device))
    return torch.stack([*values, 1 - values[1]])
