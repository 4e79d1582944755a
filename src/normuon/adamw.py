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
    fused = all(p.device.type in FUSED_DEVICES for p in params)
    if not group["skip_nonfinite"]:
        _adamw(params, states, group, fused=fused)
        return
    for param, state in zip(params, states, strict=True):
        # torch's kernels skip all of a call's parameters or none, so each goes on its own.
        assert param.grad is not None
        nonfinite = ~torch.linalg.vector_norm(param.grad, ord=float("inf")).isfinite()
        state["skipped_steps"].add_(nonfinite)
        _adamw([param], [state], group, fused=True, found_inf=nonfinite.to(torch.float32))


def _adamw(
    params: Sequence[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
    *,
    fused: bool,
    found_inf: Tensor | None = None,
) -> None:
    beta1, beta2 = group["betas"]
    adamw(
        list(params),
        [p.grad for p in params if p.grad is not None],
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
