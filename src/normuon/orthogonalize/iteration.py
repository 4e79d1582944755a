"""Newton-Schulz orthogonalisation: an odd polynomial of a matrix, by matrix products alone.

One routine evaluates both published forms, which differ only in how its steps fall into segments:
plain Newton-Schulz multiplies X after every step, Gram Newton-Schulz iterates on the s x s matrix
R = X X^T, s the short side, and multiplies X at the end of a segment.

Shapes: B matrices of M rows and N columns, ``x_BMN``; S is the short side, L the long one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from normuon.orthogonalize.coefficients import Triple
from normuon.orthogonalize.flops import num_panels
from normuon.orthogonalize.precision import sums_dtype
from normuon.orthogonalize.segments import gram_segments, plain_segments
from normuon.orthogonalize.symmetric import product, symmetric_product
from normuon.orthogonalize.workspace import Workspace

SymmetricProduct = Callable[..., Tensor]
"""`symmetric_product` with its panels given, or another way to the same product."""

SQUARES = ("r", "z", "q", "t")
"""The S x S matrices of a segment: R, Z, Q, and one that holds what a product still reads."""


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
        >>> import torch
        >>> from normuon.orthogonalize import normalize_frobenius, resolve_coefficients
        >>> x = normalize_frobenius(torch.eye(2, 3)[None], dtype=torch.float64)
        >>> torch.linalg.svdvals(newton_schulz(x, resolve_coefficients("polar_express", 8)))
        tensor([[1., 1.]], dtype=torch.float64)
    """
    return iterate(x_BMN, coefficients, segments=plain_segments(coefficients))


def gram_newton_schulz(x_BMN: Tensor, coefficients: Sequence[Triple]) -> Tensor:
    """The same polynomial through Gram matrices: fewer FLOPs where the long side is 1.5 S or more.

    With R = X X^T, a step multiplies X from the left by Z = a I + b R + c R^2, which commutes with
    R; so ``Q <- Z Q`` and ``R <- Z R Z`` are products of symmetric S x S matrices, and X is
    multiplied once per segment. Segments are as long as the dtype bears (`gram_segments`).

    Args:
        x_BMN: batch with ``||X||_2 <= 1``, in the dtype to compute in; not written to.
        coefficients: one ``(a, b, c)`` per step.

    Returns:
        ``[B, M, N]``, the same dtype.

    Example:
        >>> import torch
        >>> from normuon.orthogonalize import normalize_frobenius, resolve_coefficients
        >>> x = normalize_frobenius(torch.eye(2, 5)[None], dtype=torch.float64)
        >>> torch.linalg.svdvals(gram_newton_schulz(x, resolve_coefficients("polar_express", 8)))
        tensor([[1.0000, 1.0000]], dtype=torch.float64)
    """
    return iterate(x_BMN, coefficients, segments=gram_segments(tuple(coefficients), x_BMN.dtype))


def iterate(x_BMN: Tensor, coefficients: Sequence[Triple], *, segments: Sequence[int]) -> Tensor:
    """The polynomial with every product full and every result a new tensor.

    Args:
        x_BMN: batch with ``||X||_2 <= 1``; not written to.
        coefficients: one ``(a, b, c)`` per step.
        segments: steps per segment, their sum the number of steps.
    """
    tall = x_BMN.shape[-2] > x_BMN.shape[-1]
    wide = x_BMN.mT if tall else x_BMN
    for steps in _cut(coefficients, segments):
        wide = _segment(wide, steps)
    return wide.mT if tall else wide


def iterate_(
    x_BMN: Tensor,
    coefficients: Sequence[Triple],
    *,
    segments: Sequence[int],
    workspace: Workspace,
    symmetric: SymmetricProduct | None = None,
    effective_rank_B: Tensor | None = None,
) -> Tensor:
    """The polynomial with symmetric products halved and all memory taken from a workspace.

    Args:
        x_BMN: contiguous batch with ``||X||_2 <= 1``; overwritten.
        coefficients: one ``(a, b, c)`` per step.
        segments: steps per segment, their sum the number of steps.
        workspace: where iterates and S x S matrices live.
        symmetric: how symmetric products of batches are computed; None: by `symmetric_product`.
        effective_rank_B: where to write each matrix's `effective_rank`, from the first Gram matrix
            that the polynomial needs anyway; None for nowhere.

    Returns:
        ``[B, M, N]``: ``x_BMN`` itself or a tensor of the workspace, valid until its next use.
    """
    panels = num_panels(min(x_BMN.shape[-2:]), device_type=x_BMN.device.type)
    if panels == 1 or symmetric is not None:
        chosen = symmetric or symmetric_product
        return _iterate_whole_(x_BMN, coefficients, segments, workspace, chosen, effective_rank_B)
    by_panels = partial(symmetric_product, panels=panels)
    ranks = [None] * len(x_BMN) if effective_rank_B is None else list(effective_rank_B)
    if x_BMN.shape[0] == 1:
        only = _iterate_whole_(x_BMN[0], coefficients, segments, workspace, by_panels, ranks[0])
        return only[None]
    # Panels are for single matrices: each of them fills the device.
    for x_MN, rank in zip(x_BMN, ranks, strict=True):
        x_MN.copy_(_iterate_whole_(x_MN, coefficients, segments, workspace, by_panels, rank))
    return x_BMN


