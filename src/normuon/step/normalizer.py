"""What follows the orthogonalisation: which factors its rows and columns are multiplied by.

To try another rule, write another class like those here and name it in `normalizer_of`. The vectors
that it keeps become optimizer state, sharded, checkpointed and brought to whole matrices and back
by whatever layout the parameters have.

Shapes: K matrices, or pieces of R rows and C columns of them. A vector along dim -2 has one entry
per row, ``[K, R]``; along dim -1 one per column, ``[K, C]``; along None one in all, ``[K, 1]``.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from normuon.orthogonalize.fused import runs_fused
from normuon.step import rule
from normuon.step.fused_neurons import factors_fused, neurons_fused
from normuon.step.rule import AdjustLrFn, NeuronAxis

Vectors = dict[str, Tensor]
"""Vectors by name."""

Factor = tuple[int, Tensor]
"""What rows (-2) or columns (-1) are multiplied by: ``[K, R]`` or ``[K, C]``."""


T = TypeVar("T")

Program = Generator[Any, None, T]
"""Yields what it wants to be exchanged, and returns its result."""

Total = Callable[[Tensor], Program[Tensor]]
"""The sum of a tensor over the slabs of a matrix."""


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


@runtime_checkable
class DividedNormalizer(Normalizer, Protocol):
    """One whose statistics are sums, so that several ranks can each have a slab of a matrix."""

    num_totals: int
    """How often `update_slab` sums over slabs."""

    def update_slab(
        self, o_BMN: Tensor, state: Vectors, *, shape: tuple[int, int], cut: int, total: Total
    ) -> Program[tuple[Vectors, Vectors]]:
        """`update` of one slab of each matrix.

        Args:
            o_BMN: the slabs.
            state: as for `update`, of vectors along the dim that is cut the slab's entries only.
            shape: m and n of the whole matrices.
            cut: the dim that is cut, -2 or -1.
            total: to sum over slabs.
        """


@dataclass(frozen=True, slots=True)
class NeuronNormalizer:
    """NorMuon's: every neuron moves alike, and the step's RMS is set (Alg. 1, lines 4 to 6).

    Args:
        beta2: b2.
        eps: added to sqrt(v).
        adjust_lr_fn: see `rule.step_scale`.
        neuron_axis: see `rule.neuron_dim`.
        fused: False for torch's operations where Triton kernels would run.
        num_totals: see `DividedNormalizer`.
    """

    beta2: float
    eps: float
    adjust_lr_fn: AdjustLrFn
    neuron_axis: NeuronAxis
    fused: bool | None = None
    num_totals: int = 1

    def state_dims(self, m: int, n: int) -> Mapping[str, int]:
        """One second moment per neuron."""
        return {"second_momentum_buffer": rule.neuron_dim(m, n, self.neuron_axis)}

    def summary_dims(self, m: int, n: int) -> Mapping[str, int | None]:
        """Line 6's scale of the whole matrix."""
        return {"scale": None}

    def update(self, o_BMN: Tensor, state: Vectors) -> tuple[Vectors, Vectors]:
        """``v`` and ``0.2 sqrt(m n) / ||Oh||_F``."""
        shape = (o_BMN.shape[-2], o_BMN.shape[-1])
        if self.fused is not False and runs_fused(o_BMN, state["second_momentum_buffer"]):
            return self._update_by_kernel(o_BMN, state["second_momentum_buffer"], shape)
        v_BV, sums = self._moments(self._mean_square(o_BMN, shape), state)
        return self._found(v_BV, sums, shape)

    def _update_by_kernel(
        self, o_BMN: Tensor, v_BV: Tensor, shape: tuple[int, int]
    ) -> tuple[Vectors, Vectors]:
        """`update` in two launches."""
        dim = rule.neuron_dim(*shape, self.neuron_axis)
        new_BV, scale_B1 = neurons_fused(
            rule.norm_per_neuron(o_BMN, dim=dim),
            v_BV,
            shape=shape,
            beta2=self.beta2,
            eps=self.eps,
            adjust_lr_fn=self.adjust_lr_fn,
        )
        return {"second_momentum_buffer": new_BV}, {"scale": scale_B1}

    def update_slab(
        self, o_BMN: Tensor, state: Vectors, *, shape: tuple[int, int], cut: int, total: Total
    ) -> Program[tuple[Vectors, Vectors]]:
        """See `DividedNormalizer`: either the neurons or the inputs of each are divided."""
        neurons_are_cut = cut == rule.neuron_dim(*shape, self.neuron_axis)
        mean_square_BV = self._mean_square(o_BMN, shape)
        if not neurons_are_cut:
            mean_square_BV = yield from total(mean_square_BV)
        v_BV, sums = self._moments(mean_square_BV, state)
        if neurons_are_cut:
            sums = list((yield from total(torch.stack(sums))).unbind(0))
        return self._found(v_BV, sums, shape)

    def _mean_square(self, o_BMN: Tensor, shape: tuple[int, int]) -> Tensor:
        dim = rule.neuron_dim(*shape, self.neuron_axis)
        return rule.mean_square_per_neuron(
            o_BMN, dim=dim, num_inputs=shape[1] if dim == -2 else shape[0]
        )

    def _moments(self, mean_square_BV: Tensor, state: Vectors) -> tuple[Tensor, list[Tensor]]:
        v_BV = rule.update_second_moment(
            state["second_momentum_buffer"], mean_square_BV, beta2=self.beta2
        )
        scale_BV = rule.neuron_scale(v_BV, eps=self.eps)
        return v_BV, rule.neuron_sums(mean_square_BV, scale_BV, adjust_lr_fn=self.adjust_lr_fn)

    def _found(
        self, v_BV: Tensor, sums: list[Tensor], shape: tuple[int, int]
    ) -> tuple[Vectors, Vectors]:
        m, n = shape
        num_neurons = m if rule.neuron_dim(m, n, self.neuron_axis) == -2 else n
        scale_B = rule.step_scale(
            sums, m=m, n=n, num_neurons=num_neurons, adjust_lr_fn=self.adjust_lr_fn
        )
        return {"second_momentum_buffer": v_BV}, {"scale": scale_B.to(v_BV.dtype)[:, None]}

    def factors(self, state: Vectors, summary: Vectors, shape: tuple[int, int]) -> list[Factor]:
        """``0.2 sqrt(m n) / ||Oh||_F / (sqrt(v) + eps)`` for each neuron."""
        dim = rule.neuron_dim(*shape, self.neuron_axis)
        v_KV, scale_K1 = state["second_momentum_buffer"], summary["scale"]
        if self.fused is not False and runs_fused(v_KV):
            return [(dim, factors_fused(v_KV, scale_K1, eps=self.eps))]
        scale_KV = rule.neuron_scale(v_KV, eps=self.eps)
        return [(dim, scale_KV * scale_K1)]

    def constant(self, m: int, n: int) -> float:
        """1: the whole matrix's scale is in the neurons' factors."""
        return 1.0


@dataclass(frozen=True, slots=True)
class ConstantScale:
    """Muon's: one factor for the whole matrix, which its shape gives."""

    adjust_lr_fn: AdjustLrFn
    num_totals: int = 0

    def state_dims(self, m: int, n: int) -> Mapping[str, int]:
        """None."""
        return {}

    def summary_dims(self, m: int, n: int) -> Mapping[str, int | None]:
        """None."""
        return {}

    def update(self, o_BMN: Tensor, state: Vectors) -> tuple[Vectors, Vectors]:
        """Nothing."""
        return {}, {}

    def update_slab(
        self, o_BMN: Tensor, state: Vectors, *, shape: tuple[int, int], cut: int, total: Total
    ) -> Program[tuple[Vectors, Vectors]]:
        """Nothing."""
        yield from ()
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
        fused=group["fused"],
    )
