"""The iteration through torch.compile, compiled once per kind of shape and not once per shape."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from normuon.orthogonalize.coefficients import Triple
from normuon.orthogonalize.iteration import iterate


@lru_cache(maxsize=64)
def compiled_iterate(
    coefficients: tuple[Triple, ...], segments: tuple[int, ...]
) -> Callable[[Tensor], Tensor]:
    """``[B, M, N] -> [B, M, N]``, compiled for these coefficients and segments.

    Sizes stay symbolic, since nothing but their order (wide or tall) changes the program: a model's
    nine shapes and changing batch sizes share a few compilations instead of exhausting the
    compiler's limit and falling back to eager without a word.
    """

    def run(x_BMN: Tensor) -> Tensor:
        return iterate(x_BMN, coefficients, segments=segments)

    # The compiler counts recompilations per code object, and closures share theirs: with one of its
    # own, each polynomial has the whole limit to itself.
    run.__code__ = run.__code__.replace(co_name=f"orthogonalize_{hash((coefficients, segments))}")
    compiled: Callable[[Tensor], Tensor] = torch.compile(run, dynamic=True, fullgraph=True)
    return compiled
