"""Newton-Schulz orthogonalisation: an odd polynomial of a matrix, by matrix products alone.

Shapes: B matrices of M rows and N columns, ``x_BMN``. The choice among methods and dtypes is
`backend.py`'s; the coefficients are `coefficients.py`'s.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normuon.orthogonalize.coefficients import Triple


def normalize_frobenius(x_BMN: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Each matrix divided by its Frobenius norm, so that ||X||_2 <= 1: X_0 of eq. 5.

    Differs: no epsilon is added to the norm, because that would make the step depend on the
    gradient's scale. The matrix is divided by its largest magnitude first, so that no square under-
    or overflows (1e-30 and 1e+30 are fine in float32), and an all-zero matrix is left at zero.

    Args:
        x_BMN: floating-point batch; not written to.
        dtype: dtype of the result.

    Returns:
        A new ``[B, M, N]`` tensor, every matrix of norm 1 or 0 (a non-finite one stays non-finite).

    Example:
        >>> x = torch.tensor([[[3e-30, 4e-30]], [[0.0, 0.0]]])
        >>> normalize_frobenius(x, dtype=torch.float32)
        tensor([[[0.6000, 0.8000]],
                [[0.0000, 0.0000]]])
    """
    # Statistics in at least float32: a bfloat16 sum of squares stalls at 256 equal terms.
    stats_dtype = torch.promote_types(x_BMN.dtype, torch.float32)
    largest_B11 = torch.linalg.vector_norm(
        x_BMN, ord=float("inf"), dim=(-2, -1), keepdim=True, dtype=stats_dtype
    )
    scaled_BMN = x_BMN / _one_where_zero(largest_B11)
    norm_B11 = torch.linalg.vector_norm(scaled_BMN, dim=(-2, -1), keepdim=True)
    return scaled_BMN.div_(_one_where_zero(norm_B11)).to(dtype)


def _one_where_zero(x: Tensor) -> Tensor:
    return torch.where(x == 0, torch.ones_like(x), x)


def newton_schulz(x_BMN: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """NS(X) by the plain quintic iteration (eq. 5), on the short side of the matrix.

    ``X <- a X + b (X X^T) X + c (X X^T)^2 X`` for each ``(a, b, c)``. For M > N the same polynomial
    is evaluated from the right, through the smaller ``X^T X``: nothing is transposed or copied.

    Args:
        x_BMN: batch with ``||X||_2 <= 1``, in the dtype to compute in; not written to.
        coefficients: one ``(a, b, c)`` per step.

    Returns:
        ``[B, M, N]``, the same dtype.

    Example:
        >>> from normuon.orthogonalize.coefficients import resolve_coefficients
        >>> x = normalize_frobenius(torch.eye(2, 3)[None], dtype=torch.float64)
        >>> torch.linalg.svdvals(newton_schulz(x, resolve_coefficients("polar_express", 8)))
        tensor([[1., 1.]], dtype=torch.float64)
    """
    wide = x_BMN.shape[-2] <= x_BMN.shape[-1]
    for a, b, c in coefficients:
        gram = x_BMN @ x_BMN.mT if wide else x_BMN.mT @ x_BMN
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (poly, x_BMN) if wide else (x_BMN, poly)
        x_BMN = torch.baddbmm(x_BMN, left, right, beta=a)
    return x_BMN
