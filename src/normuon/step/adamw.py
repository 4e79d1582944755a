"""The AdamW parameters: stepped by torch's kernels, or here where those would wait."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.optim.adamw import adamw
from torch.utils import _foreach_utils

from normuon.options import scalar
from normuon.step.order import GRADIENT, NONFINITE
from normuon.step.pieces import State, local_tensor

STATE_KEYS = ("exp_avg", "exp_avg_sq", "step")

Kernels = Literal["fused", "torch", "own"]
"""torch's fused kernels, torch's multi-tensor operations, or those of `step_multi_tensor_`."""


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
    """Hands parameters to the kernels that step them without the host looking at a value.

    Args:
        params: written to.
        grads: one each; not written to.
        states: written to.
        group: the param group, read as it stands now.
        found_inf: where it is 1, nothing is touched.
    """
    # torch's kernels want one dtype; `grad_dtype` allows others.
    grads = [g if g.dtype == p.dtype else g.to(p.dtype) for p, g in zip(params, grads, strict=True)]
    entries = list(zip(params, grads, states, strict=True))
    compensated = [entry for entry in entries if "weight_residual" in entry[2]]
    if group["kahan_sum"] and compensated:
        _step_compensated(compensated, group, found_inf)
        entries = [entry for entry in entries if "weight_residual" not in entry[2]]
    decay = group["weight_decay"]
    if group["cautious_weight_decay"] and (isinstance(decay, Tensor) or decay != 0):
        _decay_cautiously_(entries, group, found_inf)
        group = {**group, "weight_decay": 0.0}
    has_tensor_lr = isinstance(group["lr"], Tensor)
    chosen: dict[Kernels, list[tuple[Tensor, Tensor, State]]] = {}
    for entry in entries:
        chosen.setdefault(_kernels_for(*entry, has_tensor_lr=has_tensor_lr), []).append(entry)
    for kernels, alike in chosen.items():
        tensors = [t for p, _, state in alike for t in (p, *(state[key] for key in STATE_KEYS))]
        # Only fused kernels know found_inf: elsewhere, what a skipped step moved is put back.
        restores = found_inf is not None and kernels != "fused"
        old = [tensor.clone() for tensor in tensors] if restores else []
        _call(
            kernels,
            [param for param, _, _ in alike],
            [grad for _, grad, _ in alike],
            [state for _, _, state in alike],
            group,
            found_inf=None if restores else found_inf,
        )
        if found_inf is not None and restores:
            for tensor, value in zip(tensors, old, strict=True):
                tensor.copy_(torch.where(found_inf != 0, value, tensor))


def _decay_cautiously_(
    entries: Sequence[tuple[Tensor, Tensor, State]],
    group: Mapping[str, Any],
    found_inf: Tensor | None,
) -> None:
    """Cautious weight decay (arXiv 2510.12402): entries that the coming step moves towards zero.

    AdamW's step has the sign of its new first moment.
    """
    decay = scalar(group["lr"]) * scalar(group["weight_decay"])
    for param, grad, state in entries:
        mean = state["exp_avg"].lerp(-grad if group["maximize"] else grad, 1 - group["betas"][0])
        shrinks = param * mean >= 0
        if found_inf is not None:
            shrinks &= found_inf == 0
        param.sub_(param * shrinks * decay)


def _step_compensated(
    entries: Sequence[tuple[Tensor, Tensor, State]],
    group: Mapping[str, Any],
    found_inf: Tensor | None,
) -> None:
    """AdamW in float32 on weights plus their rounding error (Kahan's summation)."""
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


def _kernels_for(param: Tensor, grad: Tensor, state: State, *, has_tensor_lr: bool) -> Kernels:
    """Which kernels may step a parameter.

    The fused one walks memory linearly and checks no strides, so all four tensors must be laid out
    alike and without gaps, as ``exp_avg`` always is. torch.compile cannot trace it at all.
    """
    if torch.compiler.is_compiling():
        return "torch"
    strides = {t.stride() for t in (param, grad, state["exp_avg"], state["exp_avg_sq"])}
    device_type = param.device.type
    if len(strides) == 1 and has_fused_kernel(device_type):
        return "fused"
    # torch's multi-tensor AdamW reads `step` and refuses a tensor for lr unless it is capturable.
    if is_capturable(device_type) or (device_type == "cpu" and not has_tensor_lr):
        return "torch"
    return "own"


@lru_cache(maxsize=16)
def has_fused_kernel(device_type: str) -> bool:
    """Whether torch has a fused AdamW for a device.

    torch's list has every backend that is made outside of it, whether or not that brings a kernel.

    Example:
        >>> has_fused_kernel("cpu"), has_fused_kernel("meta")
        (True, False)
    """
    ask = getattr(_foreach_utils, "_get_fused_kernels_supported_devices", None)
    if device_type not in (ask() if ask else ("cpu", "cuda", "xpu", "mps")):
        return False
    if device_type != torch._C._get_privateuse1_backend_name():
        return True
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    overloads = ("aten::_fused_adamw_", "aten::_fused_adamw_.tensor_lr")
    return all(has_kernel(name, "PrivateUse1") for name in overloads)


@lru_cache(maxsize=16)
def is_capturable(device_type: str) -> bool:
    """Whether torch's multi-tensor AdamW can leave ``step`` on a device.

    Example:
        >>> is_capturable("cuda"), is_capturable("cpu")
        (True, False)
    """
    ask = getattr(torch_optimizer, "_get_capturable_supported_devices", None)
    return device_type in (ask(supports_xla=False) if ask else ("cuda", "xpu"))


def _call(
    kernels: Kernels,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    group: Mapping[str, Any],
    *,
    found_inf: Tensor | None,
) -> None:
    beta1, beta2 = map(scalar, group["betas"])
    eps = scalar(group["adamw_eps"])
    lr, weight_decay = scalar(group["lr"]), scalar(group["weight_decay"])
    if isinstance(weight_decay, Tensor):
        # torch's kernels take a number, which the host would have to read from the tensor.
        kept = 1 - lr * weight_decay
        if found_inf is not None:
            # Multiplied, since `where` would copy a factor that is on the host.
            kept = torch.where(found_inf == 0, torch.ones_like(found_inf) * kept, 1.0)
        torch._foreach_mul_(list(params), kept)
        weight_decay = 0.0
    if kernels == "own":
        step_multi_tensor_(
            params,
            grads,
            states,
            lr=lr,
            betas=(beta1, beta2),
            weight_decay=weight_decay,
            eps=eps,
            maximize=group["maximize"],
        )
        return
    fused = kernels == "fused"
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
        # As torch's own AdamW when it is traced; `step` lives on the device, as this asks.
        capturable=torch.compiler.is_compiling() or (not fused and not params[0].is_cpu),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=group["maximize"],
    )


