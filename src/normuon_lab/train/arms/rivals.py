"""Optimizers that NorMuon is compared with and that no library ships, for hidden matrices.

Most say only which direction a batch of matrices moves in. Their steps have an RMS of 0.2 times the
learning rate, the size of an AdamW step and of NorMuon's, so that learning rates compare. Those
that act on the weights themselves say what the weights become.
Shapes as in `normuon.step.rule`: B matrices of M rows (neurons) and N columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normuon import MatrixView
from normuon.orthogonalize import orthogonalize, resolve_coefficients, resolve_ns_dtype
from normuon.step import rule
from normuon.step.normalizer import NeuronNormalizer

COEFFICIENTS = resolve_coefficients("jordan", 5)
EPS = 1e-8


@dataclass(frozen=True, slots=True)
class Block:
    """A batch of equal matrices of one parameter: what a rival sees of it at a step.

    Attributes:
        weights_BMN: before the step; not written to.
        grad_BMN: gradients; not written to.
        momentum_BMN: the momentum; written to.
        memory: what the rival remembers of the block besides its momentum; written to.
        group: the param group.
    """

    weights_BMN: Tensor
    grad_BMN: Tensor
    momentum_BMN: Tensor
    memory: dict[str, Tensor]
    group: dict[str, Any]

    def advance_(self, grad_BMN: Tensor) -> Tensor:
        """Advance the momentum (Alg. 1, line 2), and look ahead as all Muon-like arms do."""
        beta = self.group["momentum"]
        seen_BMN = grad_BMN.to(self.momentum_BMN.dtype)
        rule.update_momenta_([self.momentum_BMN], [seen_BMN], momentum_beta=beta)
        ahead_BMN = torch.empty_like(self.momentum_BMN)
        rule.look_ahead_([ahead_BMN], [self.momentum_BMN], [seen_BMN], momentum_beta=beta)
        return ahead_BMN

    def second_moment_(self, square: Tensor) -> Tensor:
        """Advance the moving average ``v <- b2 v + (1 - b2) square``."""
        old = self.memory.get("v")
        self.memory["v"] = rule.update_second_moment(
            torch.zeros_like(square) if old is None else old, square, beta2=self.group["beta2"]
        )
        return self.memory["v"]


class MatrixRival(Optimizer):
    """Base of the rivals: ``W <- W - lr wd W - lr D``, D from `of_block`.

    Args:
        params: param groups as `normuon.param_groups` gives them for hidden matrices; a group's
            ``view`` says how its parameters become matrices.
        lr: learning rate.
        weight_decay: decoupled, multiplied by lr.
        momentum: b1 of ``M <- b1 M + (1 - b1) G``.
        options: what the rival itself takes; read from the group at every step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        **options: Any,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, **options}
        super().__init__(params, defaults)

    def of_block(self, block: Block) -> Tensor:
        """The direction D of a block, ``[B, M, N]``, of RMS 0.2; advances the momentum."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One optimisation step of every parameter with a gradient."""
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._apply(param, self._by_block(param, group), group)

    def _apply(self, param: Tensor, found: Tensor, group: dict[str, Any]) -> None:
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(found, alpha=group["lr"])

    def _by_block(self, param: Tensor, group: dict[str, Any]) -> Tensor:
        """What `of_block` finds, block by block, in the parameter's own layout."""
        assert param.grad is not None
        view = group.get("view") or MatrixView.linear()
        parts = view.parts(param.shape)
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
            state["memories"] = [{} for _ in parts]
        found = torch.empty_like(param)
        for part, memory in zip(parts, state["memories"], strict=True):
            buffer = view.native(state["momentum_buffer"], part)
            momentum_BMN = buffer.reshape(part.batch, part.m, part.n)
            weights_BMN, grad_BMN = view.matrices(param, part), view.matrices(param.grad, part)
            found_BMN = self.of_block(Block(weights_BMN, grad_BMN, momentum_BMN, memory, group))
            buffer.copy_(momentum_BMN.reshape(buffer.shape))  # Where reshaping had to copy.
            native = view.native(found, part)
            native.copy_(found_BMN.reshape(native.shape))
        return found


class WeightRival(MatrixRival):
    """Base of rivals whose step depends on the weights: `of_block` gives the new weights.

    Weight decay is theirs, too, if they have one.
    """

    def _apply(self, param: Tensor, found: Tensor, group: dict[str, Any]) -> None:
        param.copy_(found)


class MuonAdam(MatrixRival):
    """Muon + Adam: one second moment per entry, after the orthogonalisation (an ablation).

    ``V <- b2 V + (1 - b2) O * O``, ``D = O / (sqrt(V) + eps)``. Two full states. As in the paper's
    other ablations (its Fig. 3 and 7), O is the direction after five `jordan` steps, and nothing
    but the normalisation differs from NorMuon.
    """

    def of_block(self, block: Block) -> Tensor:
        o_BMN = orthogonalized(block.advance_(block.grad_BMN))
        return with_adamw_rms(o_BMN / (block.second_moment_(o_BMN.square()).sqrt() + EPS))


