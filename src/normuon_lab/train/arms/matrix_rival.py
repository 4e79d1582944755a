"""What every rival shares: matrices of parameters, momentum, decay, and one step size for all.

Most say only which direction a batch of matrices moves in. Their steps have an RMS of 0.2 times the
learning rate, the size of an AdamW step and of NorMuon's, so that learning rates compare. Those
that act on the weights themselves say what the weights become.
Shapes as in `normuon.step.rule`: B matrices of M rows (neurons) and N columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normuon import MatrixView
from normuon.orthogonalize import orthogonalize, resolve_coefficients, resolve_ns_dtype
from normuon.step import rule

COEFFICIENTS = resolve_coefficients("jordan", 5)

Memory = dict[str, Tensor]
"""What a rival remembers of one block of a parameter, besides its momentum."""


class MatrixRival(Optimizer):
    """Base of the rivals: ``W <- W - lr wd W - lr D``, D from `direction`.

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

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One optimisation step of every parameter with a gradient."""
        for group in self.param_groups:
            view = group.get("view") or MatrixView.linear()
            for param in group["params"]:
                if param.grad is not None:
                    self._apply(param, self._by_block(param, view, group), group)

    def _apply(self, param: Tensor, found: Tensor, group: dict[str, Any]) -> None:
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.sub_(found, alpha=group["lr"])

    def _by_block(self, param: Tensor, view: MatrixView, group: dict[str, Any]) -> Tensor:
        """What `_of_block` finds, block by block, in the parameter's own layout."""
        assert param.grad is not None
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
            state["memories"] = [{} for _ in view.parts(param.shape)]
        found = torch.empty_like(param)
        for part, memory in zip(view.parts(param.shape), state["memories"], strict=True):
            buffer = view.native(state["momentum_buffer"], part)
            momentum_BMN = buffer.reshape(part.batch, part.m, part.n)
            grad_BMN = view.matrices(param.grad, part)
            weights_BMN = view.matrices(param, part)
            found_BMN = self._of_block(weights_BMN, grad_BMN, momentum_BMN, memory, group)
            buffer.copy_(momentum_BMN.reshape(buffer.shape))  # Where reshaping had to copy.
            native = view.native(found, part)
            native.copy_(found_BMN.reshape(native.shape))
        return found

    def _of_block(
        self,
        weights_BMN: Tensor,
        grad_BMN: Tensor,
        momentum_BMN: Tensor,
        memory: Memory,
        group: dict[str, Any],
    ) -> Tensor:
        return self.direction(grad_BMN, momentum_BMN, memory, group)

    def direction(
        self, grad_BMN: Tensor, momentum_BMN: Tensor, memory: Memory, group: dict[str, Any]
    ) -> Tensor:
        """The direction D of a batch, of RMS 0.2; advances the momentum.

        Args:
            grad_BMN: gradients; not written to.
            momentum_BMN: the momentum; written to.
            memory: of this block; written to.
            group: the param group.
        """
        raise NotImplementedError


class WeightRival(MatrixRival):
    """Base of rivals whose step depends on the weights: they say what the new weights are.

    Weight decay is theirs, too, if they have one.
    """

    def _apply(self, param: Tensor, found: Tensor, group: dict[str, Any]) -> None:
        param.copy_(found)

    def _of_block(
        self,
        weights_BMN: Tensor,
        grad_BMN: Tensor,
        momentum_BMN: Tensor,
        memory: Memory,
        group: dict[str, Any],
    ) -> Tensor:
        wide_BMN = weights_BMN.to(torch.promote_types(weights_BMN.dtype, torch.float32))
        return self.new_weights(wide_BMN, grad_BMN, momentum_BMN, memory, group)

    def new_weights(
        self,
        weights_BMN: Tensor,
        grad_BMN: Tensor,
        momentum_BMN: Tensor,
        memory: Memory,
        group: dict[str, Any],
    ) -> Tensor:
        """The weights of a batch after the step; advances the momentum.

        Args:
            weights_BMN: before the step, in at least float32; not written to.
            grad_BMN: gradients; not written to.
            momentum_BMN: the momentum; written to.
            memory: of this block; written to.
            group: the param group.
        """
        raise NotImplementedError


def advanced_momentum_(grad_BMN: Tensor, momentum_BMN: Tensor, momentum_beta: float) -> Tensor:
    """Algorithm 1's line 2, on the momentum, and the look ahead that all Muon-like arms take."""
    seen_BMN = grad_BMN.to(momentum_BMN.dtype)
    rule.update_momenta_([momentum_BMN], [seen_BMN], momentum_beta=momentum_beta)
    direction_BMN = torch.empty_like(momentum_BMN)
    rule.look_ahead_([direction_BMN], [momentum_BMN], [seen_BMN], momentum_beta=momentum_beta)
    return direction_BMN


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
    return direction_BMN * adamw_rms_scale(direction_BMN)


def adamw_rms_scale(direction_BMN: Tensor) -> Tensor:
    """What brings each matrix to an RMS of 0.2, ``[B, 1, 1]``; 0 for a zero matrix."""
    entries = direction_BMN.shape[-2] * direction_BMN.shape[-1]
    norm_B11 = torch.linalg.vector_norm(direction_BMN, dim=(-2, -1), keepdim=True)
    scale_B11 = rule.ADAMW_RMS * entries**0.5 / norm_B11
    return torch.where(norm_B11 == 0, 0.0, scale_B11)


def muon_scale(x_BMN: Tensor) -> float:
    """``0.2 sqrt(max(m, n))``, which brings an orthogonal m x n matrix to an RMS of 0.2: Muon's.

    Example:
        >>> muon_scale(torch.ones(1, 4, 25))
        1.0
    """
    m, n = x_BMN.shape[-2:]
    return rule.muon_step_scale(m=m, n=n, adjust_lr_fn="match_rms_adamw")
