"""Dion (Ahn et al. 2025, arXiv 2504.05295, Algorithm 1): a low-rank orthonormal update.

One power iteration on the momentum, from the right factor of the step before, replaces
Newton-Schulz; what the rank cannot hold stays in the momentum (error feedback).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from normuon_lab.train.arms.matrix_rival import MatrixRival, Memory, with_adamw_rms


class Dion(MatrixRival):
    """Dion with ``rank = rank_fraction min(m, n)``, at least 1.

    ::

        B = M + G
        P = orthonormal columns of B Q                     QR
        R = B^T P
        M = B - (1 - mu) P R^T                             error feedback
        Q = R, each column divided by its norm
        D = P Q^T

    Differs: the paper multiplies the step by sqrt(m / n); here its RMS is 0.2, as all arms' is.
    """

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """See `MatrixRival.direction`."""
        batch, m, n = grad_BMN.shape
        rank = max(1, math.ceil(group["rank_fraction"] * min(m, n)))
        if "q" not in memory:
            generator = torch.Generator().manual_seed(0)
            start_BNR = torch.randn(batch, n, rank, generator=generator).to(momentum_BMN)
            memory["q"] = _unit_columns(start_BNR)
        b_BMN = momentum_BMN + grad_BMN
        p_BMR = torch.linalg.qr(b_BMN @ memory["q"]).Q
        r_BNR = b_BMN.mT @ p_BMR
        momentum_BMN.copy_(b_BMN - (1 - group["momentum"]) * p_BMR @ r_BNR.mT)
        memory["q"] = _unit_columns(r_BNR)
        return with_adamw_rms(p_BMR @ memory["q"].mT)


def _unit_columns(x_BNR: Tensor) -> Tensor:
    norm_B1R = torch.linalg.vector_norm(x_BNR, dim=-2, keepdim=True)
    return torch.where(norm_B1R == 0, 0.0, x_BNR / norm_B1R)