class NorMuonFront(MatrixRival):
    """Normalisation in front: each neuron of the momentum is scaled, then it is orthogonalised.

    ``v <- b2 v + (1 - b2) mean_cols(M * M)``, ``D = NS(M / (sqrt(v) + eps))``.
    """

    def of_block(self, block: Block) -> Tensor:
        ahead_BMN = block.advance_(block.grad_BMN)
        # Divided by its largest entry, which NS divides out again: eps is then relative.
        largest_B11 = ahead_BMN.abs().amax((-2, -1), keepdim=True)
        v_BM = block.second_moment_(rule.mean_square_per_neuron(ahead_BMN, dim=-2))
        scaled_BMN = ahead_BMN / (v_BM.sqrt()[..., None] + EPS * largest_B11)
        return with_adamw_rms(orthogonalized(torch.nan_to_num(scaled_BMN)))


class FrobeniusMuon(MatrixRival):
    """Muon with every step scaled to the same Frobenius norm, and no second moments."""

    def of_block(self, block: Block) -> Tensor:
        return with_adamw_rms(orthogonalized(block.advance_(block.grad_BMN)))


class NorMuonTall(MatrixRival):
    """NorMuon on matrices with more rows than columns, `FrobeniusMuon` on the rest."""

    def of_block(self, block: Block) -> Tensor:
        o_BMN = orthogonalized(block.advance_(block.grad_BMN))
        batch, m, n = o_BMN.shape
        if m <= n:
            return with_adamw_rms(o_BMN)
        # The library's own, with which it must agree.
        normalizer = NeuronNormalizer(
            beta2=block.group["beta2"], eps=EPS, adjust_lr_fn="match_rms_adamw", neuron_axis="row"
        )
        for name, dim in normalizer.state_dims(m, n).items():
            block.memory.setdefault(name, o_BMN.new_zeros(batch, o_BMN.shape[dim]))
        state, summary = normalizer.update(o_BMN, block.memory)
        block.memory.update(state)
        for dim, factor_BV in normalizer.factors(state, summary, (m, n)):
            o_BMN = o_BMN * (factor_BV[:, :, None] if dim == -2 else factor_BV[:, None, :])
        return o_BMN * normalizer.constant(m, n)


class Dion(MatrixRival):
    """Dion (Ahn et al. 2025, arXiv 2504.05295, Algorithm 1): a low-rank orthonormal update.

    One power iteration on the momentum, from the right factor of the step before, replaces
    Newton-Schulz; what the rank, ``rank_fraction min(m, n)`` and at least 1, cannot hold stays in
    the momentum::

        B = M + G
        P = orthonormal columns of B Q                     QR
        R = B^T P
        M = B - (1 - mu) P R^T                             error feedback
        Q = R, each column divided by its norm
        D = P Q^T

    Differs: the paper multiplies the step by sqrt(m / n); here its RMS is 0.2, as all arms' is.
    """

    def of_block(self, block: Block) -> Tensor:
        batch, m, n = block.grad_BMN.shape
        rank = max(1, math.ceil(block.group["rank_fraction"] * min(m, n)))
        if "q" not in block.memory:
            generator = torch.Generator().manual_seed(0)
            start_BNR = torch.randn(batch, n, rank, generator=generator).to(block.momentum_BMN)
            block.memory["q"] = _ratio(start_BNR, _norm(start_BNR, -2))
        b_BMN = block.momentum_BMN + block.grad_BMN
        p_BMR = torch.linalg.qr(b_BMN @ block.memory["q"]).Q
        r_BNR = b_BMN.mT @ p_BMR
        block.momentum_BMN.copy_(b_BMN - (1 - block.group["momentum"]) * p_BMR @ r_BNR.mT)
        block.memory["q"] = _ratio(r_BNR, _norm(r_BNR, -2))
        return with_adamw_rms(p_BMR @ block.memory["q"].mT)


class RowMomentum(MatrixRival):
    """RMNP: momentum with every row normalised, and no orthogonalisation; the cheapest rival.

    ``D = diag(M M^T)^(-1/2) M``, scaled as all arms are. A zero row stays zero.
    """

    def of_block(self, block: Block) -> Tensor:
        ahead_BMN = block.advance_(block.grad_BMN)
        return with_adamw_rms(_ratio(ahead_BMN, _norm(ahead_BMN, -1)))


class MuonEqRows(MatrixRival):
    """MuonEq (R) (Chang et al. 2026, arXiv 2603.28254): rows have norm 1 when orthogonalised.

    ``D = 0.2 sqrt(max(m, n)) NS(diag(M M^T)^(-1/2) M)``, M the momentum with Nesterov's look ahead.
    R is the paper's default. What `equilibrate` of the library does to rows and columns is a
    gentler form of its variant RC.

    Differs: the authors add 1e-8 to a row's sum of squares; here a row of zeros stays zero, and
    the step does not depend on the gradient's scale.
    """

    def of_block(self, block: Block) -> Tensor:
        ahead_BMN = block.advance_(block.grad_BMN)
        even_BMN = _ratio(ahead_BMN, _norm(ahead_BMN, -1))
        return muon_scale(even_BMN) * orthogonalized(even_BMN)


