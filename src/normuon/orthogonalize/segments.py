"""Where a Newton-Schulz iteration may go on with Gram matrices, and where it must start afresh.

A segment of steps sees its input only through R = X X^T. Rounding R in a dtype of precision u hides
singular values below sqrt(u), while the segment magnifies the small ones by the product of its
steps' ``a``; the error of what comes out grows as u times that product squared. So a segment may
magnify no more than its dtype bears. What a segment computes is `iteration.py`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from normuon.orthogonalize.coefficients import Triple
from normuon.orthogonalize.flops import gram_pays


@dataclass(frozen=True, slots=True)
class MagnificationLimit:
    """How much a segment of Gram steps may magnify small singular values.

    Args:
        last: bound for the last segment, whose errors nothing flattens after it.
        earlier: bound for those before it; the steps that follow press their errors flat.
    """

    last: float
    earlier: float


# Measured on spectra of condition up to 1e6, rank-deficient ones and one large value over a flat
# floor of 1e-3 (tests/unit/test_accuracy.py prints the table that docs/accuracy.md shows).
MAGNIFICATION_LIMITS = {
    torch.bfloat16: MagnificationLimit(last=16, earlier=45),
    torch.float16: MagnificationLimit(last=16, earlier=45),
    torch.float32: MagnificationLimit(last=500, earlier=500),
    torch.float64: MagnificationLimit(last=1e6, earlier=1e6),
}


def gram_segments(coefficients: Sequence[Triple], dtype: torch.dtype) -> tuple[int, ...]:
    """The fewest segments that ``dtype`` bears, as steps per segment, in order.

    Filled from the end, so that the last segment is as long as its tighter bound allows.

    Example:
        >>> jordan = [(3.4445, -4.7750, 2.0315)] * 5
        >>> gram_segments(jordan, torch.float32), gram_segments(jordan, torch.bfloat16)
        ((5,), (3, 2))
    """
    limit = MAGNIFICATION_LIMITS[dtype]
    lengths: list[int] = []
    magnification = math.inf
    for a, _, _ in reversed(coefficients):
        bound = limit.earlier if len(lengths) > 1 else limit.last
        if magnification * a > bound:
            lengths.append(0)
            magnification = 1.0
        magnification *= a
        lengths[-1] += 1
    return tuple(reversed(lengths))


def plain_segments(coefficients: Sequence[Triple]) -> tuple[int, ...]:
    """Every step a segment of its own: plain Newton-Schulz.

    Example:
        >>> plain_segments([(3.4445, -4.7750, 2.0315)] * 3)
        (1, 1, 1)
    """
    return (1,) * len(coefficients)


METHODS = ("newton_schulz", "gram")
"""The built-in ways to evaluate the polynomial; ``"auto"`` is the one with fewer FLOPs."""


def segments_for(
    method: str, m: int, n: int, *, coefficients: Sequence[Triple], dtype: torch.dtype, panels: int
) -> tuple[int, ...]:
    """How a method cuts the steps for an m x n matrix.

    Args:
        method: ``"auto"`` or one of `METHODS`.
        m: rows.
        n: columns.
        coefficients: one ``(a, b, c)`` per step.
        dtype: dtype to compute in.
        panels: of the symmetric products, which decide what is cheaper.

    Example:
        >>> jordan = [(3.4445, -4.7750, 2.0315)] * 5
        >>> segments_for(
        ...     "auto", 768, 3072, coefficients=jordan, dtype=torch.float32, panels=4
        ... )
        (5,)
    """
    if method == "gram" or (method == "auto" and gram_pays(m, n, panels=panels)):
        return gram_segments(coefficients, dtype)
    return plain_segments(coefficients)
