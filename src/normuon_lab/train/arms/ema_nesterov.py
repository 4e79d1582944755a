"""EMA-Nesterov (Yau et al. 2026, arXiv 2605.25395): gradients are taken ahead of the weights.

A wrapper around whatever optimizers train a model. It stands after them in their list.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

START_FACTOR, END_FACTOR = 0.7 / 0.95, 0.2 / 0.95
"""The lab's linear schedule after 3/10 and 8/10 of the steps, 1/20 being warmup: the shares of the
authors' runs of Llama 60M and 130M."""


class EmaNesterov(Optimizer):
    """Looks ahead along a moving average of what the other optimizers did to the weights.

    x are the weights, A a step of the other optimizers with the gradient at its argument::

        x' = A(x + s m)
        m' = decay m + (1 - decay) (x' - x)
        s  = step_size lr / (peak lr), 0 early and late

    Between steps the parameters hold ``x + s m``, so that the next gradient is taken there: a loss
    that is measured then is that of the point ahead. Late in a schedule they hold x.

    Differs: the paper counts the steps without look ahead, this class takes it on while the
    learning rate falls from `START_FACTOR` to `END_FACTOR` of its peak. Under a constant schedule
    it never looks ahead. s is that of the step just made, where the authors take the coming one's.

    Args:
        params: all that the other optimizers train. The learning rate of a group is the factor on
            theirs: 1 at the peak.
        step_size: s at the peak, 0.7 in the authors' runs.
        decay: of the moving average, 0.99 in the authors' runs.
    """

    def __init__(
        self, params: Iterable[Tensor], *, step_size: float = 0.7, decay: float = 0.99
    ) -> None:
        defaults = {"lr": 1.0, "weight_decay": 0.0, "step_size": step_size, "decay": decay}
        super().__init__(params, {**defaults, "last_factor": 0.0})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = {
                    "weights": param.detach().clone(),
                    "trend": torch.zeros_like(param),
                }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """After the other optimizers' steps: take note of them, and look ahead."""
        for group in self.param_groups:
            factor, falls = group["lr"], group["lr"] < group["last_factor"]
            group["last_factor"] = factor
            looks_ahead = falls and END_FACTOR < factor <= START_FACTOR
            for param in group["params"]:
                weights, trend = self.state[param]["weights"], self.state[param]["trend"]
                trend.lerp_(param - weights, 1 - group["decay"])
                weights.copy_(param)
                if looks_ahead:
                    param.add_(trend, alpha=group["step_size"] * factor)
