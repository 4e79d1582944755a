"""What a measured step notes of its matrices: numbers that add up over pieces, ranks and matrices.

Shapes: a table of R rows, one for each matrix or `adamw` parameter, and F columns, `COLUMNS`; B
whole matrices of M rows and N columns; K pieces of matrices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from normuon.orthogonalize import sums_dtype
from normuon.step.normalizer import Factor
from normuon.step.pieces import PieceBatch, State, local_tensor

COLUMNS = (
    *("moved", "elements", "weight_squares", "update_squares", "momentum_squares"),
    *("effective_rank", "effective_rank_share", "momentum_row_spread", "update_row_spread"),
    *("dead_rows", "skipped_steps"),
)
"""``moved`` is 1 for a matrix that the step moved, and 0 for one that it left alone, whose other
columns but the last are 0 too."""

COLUMN = {name: number for number, name in enumerate(COLUMNS)}

DEAD = torch.finfo(torch.float32).eps
"""A row is dead if its norm is at most this much of the longest row's: beside that it is rounding.

As `torch.linalg.matrix_rank` cuts singular values. A neuron that gets no gradient any more is there
within 311 steps of b1 = 0.95.
"""


@dataclass(slots=True)
class Rows:
    """Some rows of a table, one for each matrix or piece of a batch.

    Args:
        table: ``[R + 1, F]``; its last row takes what counts elsewhere already, such as copies.
        index: ``[K]``.
    """

    table: Tensor
    index: Tensor

    def narrow(self, start: int, length: int) -> Rows:
        """Some of them."""
        return Rows(self.table, self.index.narrow(0, start, length))

    def add_(self, figures_KF: Tensor) -> None:
        """Adds the figures of whole matrices."""
        self.table.index_add_(0, self.index, figures_KF.to(self.table.dtype))

    def add_weights_(self, batch: PieceBatch) -> None:
        """Adds the sums of squares of the weights of a batch of pieces, as they are now."""
        squares_K = piece_squares(batch, self.table.dtype)
        self.table.select(1, COLUMN["weight_squares"]).index_add_(0, self.index, squares_K)


RowsOf = Callable[[PieceBatch], Rows | None]
"""For a batch, the rows of its matrices; None where nothing is measured."""


def nowhere(batch: PieceBatch) -> None:
    """The rows of a batch at a step that is not measured."""


def empty_table(num_rows: int, device: torch.device) -> Tensor:
    """A table of zeros, and a last row that nobody reads."""
    return torch.zeros(num_rows + 1, len(COLUMNS), dtype=sums_dtype(device), device=device)


def index_of(rows: Sequence[int], device: torch.device) -> Tensor:
    """Row numbers as a tensor that is made on its device: nothing is copied there.

    Example:
        >>> index_of([4, 5, 6, 2], torch.device("cpu"))
        tensor([4, 5, 6, 2])
    """
    cuts = [n for n in range(1, len(rows)) if rows[n] != rows[n - 1] + 1]
    ranges = [
        torch.arange(rows[start], rows[stop - 1] + 1, device=device)
        for start, stop in pairwise([0, *cuts, len(rows)])
    ]
    return torch.cat(ranges)


def piece_squares(batch: PieceBatch, dtype: torch.dtype) -> Tensor:
    """``[K]``: the sum of squares of the weights of each piece."""
    pieces: list[Tensor] = []
    for run in batch.runs:
        of_run = run.of(local_tensor(run.owner.param))
        if run.count == 1:
            pieces.append(of_run)
        else:
            sizes = list(of_run.shape)
            sizes[run.dim : run.dim + 1] = [run.count, sizes[run.dim] // run.count]
            pieces += of_run.view(sizes).unbind(run.dim)
    return square_sums(pieces, dtype)


def square_sums(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The sum of squares of each of some tensors, in a dtype; of none, nothing.

    On a CPU, where float64 takes seven times as long, rows are summed in float32 and their sums in
    ``dtype``: to 1e-7 or better, and squares below 1e-38 vanish.
    """
    if tensors[0].device.type != "cpu":
        return torch.stack(list(torch._foreach_norm(list(tensors), 2, dtype=dtype))).square()
    sums = []
    for tensor in tensors:
        rows = tensor.flatten(1) if tensor.ndim > 2 and tensor.is_contiguous() else tensor
        wide = torch.promote_types(rows.dtype, torch.float32)
        dim = -1 if rows.ndim else None
        norms = torch.linalg.vector_norm(rows, dim=dim, dtype=wide)
        sums.append(norms.to(dtype).square().sum())
    return torch.stack(sums)


def row_norms(x_BMN: Tensor) -> Tensor:
    """``[B, M]``: the norm of every row, in `sums_dtype`: no square under- or overflows there."""
    norm_BM: Tensor = torch.linalg.vector_norm(x_BMN, dim=-1, dtype=sums_dtype(x_BMN.device))
    return norm_BM


def update_row_norms(o_BMN: Tensor, factors: Sequence[Factor], rate: float | Tensor) -> Tensor:
    """``[B, M]``: the norms of the rows of ``rate O``, rows and columns of O times their factors.

    Args:
        o_BMN: whole orthogonalised directions.
        factors: from `Normalizer.factors`.
        rate: the learning rate times `Normalizer.constant`.
    """
    by_dim = dict(factors)
    wide = torch.promote_types(o_BMN.dtype, torch.float32)
    if -1 in by_dim:
        # One matrix at a time: the product takes as much memory as O.
        wide = torch.promote_types(wide, by_dim[-1].dtype)
        scaled = zip(o_BMN, by_dim[-1], strict=True)
        norms = [torch.linalg.vector_norm(o_MN * f_N, dim=-1, dtype=wide) for o_MN, f_N in scaled]
        norm_BM = torch.stack(norms)
    else:
        norm_BM = torch.linalg.vector_norm(o_BMN, dim=-1, dtype=wide)
    norm_BM = norm_BM.to(sums_dtype(o_BMN.device))
    if -2 in by_dim:
        norm_BM = norm_BM * by_dim[-2]
    return norm_BM * rate


