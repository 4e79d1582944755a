"""MuonEq in its row form (Chang et al. 2026, arXiv 2603.28254): rows are evened before Muon's step.

The variant called R, the paper's default. It divides the rows alone; what `equilibrate` of the
library does to rows and columns is a gentler form of the paper's variant RC.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normuon_lab.train.arms.matrix_rival import (
    MatrixRival,
    Memory,
    advanced_momentum_,
    muon_scale,
    orthogonalized,
)


class MuonEqRows(MatrixRival):
    """MuonEq (R): every row of the momentum has norm 1 when it is orthogonalised.

    ``D = 0.2 sqrt(max(m, n)) NS(diag(M M^T)^(-1/2) M)``, M the momentum with Nesterov's look ahead.

    Differs: the authors add 1e-8 to a row's sum of squares; here a row of zeros stays zero, and
    the step does not depend on the gradient's scale.
    """

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """See `MatrixRival.direction`."""
        ahead_BMN = advanced_momentum_(grad_BMN, momentum_BMN, group["momentum"])
        norm_BM1 = torch.linalg.vector_norm(ahead_BMN, dim=-1, keepdim=True)
        even_BMN = torch.where(norm_BM1 == 0, 0.0, ahead_BMN / norm_BM1)
        return muon_scale(even_BMN) * orthogonalized(even_BMN)
