"""Rivals that control the norms of weights instead of letting them grow: Hyperball and Muown."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normuon_lab.train.arms.matrix_rival import (
    Memory,
    WeightRival,
    advanced_momentum_,
    muon_scale,
    orthogonalized,
)

ADAM_EPS = 1e-8


class Hyperball(WeightRival):
    """Muon Hyperball (Wen et al. 2026, arXiv 2606.16899): fixed norms of weights and of steps.

    ::

        U = NS(M)                                M with Nesterov's look ahead
        W = R unit(W - lr R unit(U))             unit(X) = X / ||X||_F, R = ||W_0||_F

    There is no weight decay. The learning rate is relative to the weights: a step has the norm
    ``lr R``, whatever ``0.2 lr`` would be. A matrix that starts at zero stays there.
    """

    def new_weights(
        self,
        weights_BMN: Tensor,
        grad_BMN: Tensor,
        momentum_BMN: Tensor,
        memory: Memory,
        group: dict[str, Any],
    ) -> Tensor:
        """See `WeightRival.new_weights`."""
        if "radius" not in memory:
            memory["radius"] = _frobenius(weights_BMN)
        radius_B11 = memory["radius"]
        o_BMN = orthogonalized(advanced_momentum_(grad_BMN, momentum_BMN, group["momentum"]))
        step_BMN = radius_B11 * _ratio(o_BMN, _frobenius(o_BMN))
        moved_BMN = weights_BMN - group["lr"] * step_BMN
        return radius_B11 * _ratio(moved_BMN, _frobenius(moved_BMN))


class Muown(WeightRival):
    """Muown (Lion et al. 2026, arXiv 2605.10797): Adam for row norms, Muon for what is left.

    A weight is ``W = diag(g) V / ||V||``, norms taken by row; g and V start as the row norms of
    W and as W itself. With ``U = V / ||V||`` and the gradient G of W::

        grad g = rows of (G * U), summed
        grad V = diag(g / ||V||) (G - diag(grad g) U)
        V = V - lr 0.2 sqrt(max(m, n)) NS(M)     M the momentum of grad V, with look ahead
        g = Adam's step with grad g and lr
        W = diag(g) V / ||V|| - lr wd W          then g is the row norms of W

    V is not kept: it is U times its row norms, which are. A row of zeros stays zero.
    """

    def new_weights(
        self,
        weights_BMN: Tensor,
        grad_BMN: Tensor,
        momentum_BMN: Tensor,
        memory: Memory,
        group: dict[str, Any],
    ) -> Tensor:
        """See `WeightRival.new_weights`."""
        if not memory:
            norm_BM1 = _row_norms(weights_BMN)
            memory["magnitude"], memory["direction_norm"] = norm_BM1, norm_BM1
            memory["mean"], memory["square"] = 2 * [torch.zeros_like(norm_BM1)]
            memory["step"] = norm_BM1.new_zeros(())
        g_BM1, v_norm_BM1 = memory["magnitude"], memory["direction_norm"]
        unit_BMN = _ratio(weights_BMN, g_BM1)
        seen_BMN = grad_BMN.to(weights_BMN.dtype)
        grad_g_BM1 = (seen_BMN * unit_BMN).sum(-1, keepdim=True)
        grad_v_BMN = _ratio(g_BM1, v_norm_BM1) * (seen_BMN - grad_g_BM1 * unit_BMN)
        ahead_BMN = advanced_momentum_(grad_v_BMN, momentum_BMN, group["momentum"])
        step_BMN = muon_scale(ahead_BMN) * orthogonalized(ahead_BMN)
        v_BMN = v_norm_BM1 * unit_BMN - group["lr"] * step_BMN
        g_BM1 = g_BM1 - group["lr"] * _adam_direction(grad_g_BM1, memory, group["betas"])
        memory["direction_norm"] = _row_norms(v_BMN)
        composed_BMN = g_BM1 * _ratio(v_BMN, memory["direction_norm"])
        decay = group["lr"] * group["weight_decay"]
        decayed_BMN = composed_BMN - decay * weights_BMN
        memory["magnitude"] = _row_norms(decayed_BMN) if decay else g_BM1
        return decayed_BMN


def _adam_direction(grad_BM1: Tensor, memory: Memory, betas: tuple[float, float]) -> Tensor:
    memory["step"] = memory["step"] + 1
    memory["mean"] = torch.lerp(grad_BM1, memory["mean"], betas[0])
    memory["square"] = torch.lerp(grad_BM1.square(), memory["square"], betas[1])
    mean_BM1 = memory["mean"] / (1 - betas[0] ** memory["step"])
    square_BM1 = memory["square"] / (1 - betas[1] ** memory["step"])
    return mean_BM1 / (square_BM1.sqrt() + ADAM_EPS)


def _frobenius(x_BMN: Tensor) -> Tensor:
    norm_B11: Tensor = torch.linalg.vector_norm(x_BMN, dim=(-2, -1), keepdim=True)
    return norm_B11


def _row_norms(x_BMN: Tensor) -> Tensor:
    norm_BM1: Tensor = torch.linalg.vector_norm(x_BMN, dim=-1, keepdim=True)
    return norm_BM1


def _ratio(x: Tensor, norm: Tensor) -> Tensor:
    """``x / norm``, 0 where the norm is."""
    return torch.where(norm == 0, 0.0, x / norm)
