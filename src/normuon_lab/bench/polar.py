"""How far a contender's direction is from the polar factor, the exact answer.

For G = U S V^T the polar factor is P = U V^T. Contenders scale their updates each in its own way,
so that updates are compared by direction alone: ``|| O / ||O||_F - P / ||P||_F ||_F``, 0 where they
agree and 1.41 where they have nothing in common.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normuon_lab.bench.contender import Contender

MAX_SVD_SIDE = 1024
"""Short side up to which the polar factor is found by SVD."""


def polar_factor(g_MN: Tensor) -> Tensor:
    """U V^T in float64.

    By SVD; where the short side exceeds `MAX_SVD_SIDE`, as (G G^T)^{-1/2} G by an
    eigendecomposition, which takes a quarter of the time and is exact to about the square of G's
    condition number times 1e-16: 1e-8 for a square normal matrix of that size.

    Args:
        g_MN: a matrix of full rank.

    Example:
        >>> polar_factor(torch.tensor([[3.0, 0.0, 0.0], [0.0, -2.0, 0.0]]))
        tensor([[ 1.,  0.,  0.],
                [ 0., -1.,  0.]], dtype=torch.float64)
    """
    exact = g_MN.double()
    if min(g_MN.shape) > MAX_SVD_SIDE:
        return polar_factor_by_gram(exact)
    u, _, vh = torch.linalg.svd(exact, full_matrices=False)
    return u @ vh


def polar_factor_by_gram(g_MN: Tensor) -> Tensor:
    """U V^T of a float64 matrix through its smaller Gram matrix."""
    tall = g_MN.shape[0] > g_MN.shape[1]
    wide = g_MN.mT if tall else g_MN
    squares, vectors = torch.linalg.eigh(wide @ wide.mT)
    factor = (vectors * squares.rsqrt()) @ (vectors.mT @ wide)
    return factor.mT if tall else factor


def direction_error(o_MN: Tensor, polar_MN: Tensor) -> float:
    """Distance between two matrices, each scaled to Frobenius norm 1.

    Example:
        >>> round(direction_error(torch.eye(2), 4 * torch.eye(2)), 6)
        0.0
        >>> round(direction_error(torch.eye(2), -torch.eye(2)), 6)
        2.0
    """
    o_MN, polar_MN = o_MN.double(), polar_MN.double()
    return torch.dist(o_MN / o_MN.norm(), polar_MN / polar_MN.norm()).item()


def polar_errors(contender: Contender, gradient: Tensor, polar_MN: Tensor) -> dict[str, float]:
    """Errors of a contender on one gradient.

    Args:
        contender: one that can run.
        gradient: ``[m, n]``; not written to.
        polar_MN: its polar factor.

    Returns:
        ``direction_error`` of the first update without neuron scaling, from zero weights, so that
        the difference of two weights rounds nothing away; and ``orthogonalizer_error``,
        ``||O - P||_F / sqrt(rank)``, of the orthogonaliser called apart, where the contender can.

    Raises:
        RuntimeError: two steps left the weights at zero.
    """
    param = nn.Parameter(torch.zeros_like(gradient))
    optimizer = (contender.build_unscaled or contender.build)([param])
    for _ in range(2):  # Some optimizers only set up their state at the first step.
        param.grad = gradient.clone()
        optimizer.step()
        if param.detach().any():
            break
    else:
        raise RuntimeError("two steps did not move the weights")
    errors = {"direction_error": direction_error(-param.detach(), polar_MN)}
    if contender.orthogonalize is not None:
        o_MN = contender.orthogonalize(gradient[None])[0].double()
        rank = min(gradient.shape)
        errors["orthogonalizer_error"] = torch.dist(o_MN, polar_MN).item() / math.sqrt(rank)
    return errors
