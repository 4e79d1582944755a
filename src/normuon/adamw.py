"""The AdamW half: torch's own fused or multi-tensor kernels over this optimizer's state.

Nothing of AdamW is implemented here; this file only hands tensors to torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from normuon.state import State

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")


def step_adamw_(
    params: Sequence[Tensor], states: Sequence[State], group: Mapping[str, Any]
) -> None:
    """One AdamW step for the parameters of a group that have gradients.

    Args:
        params: parameters with a gradient; written to.
        states: each one's ``step``, ``exp_avg``, ``exp_avg_sq``; written to.
        group: the param group, read as it stands now.
    """
    grads = [param.grad for param in params if param.grad is not None]
    if not group["skip_nonfinite"]:
        adamw_(params, grads, states, group)
        return
    for param, grad, state in zip(params, grads, states, strict=True):
        # torch's kernels skip all of a call's parameters or none, so each goes on its own.
        nonfinite = ~torch.isfinite(torch.linalg.vector_norm(grad, ord=float("inf")))
        state["skipped_steps"].add_(nonfinite)
        adamw_([param], [grad], [state], group, found_inf=nonfinite.to(torch.float32))


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
    *,
    found_inf: Tensor | None = None,
) -> None:
    """Hands parameters to torch's fused AdamW, or to its multi-tensor one where there is none.

    Args:
        params: written to.
        grads: one each; not written to.
        states: written to.
        group: the param group, read as it stands now.
        found_inf: where it is 1, nothing is touched; needs a device with fused kernels.
    """
    fused = all(param.device.type in FUSED_DEVICES for param in params)
    beta1, beta2 = group["betas"]
    adamw(
        list(params),
        list(grads),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=not fused,
        found_inf=found_inf,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["adamw_eps"],
        maximize=group["maximize"],
    )
