"""Products that are known to be symmetric, computed in their lower half and mirrored.

X X^T is symmetric, and so is the product of two polynomials in it, because they commute. The
columns are cut into panels: a panel's product needs only the rows from its diagonal on.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from normuon.orthogonalize.flops import panel_starts


def product(
    a: Tensor,
    b: Tensor,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``beta add + alpha a b``, of matrices or of batches of them.

    Args:
        a: ``[..., s, k]``.
        b: ``[..., k, t]``.
        add: ``[..., s, t]``, or None for zero; then ``alpha`` must be 1.
        beta: factor of ``add``.
        alpha: factor of the product.
        out: where to write; must overlap no argument. None makes a new tensor.
    """
    if out is not None and out.stride(-1) != 1:
        # The transposed equation, row by row: into columns, a CPU's batched bfloat16 product falls
        # back to a loop that takes a thousand times as long.
        turned = None if add is None else add.mT
        product(b.mT, a.mT, add=turned, beta=beta, alpha=alpha, out=out.mT)
        return out
    # Without `out` nothing is passed for it: torch.compile takes these calls whole.
    into = {} if out is None else {"out": out}
    if add is None:
        assert alpha == 1.0, "alpha scales a product that is added to something"
        return torch.matmul(a, b, **into)
    multiply_add = torch.addmm if a.ndim == 2 else torch.baddbmm
    return multiply_add(add, a, b, beta=beta, alpha=alpha, **into)


def symmetric_product(
    a: Tensor,
    b: Tensor,
    *,
    add: Tensor | None = None,
    beta: float = 1.0,
    alpha: float = 1.0,
    panels: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`product` where the product and ``add`` are symmetric: half of it computed, half mirrored.

    Args:
        a: ``[..., s, k]``.
        b: ``[..., k, s]``; ``a b`` must be symmetric.
        add: ``[..., s, s]`` symmetric, or None.
        beta: factor of ``add``.
        alpha: factor of the product.
        panels: column panels; more than one needs ``out`` and single matrices, not batches.
        out: where to write; must overlap no argument.

    Returns:
        ``[..., s, s]``; outside the panels' diagonal blocks its halves are equal bit by bit.

    Example:
        >>> x = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
        >>> symmetric_product(x, x.mT, panels=2, out=torch.empty(2, 2))
        tensor([[5., 2.],
                [2., 2.]])
    """
    if panels == 1:
        return product(a, b, add=add, beta=beta, alpha=alpha, out=out)
    assert out is not None
    assert out.ndim == 2
    starts = panel_starts(a.shape[0], panels)
    for start, stop in pairwise(starts):
        part = None if add is None else add[start:, start:stop]
        panel = out[start:, start:stop]
        product(a[start:], b[:, start:stop], add=part, beta=beta, alpha=alpha, out=panel)
        out[start:stop, stop:].copy_(out[stop:, start:stop].mT)
    return out