def spread(norms: Tensor) -> Tensor:
    """Standard deviation over mean along the last dim, 0 where all are 0.

    Example:
        >>> spread(torch.tensor([[1.0, 3.0], [0.0, 0.0]]))
        tensor([0.5000, 0.0000])
    """
    mean = norms.mean(-1)
    return (norms.std(-1, correction=0) / mean).masked_fill(mean == 0, 0.0)


def whole_figures(
    momentum_norm_BM: Tensor,
    update_norm_BM: Tensor,
    effective_rank_B: Tensor,
    *,
    num_columns: int,
    moves_B: Tensor | None,
) -> Tensor:
    """``[B, F]``: what whole matrices say, the weights apart.

    Args:
        momentum_norm_BM: of the rows of what line 3 takes, from `row_norms`.
        update_norm_BM: from `update_row_norms`.
        effective_rank_B: of what was orthogonalised.
        num_columns: N.
        moves_B: booleans: which matrices are stepped. None: all.
    """
    num_rows = momentum_norm_BM.shape[-1]
    elements, short = num_rows * num_columns, min(num_rows, num_columns)
    longest_B1 = momentum_norm_BM.amax(-1, keepdim=True)
    found = {
        "moved": torch.ones_like(effective_rank_B),
        "elements": torch.full_like(effective_rank_B, elements),
        "update_squares": update_norm_BM.square().sum(-1),
        "momentum_squares": momentum_norm_BM.square().sum(-1),
        "effective_rank": effective_rank_B,
        "effective_rank_share": effective_rank_B / short,
        "momentum_row_spread": spread(momentum_norm_BM),
        "update_row_spread": spread(update_norm_BM),
        "dead_rows": (momentum_norm_BM <= DEAD * longest_B1).sum(-1),
    }
    return _table_of(found, moves_B)


def _table_of(columns: Mapping[str, Tensor], moves: Tensor | None = None) -> Tensor:
    zero = torch.zeros_like(columns["moved"])
    table = torch.stack([columns.get(name, zero).to(zero.dtype) for name in COLUMNS], dim=1)
    return table if moves is None else torch.where(moves[:, None], table, 0.0)


def unit_figures(numels: Sequence[int], device: torch.device) -> Tensor:
    """``[P, F]``: what whole `adamw` parameters say besides sums: that they moved, their size."""
    dtype = sums_dtype(device)
    sizes = [torch.full((1,), numel, dtype=dtype, device=device) for numel in numels]
    elements = torch.cat(sizes)
    return _table_of({"moved": torch.ones_like(elements), "elements": elements})


def adamw_figures(
    params: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
) -> Tensor:
    """``[P, F]``: the sums that `adamw` parameters, or parts of them, have after their step.

    Args:
        params: plain tensors.
        states: theirs, plain too.
        group: the param group.
    """
    dtype = sums_dtype(params[0].device)
    means = [state["exp_avg"] for state in states]
    squares = square_sums([*params, *means], dtype)
    found = {
        "moved": torch.zeros_like(squares[: len(params)]),
        "weight_squares": squares[: len(params)],
        "momentum_squares": squares[len(params) :],
        "update_squares": _adamw_update_squares(states, group, dtype),
    }
    return _table_of(found)


def _adamw_update_squares(
    states: Sequence[State], group: Mapping[str, Any], dtype: torch.dtype
) -> Tensor:
    """``[P]``: sums of squares of AdamW's step, ``lr m' / (sqrt(v') + eps)``, m' and v' corrected.

    From the state after the step, which holds all that the step was made of.
    """
    times_P = torch.stack([state["step"].reshape(()) for state in states]).to(dtype)
    first_P, second_P = (
        -torch.expm1(times_P * (math.log(beta) if beta else -math.inf)) for beta in group["betas"]
    )
    # m / (sqrt(v) + eps r), r the root of v's correction; factors of the whole follow at the end.
    root_P = second_P.sqrt()
    shifts = (root_P * group["adamw_eps"]).to(torch.float32).unbind()
    sums = []
    for state, shift in zip(states, shifts, strict=True):
        ratios = _by_parts(state["exp_avg"], state["exp_avg_sq"])
        sums.append(
            torch.stack([square_sums([_ratio(m, v, shift)], dtype) for m, v in ratios]).sum()
        )
    lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
    return torch.stack(sums) * (root_P / first_P * lr).square()


def _by_parts(mean: Tensor, square: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two equal tensors in parts of a bounded size: a quotient of them takes memory."""
    most = PART_ELEMENTS[mean.device.type == "cpu"]
    if mean.numel() <= most or mean.ndim == 0:
        return [(mean, square)]
    rows = max(1, most * len(mean) // mean.numel())
    return list(zip(torch.split(mean, rows), torch.split(square, rows), strict=True))


PART_ELEMENTS = (2**24, 2**18)
"""On accelerators and on CPUs, where parts that stay in a cache are the faster ones."""


def _ratio(mean: Tensor, square: Tensor, shift: Tensor) -> Tensor:
    wide = torch.promote_types(square.dtype, torch.float32)
    divisor = square.to(wide).sqrt().add_(shift)
    return torch.div(mean.to(wide), divisor, out=divisor)
