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
STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")


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
    entries = list(zip(params, grads, states, strict=True))
    for fused in (True, False):
        chosen = [entry for entry in entries if _takes_fused(*entry) == fused]
        if not chosen:
            continue
        tensors = [t for p, _, state in chosen for t in (p, *(state[key] for key in STATE_KEYS))]
        # The multi-tensor kernels know no found_inf: what a skipped step moved is put back.
        restores = found_inf is not None and not fused
        old = [tensor.clone() for tensor in tensors] if restores else []
        _call(
            [param for param, _, _ in chosen],
            [grad for _, grad, _ in chosen],
            [state for _, _, state in chosen],
            group,
            fused=fused,
            found_inf=found_inf if fused else None,
        )
        if found_inf is not None and restores:
            for tensor, value in zip(tensors, old, strict=True):
                tensor.copy_(torch.where(found_inf != 0, value, tensor))


def _takes_fused(param: Tensor, grad: Tensor, state: State) -> bool:
    """Whether torch's fused kernel may step this parameter.

    It walks memory linearly and checks no strides, so all four tensors must be laid out alike and
    without gaps, as ``exp_avg`` always is. torch.compile cannot trace it at all.
    """
    strides = {t.stride() for t in (param, grad, state["exp_avg"], state["exp_avg_sq"])}
    traced = torch.compiler.is_compiling()
    return param.device.type in FUSED_DEVICES and len(strides) == 1 and not traced


def _call(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
    *,
    fused: bool,
    found_inf: Tensor | None,
) -> None:
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
        # As torch's own AdamW when it is traced; `step` lives on the device, as this asks. On CUDA
        # the multi-tensor kernels would read `step` on the host otherwise, and wait for it.
        capturable=torch.compiler.is_compiling() or (not fused and params[0].is_cuda),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["adamw_eps"],
        maximize=group["maximize"],
    )
