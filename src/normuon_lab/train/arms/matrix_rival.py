"""What every rival shares: matrices of parameters, momentum, decay, and one step size for all.

A rival says only which direction a batch of matrices moves in. Its step has an RMS of 0.2 times the
learning rate, the size of an AdamW step and of NorMuon's, so that learning rates compare.
Shapes as in `normuon.step.rule`: B matrices of M rows (neurons) and N columns.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normuon import MatrixView
from normuon.step import rule

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
                if param.grad is None:
                    continue
                moved = self._moved(param, param.grad, view, group)
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.sub_(moved, alpha=group["lr"])

    def _moved(
        self, param: Tensor, grad: Tensor, view: MatrixView, group: dict[str, Any]
    ) -> Tensor:
        state = self.state[param]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param)
            state["memories"] = [{} for _ in view.parts(param.shape)]
        moved = torch.empty_like(param)
        for part, memory in zip(view.parts(param.shape), state["memories"], strict=True):
            buffer = view.native(state["momentum_buffer"], part)
            momentum_BMN = buffer.reshape(part.batch, part.m, part.n)
            grad_BMN = view.matrices(grad, part)
            direction_BMN = self.direction(grad_BMN, momentum_BMN, memory, group)
            buffer.copy_(momentum_BMN.reshape(buffer.shape))  # Where reshaping had to copy.
            native = view.native(moved, part)
            native.copy_(direction_BMN.reshape(native.shape))
        return moved

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


def advanced_momentum_(grad_BMN: Tensor, momentum_BMN: Tensor, momentum_beta: float) -> Tensor:
    """Algorithm 1's line 2, on the momentum, and the look ahead that all Muon-like arms take."""
    seen_BMN = grad_BMN.to(momentum_BMN.dtype)
    rule.update_momenta_([momentum_BMN], [seen_BMN], momentum_beta=momentum_beta)
    direction_BMN = torch.empty_like(momentum_BMN)
    rule.look_ahead_([direction_BMN], [momentum_BMN], [seen_BMN], momentum_beta=momentum_beta)
    return direction_BMN


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