def step_multi_tensor_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[State],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    maximize: bool,
) -> None:
    """AdamW in multi-tensor operations that read nothing, on any device::

        W = (1 - lr weight_decay) W
        m = b1 m + (1 - b1) g
        v = b2 v + (1 - b2) g^2
        W = W - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)

    Args:
        params: written to.
        grads: one each, in the parameter's dtype.
        states: each one's ``step``, ``exp_avg``, ``exp_avg_sq``; written to.
        lr: a number or a tensor without dims.
        betas: b1 and b2.
        weight_decay: decoupled.
        eps: added to the root.
        maximize: ascend.

    Example:
        >>> w = torch.tensor([1.0])
        >>> state = {"step": torch.zeros(()), "exp_avg": w - w, "exp_avg_sq": w - w}
        >>> options = dict(betas=(0.9, 0.95), weight_decay=0.0, eps=0.0, maximize=False)
        >>> step_multi_tensor_([w], [torch.tensor([3.0])], [state], lr=0.25, **options)
        >>> w
        tensor([0.7500])
    """
    params, grads = list(params), list(grads)
    steps, means, squares = (
        [state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq")
    )
    if maximize:
        grads = list(torch._foreach_neg(grads))
    torch._foreach_add_(steps, 1)
    if weight_decay != 0:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    torch._foreach_lerp_(means, grads, 1 - betas[0])
    torch._foreach_mul_(squares, betas[1])
    torch._foreach_addcmul_(squares, grads, grads, 1 - betas[1])
    wide = [torch.promote_types(param.dtype, torch.float32) for param in params]
    times = [step.to(dtype) for step, dtype in zip(steps, wide, strict=True)]
    first, second = (_minus_corrections(times, beta) for beta in betas)
    torch._foreach_neg_(second)
    torch._foreach_sqrt_(second)
    divisors = list(torch._foreach_sqrt(squares))
    torch._foreach_div_(divisors, second)
    torch._foreach_add_(divisors, eps)
    if isinstance(lr, Tensor):
        torch._foreach_div_(first, lr)
    torch._foreach_mul_(divisors, first)
    torch._foreach_addcdiv_(params, means, divisors, 1.0 if isinstance(lr, Tensor) else lr)


def _minus_corrections(times: Sequence[Tensor], beta: float) -> list[Tensor]:
    """``beta^t - 1``, without the rounding of a difference of almost equal numbers."""
    exponents = list(torch._foreach_mul(list(times), math.log(beta) if beta else -math.inf))
    torch._foreach_expm1_(exponents)
    return exponents
