"""What follows the orthogonalisation: which factors its rows and columns are multiplied by.

To try another rule, write another class like those here and name it in `normalizer_of`. The vectors
that it keeps become optimizer state, sharded, checkpointed and brought to whole matrices and back
by whatever layout the parameters have.

Shapes: K matrices, or pieces of R rows and C columns of them. A vector along dim -2 has one entry
per row, ``[K, R]``; along dim -1 one per column, ``[K, C]``; along None one in all, ``[K, 1]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from normuon.step import rule
from normuon.step.rule import AdjustLrFn, NeuronAxis

Vectors = dict[str, Tensor]
"""Vectors by name."""

Factor = tuple[int, Tensor]
"""What rows (-2) or columns (-1) are multiplied by: ``[K, R]`` or ``[K, C]``."""


class Normalizer(Protocol):
    """Lines 4 to 6 of Algorithm 1, or what another optimizer has in their place.

    `update` sees whole matrices. `factors` sees pieces, with the entries of vectors that they span.
    """

    def state_dims(self, m: int, n: int) -> Mapping[str, int]:
        """The vectors of an m x n matrix's state, and the dim, -2 or -1, that each lies along."""

    def summary_dims(self, m: int, n: int) -> Mapping[str, int | None]:
        """What else `update` finds and `factors` needs, and the dim that it lies along."""

    def update(self, o_BMN: Tensor, state: Vectors) -> tuple[Vectors, Vectors]:
        """The new state and the summary, from orthogonalised directions and the old state.

        Args:
            o_BMN: whole matrices; not written to.
            state: the vectors of `state_dims`, in at least float32; not written to.
        """

    def factors(self, state: Vectors, summary: Vectors, shape: tuple[int, int]) -> list[Factor]:
        """What to multiply O by: the step is O times these, `constant` and the learning rate.

        Args:
            state: the new one, or a piece's part of it.
            summary: of `update`, or a piece's part of it.
            shape: m and n of the whole matrices.
        """

    def constant(self, m: int, n: int) -> float:
        """A factor that only depends on the shape of the whole matrix."""


@dataclass(frozen=True, slots=True)
class NeuronNormalizer:
    """NorMuon's: every neuron moves alike, and the step's RMS is set (Alg. 1, lines 4 to 6)."""

    beta2: float
    eps: float
    adjust_lr_fn: AdjustLrFn
    neuron_axis: NeuronAxis

    def state_dims(self, m: int, n: int) -> Mapping[str, int]:
        """One second moment per neuron."""
        return {"second_momentum_buffer": rule.neuron_dim(m, n, self.neuron_axis)}

    def summary_dims(self, m: int, n: int) -> Mapping[str, int | None]:
        """Line 6's scale of the whole matrix."""
        return {"scale": None}

    def update(self, o_BMN: Tensor, state: Vectors) -> tuple[Vectors, Vectors]:
        """``v`` and ``0.2 sqrt(m n) / ||Oh||_F``."""
        _, m, n = o_BMN.shape
        dim = rule.neuron_dim(m, n, self.neuron_axis)
        mean_square_BV = rule.mean_square_per_neuron(o_BMN, dim=dim)
        v_BV = rule.update_second_moment(
            state["second_momentum_buffer"], mean_square_BV, beta2=self.beta2
        )
        scale_B = rule.step_scale(
            mean_square_BV,
            rule.neuron_scale(v_BV, eps=self.eps),
            m=m,
            n=n,
            adjust_lr_fn=self.adjust_lr_fn,
        )
        return {"second_momentum_buffer": v_BV}, {"scale": scale_B.to(v_BV.dtype)[:, None]}

    def factors(self, state: Vectors, summary: Vectors, shape: tuple[int, int]) -> list[Factor]:
        """``0.2 sqrt(m n) / ||Oh||_F / (sqrt(v) + eps)`` for each neuron."""
        scale_KV = rule.neuron_scale(state["second_momentum_buffer"], eps=self.eps)
        dim = rule.neuron_dim(*shape, self.neuron_axis)
        return [(dim, scale_KV * summary["scale"])]

    def constant(self, m: int, n: int) -> float:
        """1: the whole matrix's scale is in the neurons' factors."""
        return 1.0


@dataclass(frozen=True, slots=True)
class ConstantScale:
    """Muon's: one factor for the whole matrix, which its shape gives."""

    adjust_lr_fn: AdjustLrFn

    def state_dims(self, m: int, n: int) -> Mapping[str, int]:
        """None."""
        return {}

    def summary_dims(self, m: int, n: int) -> Mapping[str, int | None]:
        """None."""
        return {}

    def update(self, o_BMN: Tensor, state: Vectors) -> tuple[Vectors, Vectors]:
        """Nothing."""
        return {}, {}

    def factors(self, state: Vectors, summary: Vectors, shape: tuple[int, int]) -> list[Factor]:
        """None."""
        return []

    def constant(self, m: int, n: int) -> float:
        """As torch.optim.Muon has it."""
        return rule.muon_step_scale(m=m, n=n, adjust_lr_fn=self.adjust_lr_fn)


def normalizer_of(group: Mapping[str, Any]) -> Normalizer:
    """The normalizer of a `normuon` or `muon` param group, as the group stands now."""
    if group["algorithm"] == "muon":
        return ConstantScale(group["adjust_lr_fn"])
    return NeuronNormalizer(
        beta2=group["beta2"],
        eps=group["eps"],
        adjust_lr_fn=group["adjust_lr_fn"],
        neuron_axis=group["neuron_axis"],
    )
