"""RMNP: momentum whose rows are normalised instead of orthogonalised."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normuon_lab.train.arms.matrix_rival import (
    MatrixRival,
    Memory,
    advanced_momentum_,
    with_adamw_rms,
)


class RowMomentum(MatrixRival):
    """RMNP: momentum with every row normalised, and no orthogonalisation; the cheapest rival.

    ``D = diag(M M^T)^(-1/2) M``, scaled as all arms are. A zero row stays zero.
    """

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """See `MatrixRival.direction`."""
        ahead_BMN = advanced_momentum_(grad_BMN, momentum_BMN, group["momentum"])
        norm_BM1 = torch.linalg.vector_norm(ahead_BMN, dim=-1, keepdim=True)
        return with_adamw_rms(torch.where(norm_BM1 == 0, 0.0, ahead_BMN / norm_BM1))