class Hyperball(WeightRival):
    """Muon Hyperball (Wen et al. 2026, arXiv 2606.16899): fixed norms of weights and of steps.

    ::

        U = NS(M)                                M with Nesterov's look ahead
        W = R unit(W - lr R unit(U))             unit(X) = X / ||X||_F, R = ||W_0||_F

    There is no weight decay. The learning rate is relative to the weights: a step has the norm
    ``lr R``, whatever ``0.2 lr`` would be. A matrix that starts at zero stays there.
    """

    def of_block(self, block: Block) -> Tensor:
        weights_BMN = _wide(block.weights_BMN)
        if "radius" not in block.memory:
            block.memory["radius"] = _norm(weights_BMN, -2, -1)
        radius_B11 = block.memory["radius"]
        o_BMN = orthogonalized(block.advance_(block.grad_BMN))
        step_BMN = radius_B11 * _ratio(o_BMN, _norm(o_BMN, -2, -1))
        moved_BMN = weights_BMN - block.group["lr"] * step_BMN
        return radius_B11 * _ratio(moved_BMN, _norm(moved_BMN, -2, -1))


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

    def of_block(self, block: Block) -> Tensor:
        memory, group, weights_BMN = block.memory, block.group, _wide(block.weights_BMN)
        if not memory:
            norm_BM1 = _norm(weights_BMN, -1)
            memory["magnitude"], memory["direction_norm"] = norm_BM1, norm_BM1
            memory["mean"], memory["square"] = 2 * [torch.zeros_like(norm_BM1)]
            memory["step"] = norm_BM1.new_zeros(())
        g_BM1, v_norm_BM1 = memory["magnitude"], memory["direction_norm"]
        unit_BMN = _ratio(weights_BMN, g_BM1)
        seen_BMN = block.grad_BMN.to(weights_BMN.dtype)
        grad_g_BM1 = (seen_BMN * unit_BMN).sum(-1, keepdim=True)
        grad_v_BMN = _ratio(g_BM1, v_norm_BM1) * (seen_BMN - grad_g_BM1 * unit_BMN)
        ahead_BMN = block.advance_(grad_v_BMN)
        step_BMN = muon_scale(ahead_BMN) * orthogonalized(ahead_BMN)
        v_BMN = v_norm_BM1 * unit_BMN - group["lr"] * step_BMN
        g_BM1 = g_BM1 - group["lr"] * _adam_direction(grad_g_BM1, memory, group["betas"])
        memory["direction_norm"] = _norm(v_BMN, -1)
        composed_BMN = g_BM1 * _ratio(v_BMN, memory["direction_norm"])
        decay = group["lr"] * group["weight_decay"]
        decayed_BMN = composed_BMN - decay * weights_BMN
        memory["magnitude"] = _norm(decayed_BMN, -1) if decay else g_BM1
        return decayed_BMN


def _adam_direction(
    grad_BM1: Tensor, memory: dict[str, Tensor], betas: tuple[float, float]
) -> Tensor:
    memory["step"] = memory["step"] + 1
    memory["mean"] = torch.lerp(grad_BM1, memory["mean"], betas[0])
    memory["square"] = torch.lerp(grad_BM1.square(), memory["square"], betas[1])
    mean_BM1 = memory["mean"] / (1 - betas[0] ** memory["step"])
    square_BM1 = memory["square"] / (1 - betas[1] ** memory["step"])
    return mean_BM1 / (square_BM1.sqrt() + EPS)


def _norm(x: Tensor, *dim: int) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return norm


def _ratio(x: Tensor | float, norm: Tensor) -> Tensor:
    """``x / norm``, 0 where the norm is."""
    return torch.where(norm == 0, 0.0, x / norm)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def orthogonalized(x_BMN: Tensor) -> Tensor:
    """NS(X), in the dtype that NorMuon would choose, back in at least float32."""
    dtype = resolve_ns_dtype(None, param_dtype=x_BMN.dtype, device=x_BMN.device)
    o_BMN = orthogonalize(x_BMN, coefficients=COEFFICIENTS, dtype=dtype)
    return o_BMN.to(torch.promote_types(x_BMN.dtype, torch.float32))


def with_adamw_rms(direction_BMN: Tensor) -> Tensor:
    """Each matrix scaled to an RMS of 0.2 (Alg. 1, line 6); zero stays zero.

    Example:
        >>> with_adamw_rms(torch.tensor([[[3.0, 4.0]]]))
        tensor([[[0.1697, 0.2263]]])
    """
    entries = direction_BMN.shape[-2] * direction_BMN.shape[-1]
    norm_B11 = _norm(direction_BMN, -2, -1)
    return direction_BMN * _ratio(rule.ADAMW_RMS * entries**0.5, norm_B11)


def muon_scale(x_BMN: Tensor) -> float:
    """``0.2 sqrt(max(m, n))``, which brings an orthogonal m x n matrix to an RMS of 0.2: Muon's.

    Example:
        >>> muon_scale(torch.ones(1, 4, 25))
        1.0
    """
    m, n = x_BMN.shape[-2:]
    return rule.muon_step_scale(m=m, n=n, adjust_lr_fn="match_rms_adamw")
