"""The AdamW half: tensors handed to torch's own fused or multi-tensor kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from normuon.step.order import GRADIENT, NONFINITE
from normuon.step.pieces import State, local_tensor

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
        nonfinite = ~is_finite(grad)
        state["skipped_steps"].add_(nonfinite)
        adamw_([param], [grad], [state], group, found_inf=nonfinite.to(torch.float32))


def is_finite(grad: Tensor) -> Tensor:
    """A boolean: whether a gradient is finite throughout; an empty one is.

    By the largest and the smallest value: on a CPU the infinity norm takes twenty times as long.

    Example:
        >>> is_finite(torch.tensor([1.0, float("inf")]))
        tensor(False)
    """
    if not grad.numel():
        return torch.ones((), dtype=torch.bool, device=grad.device)
    return torch.isfinite(grad.amax()) & torch.isfinite(grad.amin())


class SharedVector(Protocol):
    """A parameter that several ranks share, as `step_shared_adamw_` needs it."""

    place: tuple[int, int]
    param: Tensor
    group: Mapping[str, Any]
    state: State
    grad: Tensor | None


def step_shared_adamw_(vectors: Sequence[SharedVector], flag_of: Callable[[int], Tensor]) -> None:
    """One AdamW step for parameters that several ranks share, those without gradients included.

    Args:
        vectors: the parameters.
        flag_of: by place in `vectors`, what the ranks say of its gradient: see `flags`.
    """
    certain: dict[int, list[SharedVector]] = {}
    for number, vector in enumerate(vectors):
        if vector.grad is not None and not vector.group["skip_nonfinite"]:
            # Its own gradient says that the step takes place.
            certain.setdefault(vector.place[0], []).append(vector)
            continue
        flag = flag_of(number)
        if "skipped_steps" in vector.state:
            local_tensor(vector.state["skipped_steps"]).add_(flag == NONFINITE)
        found_inf = (flag != GRADIENT).to(torch.float32)
        _step_shared([vector], found_inf=found_inf)
    for alike in certain.values():
        _step_shared(alike)


def _step_shared(vectors: Sequence[SharedVector], *, found_inf: Tensor | None = None) -> None:
    params = [local_tensor(vector.param) for vector in vectors]
    adamw_(
        params,
        [
            torch.zeros_like(param) if vector.grad is None else vector.grad
            for param, vector in zip(params, vectors, strict=True)
        ],
        [{key: local_tensor(t) for key, t in vector.state.items()} for vector in vectors],
        vectors[0].group,
        found_inf=found_inf,
    )


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
    # torch's kernels want one dtype; `grad_dtype` allows others.
    grads = [g if g.dtype == p.dtype else g.to(p.dtype) for p, g in zip(params, grads, strict=True)]
    entries = list(zip(params, grads, states, strict=True))
    compensated = [entry for entry in entries if "weight_residual" in entry[2]]
    if group["kahan_sum"] and compensated:
        _step_compensated(compensated, group, found_inf)
        entries = [entry for entry in entries if "weight_residual" not in entry[2]]
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


def _step_compensated(
    entries: Sequence[tuple[Tensor, Tensor, State]],
    group: Mapping[str, Any],
    found_inf: Tensor | None,
) -> None:
    """AdamW in float32 on weights and what rounding has taken from them (Kahan's summation)."""
    wide_params, wide_states = [], []
    for param, _, state in entries:
        wide_params.append(param.float().add_(state["weight_residual"]))
        moments = {key: state[key].float() for key in ("exp_avg", "exp_avg_sq")}
        wide_states.append({**moments, "step": state["step"]})
    grads = [grad.float() for _, grad, _ in entries]
    adamw_(wide_params, grads, wide_states, group, found_inf=found_inf)
    for (param, _, state), wide, moments in zip(entries, wide_params, wide_states, strict=True):
        rounded = wide.to(param.dtype)
        new = {
            "exp_avg": moments["exp_avg"],
            "exp_avg_sq": moments["exp_avg_sq"],
            "weight_residual": wide - rounded,
        }
        targets = [(param, rounded), *((state[key], value) for key, value in new.items())]
        for target, value in targets:
            # Rounding again could turn over a weight that a skipped step must leave.
            target.copy_(value if found_inf is None else torch.where(found_inf == 0, value, target))


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
    weight_decay = group["weight_decay"]
    if isinstance(weight_decay, Tensor):
        # torch's kernels take a number, which the host would have to read from the tensor.
        kept = 1 - group["lr"] * weight_decay
        if found_inf is not None:
            kept = torch.where(found_inf == 0, kept, 1.0)
        torch._foreach_mul_(list(params), kept)
        weight_decay = 0.0
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
        weight_decay=weight_decay,
        eps=group["adamw_eps"],
        maximize=group["maximize"],
    )
