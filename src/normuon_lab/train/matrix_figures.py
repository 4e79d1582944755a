"""Figures of matrices and of the updates of a step, for whole matrices on one device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normuon.models.view import MatrixView
from normuon.step.figures import spread

MAX_CONDITION_NUMBER = 1e8
"""Larger ones are cut to it: singular values come from a Gram matrix in float64, whose
rounding hides those below 1e-8 of the largest."""


@dataclass(frozen=True, slots=True)
class MatrixFigures:
    """Three numbers of a matrix, or their means over a batch of matrices.

    With singular values s and ``p_i = s_i^2 / sum_j s_j^2``:

    Attributes:
        condition: largest over smallest singular value, at most `MAX_CONDITION_NUMBER`.
        effective_rank: ``exp(-sum_i p_i ln p_i)``: min(m, n) for an orthogonal matrix, 1 for a rank
            of one. (Entropy of the energies s^2, not of s as in Roy and Vetterli 2007.) Never less
            than the ``1 / sum_i p_i^2`` of `NorMuon.statistics`, which needs no singular values.
        row_norm_cv: standard deviation over mean of the norms of the rows, the output neurons.
    """

    condition: float
    effective_rank: float
    row_norm_cv: float


def matrix_figures(x_BMN: Tensor) -> MatrixFigures | None:
    """The figures of a batch of matrices, ``[B, m, n]``, rows = neurons, in float64.

    Returns:
        Means over the batch, without matrices that are zero or not finite; None without others.

    Example:
        >>> matrix_figures(torch.eye(4)[None])
        MatrixFigures(condition=1.0, effective_rank=4.0, row_norm_cv=0.0)
    """
    x_BMN = x_BMN.double()
    # Scaled, so that squares neither overflow nor vanish.
    largest_B11 = x_BMN.abs().amax(dim=(1, 2), keepdim=True)
    good_B = (torch.isfinite(largest_B11) & (largest_B11 > 0)).flatten()
    if not bool(good_B.any()):
        return None
    x_BMN = x_BMN[good_B] / largest_B11[good_B]
    m, n = x_BMN.shape[1:]
    gram = x_BMN @ x_BMN.mT if m <= n else x_BMN.mT @ x_BMN
    energies_BK = torch.linalg.eigvalsh(gram).clamp(min=0)
    largest_B = energies_BK[:, -1]
    smallest_B = torch.maximum(energies_BK[:, 0], largest_B / MAX_CONDITION_NUMBER**2)
    shares_BK = energies_BK / energies_BK.sum(dim=1, keepdim=True)
    entropy_B = torch.special.entr(shares_BK).sum(dim=1)
    spread_B = spread(x_BMN.norm(dim=2))
    return MatrixFigures(
        condition=float((largest_B / smallest_B).sqrt().mean()),
        effective_rank=float(entropy_B.exp().mean()),
        row_norm_cv=float(spread_B.mean()),
    )


def measuring_flops(shape: torch.Size, view: MatrixView) -> float:
    """Estimates the operations of `matrix_figures` on all blocks of a parameter: those of Gram
    matrices and their eigenvalues."""
    flops = 0.0
    for batch, m, n in view.shapes(shape):
        short, long = sorted((m, n))
        # LAPACK's tridiagonal reduction takes 4/3 k^3, at the speed of matrix times vector.
        flops += batch * (2.0 * short * short * long + 10.0 * short**3)
    return flops


def update_of(before: Tensor, after: Tensor, group: Mapping[str, Any]) -> Tensor:
    """What a step did beyond weight decay, ``W (1 - lr wd) - W'``, in float64."""
    kept = 1.0 - float(group["lr"]) * float(group["weight_decay"])
    return before.double() * kept - after.double()


def describe_matrix(update_MN: Tensor) -> dict[str, Any]:
    """Shape, Frobenius norm, singular values and row norms, the last two in descending order."""
    singular_values = torch.linalg.svdvals(update_MN)
    row_norms = update_MN.norm(dim=1).sort(descending=True).values
    return {
        "shape": list(update_MN.shape),
        "frobenius_norm": float(f"{float(update_MN.norm()):.6g}"),
        "singular_values": _rounded(singular_values),
        "row_norms": _rounded(row_norms),
    }


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.5g}") for value in values.tolist()]