def _iterate_whole_(
    x: Tensor,
    coefficients: Sequence[Triple],
    segments: Sequence[int],
    workspace: Workspace,
    symmetric: SymmetricProduct,
    rank: Tensor | None,
) -> Tensor:
    tall = x.shape[-2] > x.shape[-1]
    square = (*x.shape[:-2], min(x.shape[-2:]), min(x.shape[-2:]))
    spare = workspace.empty("iterate", x.shape, dtype=x.dtype, device=x.device)
    # Segments of one step each, plain Newton-Schulz, need R and Z alone.
    needed = SQUARES if max(segments) > 1 else SQUARES[:2]
    squares = {
        name: workspace.empty(name, square, dtype=x.dtype, device=x.device) for name in needed
    }
    wide, spare = (x.mT, spare.mT) if tall else (x, spare)
    for steps in _cut(coefficients, segments):
        _segment(wide, steps, out=spare, squares=squares, symmetric=symmetric, rank=rank)
        wide, spare, rank = spare, wide, None
    return wide.mT if tall else wide


def _cut(coefficients: Sequence[Triple], segments: Sequence[int]) -> Iterator[Sequence[Triple]]:
    stops = list(accumulate(segments))
    assert stops[-1] == len(coefficients), "segments cover the steps"
    for length, stop in zip(segments, stops, strict=True):
        yield coefficients[stop - length : stop]


def _segment(
    x: Tensor,
    coefficients: Sequence[Triple],
    *,
    out: Tensor | None = None,
    squares: Mapping[str, Tensor] | None = None,
    symmetric: SymmetricProduct = symmetric_product,
    rank: Tensor | None = None,
) -> Tensor:
    """Several steps on a matrix or batch with S <= L, seen only through its Gram matrix.

    Args:
        x: ``[..., S, L]``; not written to.
        coefficients: of this segment's steps.
        out: where to write; None makes new tensors throughout.
        squares: memory of the S x S matrices, by name; needed with ``out``.
        symmetric: how symmetric products are computed.
        rank: where to write the `effective_rank` of ``x``.
    """
    into: dict[str, Tensor | None] = {**dict.fromkeys(SQUARES), **(squares or {})}
    r = symmetric(x, x.mT, out=into["r"])
    if rank is not None:
        rank.copy_(effective_rank(r))
    q = None
    for number, (a, b, c) in enumerate(coefficients, start=1):
        z = symmetric(r, r, add=r, beta=b, alpha=c, out=into["z"])
        if len(coefficients) == 1:
            # a X is added in the product's own accumulator, not rounded into Z first.
            return product(z, x, add=x, beta=a, out=out)
        if q is None:
            q = plus_identity(z, a, out=into["q"])
        else:
            q = symmetric(z, q, add=q, beta=a, out=into["t"])
            into["q"], into["t"] = into["t"], into["q"]
        if number < len(coefficients):  # No step follows the last, so nothing needs its R.
            t = symmetric(z, r, add=r, beta=a, out=into["t"])
            r = symmetric(z, t, add=t, beta=a, out=into["r"])
    assert q is not None, "a segment has at least one step"
    return product(q, x, out=out)


def plus_identity(z: Tensor, a: float, *, out: Tensor | None) -> Tensor:
    """``a I + Z``, beside Z."""
    q = z.clone() if out is None else out.copy_(z)
    q.diagonal(dim1=-2, dim2=-1).add_(a)
    return q


def effective_rank(gram: Tensor) -> Tensor:
    r"""How many directions a matrix has, weighted by their energy: ``(tr R)^2 / tr(R^2)``.

    With singular values s and ``R = X X^T`` this is ``(sum s^2)^2 / sum s^4``: k if k singular
    values are equal and the others 0, and 1 if one dwarfs the others. It is the effective rank
    ``R_0`` of R in Bartlett et al. (arXiv 1906.11300, definition 3), also called participation
    ratio. No singular value has to be computed, and a factor of X changes nothing.

    Args:
        gram: R or ``X^T X``, ``[..., S, S]``, in any floating dtype.

    Returns:
        ``[...]``, in `sums_dtype`; 0 for a matrix of zeros.

    Example:
        >>> x = torch.diag(torch.tensor([2.0, 2.0, 0.0]))
        >>> effective_rank(x @ x.mT)
        tensor(2., dtype=torch.float64)
    """
    wide = sums_dtype(gram.device)
    row_norms = torch.linalg.vector_norm(
        gram, dim=-1, dtype=torch.promote_types(gram.dtype, torch.float32)
    )
    squares = row_norms.to(wide).square().sum(-1)
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=wide)
    found: Tensor = (trace.square() / squares).masked_fill(squares == 0, 0.0)
    return found
