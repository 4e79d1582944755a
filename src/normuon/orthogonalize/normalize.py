"""Normalises a matrix before it is orthogonalised, and equilibrates it if asked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normuon.orthogonalize.fused import FUSED_DTYPES, divide_by_norm, runs_fused, sum_squares
from normuon.orthogonalize.workspace import Workspace, is_aligned


def normalize_frobenius(
    x_BMN: Tensor,
    *,
    dtype: torch.dtype,
    equilibrate: bool = False,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
    sum_squares_B: Tensor | None = None,
    fused: bool | None = None,
) -> Tensor:
    """Each matrix divided by its Frobenius norm, so that ||X||_2 <= 1: X_0 of eq. 5.

    Differs: no epsilon is added to the norm, because that would make the step depend on the
    gradient's scale. The matrix is divided by its largest magnitude first, so that no square under-
    or overflows (1e-30 and 1e+30 are fine in float32), and an all-zero matrix is left at zero.

    Args:
        x_BMN: floating-point batch; not written to unless it is ``out``.
        dtype: dtype of the result.
        equilibrate: even its rows and columns first, by `equilibrate_`.
        workspace: scratch kept between calls; None for none.
        out: contiguous memory of the shape to divide in, ``x_BMN`` itself perhaps; used if its
            dtype is that of the statistics, ``dtype`` or float32, whichever is wider, and on a CPU
            if matrices begin at multiples of 64 bytes: by where they begin, products round.
        sum_squares_B: each matrix's sum of squares in float64, where it is known; used by kernels.
        fused: False for torch's own operations where Triton kernels would run.

    Returns:
        A contiguous ``[B, M, N]`` tensor, of ``out``'s or of the workspace's memory and valid until
        that is used again; every matrix of norm 1 or 0 (a non-finite one stays non-finite).

    Example:
        >>> x = torch.tensor([[[3e-30, 4e-30]], [[0.0, 0.0]]])
        >>> normalize_frobenius(x, dtype=torch.float32)
        tensor([[[0.6000, 0.8000]],
                [[0.0000, 0.0000]]])
    """
    takes_kernels = fused is not False and not equilibrate and workspace is not None
    if takes_kernels and x_BMN.numel() and dtype in FUSED_DTYPES and runs_fused(x_BMN):
        assert workspace is not None
        if out is None or out.dtype != dtype:
            out = workspace.empty("rounded", x_BMN.shape, dtype=dtype, device=x_BMN.device)
        x_BMN = x_BMN.contiguous()
        sums_B = sum_squares(x_BMN) if sum_squares_B is None else sum_squares_B
        return divide_by_norm(x_BMN, sums_B, out=out)
    # Statistics in at least float32: a bfloat16 sum of squares stalls at 256 equal terms.
    stats_dtype = torch.promote_types(x_BMN.dtype, torch.float32)
    largest_B11 = largest_magnitude(x_BMN).to(stats_dtype)
    # Below the smallest normal number a decaying momentum stands still, and would never end.
    is_zero_B11 = largest_B11 < torch.finfo(stats_dtype).tiny
    scale_B11 = largest_B11.masked_fill(is_zero_B11, math.inf)
    if workspace is None or torch.compiler.is_compiling():
        scaled_BMN = (x_BMN / scale_B11).contiguous()
        if equilibrate:
            equilibrate_(scaled_BMN)
        return scaled_BMN.div_(_frobenius_norm(scaled_BMN)).to(dtype)
    if (
        out is not None
        and out.dtype == stats_dtype
        and (out.device.type != "cpu" or is_aligned(out))
    ):
        scaled_BMN = out
    else:
        scaled_BMN = workspace.empty("scaled", x_BMN.shape, dtype=stats_dtype, device=x_BMN.device)
    torch.div(x_BMN, scale_B11, out=scaled_BMN)
    if equilibrate:
        equilibrate_(scaled_BMN)
    scaled_BMN.div_(_frobenius_norm(scaled_BMN))
    if dtype == stats_dtype:
        return scaled_BMN
    rounded = workspace.empty("rounded", x_BMN.shape, dtype=dtype, device=x_BMN.device)
    return rounded.copy_(scaled_BMN)


def equilibrate_(x_BMN: Tensor) -> Tensor:
    """Divides every row and every column by the square root of its norm, both taken beforehand.

    ``x_ij <- x_ij / (||x_i,:|| ||x_:,j||)^(1/2)``: one pass of Ruiz's equilibration (2001), and
    Shampoo's preconditioner if it saw X alone and kept only the diagonals of X X^T and X^T X. An
    outer product of scales has its square root left, so that a few large rows or columns no longer
    rule what Newton-Schulz sees. MuonEq (arXiv 2603.28254) divides by the norms themselves.

    Args:
        x_BMN: batch in at least float32, of magnitudes that neither under- nor overflow when
            squared; written to.

    Returns:
        ``x_BMN``; rows and columns of zeros stay zero.

    Example:
        >>> equilibrate_(torch.tensor([[[16.0, 0.0], [0.0, 1.0]]]))
        tensor([[[1., 0.],
                 [0., 1.]]])
    """
    row_norm_BM1 = torch.linalg.vector_norm(x_BMN, dim=-1, keepdim=True)
    column_norm_B1N = torch.linalg.vector_norm(x_BMN, dim=-2, keepdim=True)
    x_BMN.mul_(_one_where_zero(row_norm_BM1).rsqrt_())
    return x_BMN.mul_(_one_where_zero(column_norm_B1N).rsqrt_())


def largest_magnitude(x_BMN: Tensor) -> Tensor:
    """``[B, 1, 1]``: each matrix's largest absolute value; NaN where it holds one.

    By the infinity norm, or on a CPU, where that takes twenty times as long, by the largest and the
    smallest value.

    Example:
        >>> largest_magnitude(torch.tensor([[[1.0, -3.0], [2.0, 0.0]]]))
        tensor([[[3.]]])
    """
    whole = (-2, -1)
    if x_BMN.device.type != "cpu":
        norm: Tensor = torch.linalg.vector_norm(x_BMN, ord=math.inf, dim=whole, keepdim=True)
        return norm
    return torch.maximum(x_BMN.amax(whole, keepdim=True), -x_BMN.amin(whole, keepdim=True))


def _frobenius_norm(x_BMN: Tensor) -> Tensor:
    return _one_where_zero(torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True))


def _one_where_zero(x: Tensor) -> Tensor:
    return x + (x == 0)
