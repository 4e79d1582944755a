"""The paper's ablations of NorMuon (its Fig. 3 and 7): where and how the update is normalised.

All take Nesterov momentum, five `jordan` steps and NorMuon's step size, so that nothing differs but
the normalisation. O is the orthogonalised direction, v and V are second moments with decay b2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normuon.orthogonalize import orthogonalize, resolve_coefficients, resolve_ns_dtype
from normuon.step import rule
from normuon_lab.rivals.matrix_rival import MatrixRival, Memory, advanced_momentum_, with_adamw_rms

EPS = 1e-8
COEFFICIENTS = resolve_coefficients("jordan", 5)


def orthogonalized(x_BMN: Tensor) -> Tensor:
    """NS(X), in the dtype that NorMuon would choose, back in at least float32."""
    dtype = resolve_ns_dtype(None, param_dtype=x_BMN.dtype, device=x_BMN.device)
    o_BMN = orthogonalize(x_BMN, coefficients=COEFFICIENTS, dtype=dtype)
    return o_BMN.to(torch.promote_types(x_BMN.dtype, torch.float32))


def _second_moment(memory: Memory, square: Tensor, beta2: float) -> Tensor:
    old = memory.get("v")
    memory["v"] = rule.update_second_moment(
        torch.zeros_like(square) if old is None else old, square, beta2=beta2
    )
    return memory["v"]


class MuonAdam(MatrixRival):
    """Muon + Adam: one second moment per entry, after the orthogonalisation.

    ``V <- b2 V + (1 - b2) O * O``, ``D = O / (sqrt(V) + eps)``. Two full states.
    """

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """See `MatrixRival.direction`."""
        o_BMN = orthogonalized(advanced_momentum_(grad_BMN, momentum_BMN, group["momentum"]))
        v_BMN = _second_moment(memory, o_BMN.square(), group["beta2"])
        return with_adamw_rms(o_BMN / (v_BMN.sqrt() + EPS))


class NorMuonFront(MatrixRival):
    """Normalisation in front: each neuron of the momentum is scaled, then it is orthogonalised.

    ``v <- b2 v + (1 - b2) mean_cols(M * M)``, ``D = NS(M / (sqrt(v) + eps))``.
    """

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """See `MatrixRival.direction`."""
        ahead_BMN = advanced_momentum_(grad_BMN, momentum_BMN, group["momentum"])
        # Divided by its largest entry, which NS divides out again: eps is then relative.
        largest_B11 = ahead_BMN.abs().amax((-2, -1), keepdim=True)
        mean_square_BM = rule.mean_square_per_neuron(ahead_BMN, dim=-2)
        v_BM = _second_moment(memory, mean_square_BM, group["beta2"])
        scaled_BMN = ahead_BMN / (v_BM.sqrt()[..., None] + EPS * largest_B11)
        return with_adamw_rms(orthogonalized(torch.nan_to_num(scaled_BMN)))


class NorMuonTall(MatrixRival):
    """NorMuon on matrices with more rows than columns, plain orthogonalised steps on the rest."""

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """See `MatrixRival.direction`."""
        o_BMN = orthogonalized(advanced_momentum_(grad_BMN, momentum_BMN, group["momentum"]))
        if o_BMN.shape[-2] <= o_BMN.shape[-1]:
            return with_adamw_rms(o_BMN)
        mean_square_BM = rule.mean_square_per_neuron(o_BMN, dim=-2)
        v_BM = _second_moment(memory, mean_square_BM, group["beta2"])
        return with_adamw_rms(o_BMN * rule.neuron_scale(v_BM, eps=EPS)[..., None])


class FrobeniusMuon(MatrixRival):
    """Muon with every step scaled to the same Frobenius norm, and no second moments."""

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """See `MatrixRival.direction`."""
        return with_adamw_rms(
            orthogonalized(advanced_momentum_(grad_BMN, momentum_BMN, group["momentum"]))
        )
