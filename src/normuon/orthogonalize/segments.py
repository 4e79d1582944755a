"""Where a Newton-Schulz iteration may go on with Gram matrices, and where it must start afresh.

A segment of steps sees its input only through R = X X^T. Rounding R in a dtype of precision u hides
singular values below sqrt(u), while the segment magnifies the small ones by the product of its
steps' ``a``; the error of what comes out grows as u times that product squared. So a segment may
magnify no more than its dtype bears.

The first segment bears more than those after it. ||X||_F is 1 there, so that R rounds to small
errors; later most singular values are near 1, and R's errors near u. Some of its eigenvalues are
then a little below zero, where a step magnifies more than by ``a``: three of `jordan`'s turn -2u
into a factor of hundreds, and what comes out leaves the interval where the polynomial is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from normuon.orthogonalize.coefficients import Triple
from normuon.orthogonalize.flops import gram_pays


@dataclass(frozen=True, slots=True)
class MagnificationLimit:
    """How much a segment of Gram steps may magnify small singular values.

    Args:
        first: bound for the first segment, if others follow that press its errors flat.
        other: bound for all others, and for one alone.
    """

    first: float
    other: float


# Measured on spectra of condition up to 1e6, rank-deficient ones and one large value over a flat
# floor of 1e-3 (tests/unit/test_accuracy.py prints the table that docs/accuracy.md shows).
MAGNIFICATION_LIMITS = {
    torch.bfloat16: MagnificationLimit(first=45, other=16),
    torch.float16: MagnificationLimit(first=45, other=16),
    torch.float32: MagnificationLimit(first=500, other=500),
    torch.float64: MagnificationLimit(first=1e6, other=1e6),
}


# A compiled step takes the cut as a constant, since torch.compile cannot trace the search for it.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def gram_segments(coefficients: tuple[Triple, ...], dtype: torch.dtype) -> tuple[int, ...]:
    """The fewest segments that ``dtype`` bears, as steps per segment, in order.

    Among equally many, those whose worst magnification, relative to its bound, is least.

    Example:
        >>> jordan = ((3.4445, -4.7750, 2.0315),) * 5
        >>> gram_segments(jordan, torch.float32), gram_segments(jordan, torch.bfloat16)
        ((5,), (3, 2))
    """
    return _remembered_gram_segments(coefficients, dtype)


@lru_cache(maxsize=256)
def _remembered_gram_segments(
    coefficients: tuple[Triple, ...], dtype: torch.dtype
) -> tuple[int, ...]:
    limit = MAGNIFICATION_LIMITS[dtype]
    slopes = [max(abs(a), 1.0) for a, _, _ in coefficients]

    @cache
    def cut(stop: int, count: int, bound: float) -> tuple[float, tuple[int, ...]]:
        """The best cut of the first ``stop`` steps, and its worst relative magnification."""
        if count == 1:
            return math.prod(slopes[:stop]) / bound, (stop,)
        best: tuple[float, tuple[int, ...]] = (math.inf, ())
        for length in range(1, stop - count + 2):
            last = math.prod(slopes[stop - length : stop]) / bound
            if last >= best[0]:
                break
            rest = limit.first if count == 2 else limit.other
            before, lengths = cut(stop - length, count - 1, rest)
            best = min(best, (max(last, before), (*lengths, length)))
        return best

    for count in range(1, len(slopes) + 1):
        worst, lengths = cut(len(slopes), count, limit.other)
        if worst <= 1:
            return lengths
    return plain_segments(coefficients)


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
        cut: tuple[int, ...] = gram_segments(tuple(coefficients), dtype)
        return cut
    return plain_segments(coefficients)
