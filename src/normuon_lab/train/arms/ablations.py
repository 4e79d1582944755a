"""The paper's ablations of NorMuon (its Fig. 3 and 7): where and how the update is normalised.

All take Nesterov momentum, five `jordan` steps and NorMuon's step size, so that nothing differs but
the normalisation. O is the orthogonalised direction, v and V are second moments with decay b2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normuon.step import rule
from normuon.step.normalizer import Factor, NeuronNormalizer, Normalizer, Vectors
from normuon_lab.train.arms.matrix_rival import (
    MatrixRival,
    Memory,
    adamw_rms_scale,
    advanced_momentum_,
    orthogonalized,
    with_adamw_rms,
)

EPS = 1e-8


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


class NormalizedRival(MatrixRival):
    """A rival that differs from NorMuon only in what follows the orthogonalisation.

    That is a `normuon.step.normalizer.Normalizer`, the same kind of object that NorMuon steps with.
    """

    def normalizer(self, m: int, n: int, group: dict[str, Any]) -> Normalizer:
        """The normalizer of m x n matrices."""
        raise NotImplementedError

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """See `MatrixRival.direction`."""
        o_BMN = orthogonalized(advanced_momentum_(grad_BMN, momentum_BMN, group["momentum"]))
        batch, m, n = o_BMN.shape
        normalizer = self.normalizer(m, n, group)
        for name, dim in normalizer.state_dims(m, n).items():
            memory.setdefault(name, o_BMN.new_zeros(batch, o_BMN.shape[dim]))
        state, summary = normalizer.update(o_BMN, memory)
        memory.update(state)
        for dim, factor_BV in normalizer.factors(state, summary, (m, n)):
            o_BMN = o_BMN * (factor_BV[:, :, None] if dim == -2 else factor_BV[:, None, :])
        return o_BMN * normalizer.constant(m, n)


class NorMuonTall(NormalizedRival):
    """NorMuon on matrices with more rows than columns, plain orthogonalised steps on the rest."""

    def normalizer(self, m: int, n: int, group: dict[str, Any]) -> Normalizer:
        """NorMuon's, or one scale for the whole matrix."""
        if m <= n:
            return FixedNorm()
        return NeuronNormalizer(
            beta2=group["beta2"], eps=EPS, adjust_lr_fn="match_rms_adamw", neuron_axis="row"
        )


class FrobeniusMuon(NormalizedRival):
    """Muon with every step scaled to the same Frobenius norm, and no second moments."""

    def normalizer(self, m: int, n: int, group: dict[str, Any]) -> Normalizer:
        """One scale for the whole matrix."""
        return FixedNorm()


@dataclass(frozen=True, slots=True)
class FixedNorm:
    """Every matrix's step has an RMS of 0.2, and nothing is remembered: a `Normalizer`."""

    def state_dims(self, m: int, n: int) -> Mapping[str, int]:
        """None."""
        return {}

    def summary_dims(self, m: int, n: int) -> Mapping[str, int | None]:
        """The scale of the whole matrix."""
        return {"scale": None}

    def update(self, o_BMN: Tensor, state: Vectors) -> tuple[Vectors, Vectors]:
        """``0.2 sqrt(m n) / ||O||_F``, 0 for a zero matrix."""
        return {}, {"scale": adamw_rms_scale(o_BMN)[:, :, 0]}

    def factors(self, state: Vectors, summary: Vectors, shape: tuple[int, int]) -> list[Factor]:
        """The scale, for every row."""
        return [(-2, summary["scale"])]

    def constant(self, m: int, n: int) -> float:
        """1."""
        return 1.0
