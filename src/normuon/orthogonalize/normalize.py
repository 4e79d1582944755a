"""Dividing a matrix by its Frobenius norm, whatever its scale."""

from __future__ import annotations

import torch
from torch import Tensor

from normuon.orthogonalize.workspace import Workspace


def normalize_frobenius(
    x_BMN: Tensor,
    *,
    dtype: torch.dtype,
    workspace: Workspace | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Each matrix divided by its Frobenius norm, so that ||X||_2 <= 1: X_0 of eq. 5.

    Differs: no epsilon is added to the norm, because that would make the step depend on the
    gradient's scale. The matrix is divided by its largest magnitude first, so that no square under-
    or overflows (1e-30 and 1e+30 are fine in float32), and an all-zero matrix is left at zero.

    Args:
        x_BMN: floating-point batch; not written to unless it is ``out``.
        dtype: dtype of the result.
        workspace: scratch kept between calls; None for none.
        out: contiguous memory of the shape to divide in, ``x_BMN`` itself perhaps; used if its
            dtype is that of the statistics, ``dtype`` or float32, whichever is wider.

    Returns:
        A contiguous ``[B, M, N]`` tensor, of ``out``'s or of the workspace's memory and valid until
        that is used again; every matrix of norm 1 or 0 (a non-finite one stays non-finite).

    Example:
        >>> x = torch.tensor([[[3e-30, 4e-30]], [[0.0, 0.0]]])
        >>> normalize_frobenius(x, dtype=torch.float32)
        tensor([[[0.6000, 0.8000]],
                [[0.0000, 0.0000]]])
    """
    # Statistics in at least float32: a bfloat16 sum of squares stalls at 256 equal terms.
    stats_dtype = torch.promote_types(x_BMN.dtype, torch.float32)
    scale_B11 = _one_where_zero(largest_magnitude(x_BMN).to(stats_dtype))
    if workspace is None or torch.compiler.is_compiling():
        scaled_BMN = (x_BMN / scale_B11).contiguous()
        return scaled_BMN.div_(_frobenius_norm(scaled_BMN)).to(dtype)
    if out is not None and out.dtype == stats_dtype:
        scaled_BMN = out
    else:
        scaled_BMN = workspace.empty("scaled", x_BMN.shape, like=x_BMN, dtype=stats_dtype)
    torch.div(x_BMN, scale_B11, out=scaled_BMN)
    scaled_BMN.div_(_frobenius_norm(scaled_BMN))
    if dtype == stats_dtype:
        return scaled_BMN
    return workspace.empty("rounded", x_BMN.shape, like=x_BMN, dtype=dtype).copy_(scaled_BMN)


def largest_magnitude(x_BMN: Tensor) -> Tensor:
    """``[B, 1, 1]``: each matrix's largest absolute value; NaN where it holds one.

    By the largest and the smallest value: on a CPU the infinity norm takes twenty times as long.

    Example:
        >>> largest_magnitude(torch.tensor([[[1.0, -3.0], [2.0, 0.0]]]))
        tensor([[[3.]]])
    """
    whole = (-2, -1)
    return torch.maximum(x_BMN.amax(whole, keepdim=True), -x_BMN.amin(whole, keepdim=True))


def _frobenius_norm(x_BMN: Tensor) -> Tensor:
    return _one_where_zero(torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True))


def _one_where_zero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)
