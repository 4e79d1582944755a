"""Every option of a param group, and its check."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor

from normuon.models.view import MatrixView
from normuon.orthogonalize import (
    BACKENDS,
    METHODS,
    NS_DTYPES,
    Backend,
    Orthogonalizer,
    Triple,
    check_backend,
    flops_per_matrix,
    resolve_coefficients,
)
from normuon.step.normalizer import Normalizer, normalizer_of
from normuon.step.rule import ADJUST_LR_FNS, NEURON_AXES

Algorithm = Literal["normuon", "muon", "adamw"]
ALGORITHMS: tuple[Algorithm, ...] = ("normuon", "muon", "adamw")

Check = Callable[[str, object], None]
"""Takes an option's name and value; raises ValueError if the value is not allowed."""

GROUP_KEYS = frozenset({"params", "param_names", "reasons", "initial_lr"})
"""What a group carries besides."""

MISSPELT = 0.85
"""How alike a key must be to an option's name to be a misspelling of it. Schedulers' own keys, such
as ``max_momentum`` (0.8), are further away."""

PROGRAM_KEYS = frozenset(
    {
        *("view", "reasons", "orthogonalizer"),
        *("ns_backend", "ns_dtype", "compute_device", "max_scratch_bytes", "fused"),
    }
)
"""Group keys that describe the model, the program or the machine, not the run: never loaded."""

UNSAVED_KEYS = frozenset({"process_group"})
"""Group keys that belong to the processes that run: neither saved nor loaded."""


@dataclass(frozen=True, slots=True)
class MatrixOptions:
    """A `normuon` or `muon` group's options, resolved for one step."""

    lr: float | Tensor
    weight_decay: float | Tensor
    momentum: float
    nesterov: bool
    normalizer: Normalizer
    coefficients: tuple[Triple, ...]
    orthogonalizer: str | Orthogonalizer
    ns_backend: Backend
    ns_dtype: torch.dtype | None
    compute_device: torch.device | str | None
    equilibrate: bool
    skip_nonfinite: bool
    maximize: bool
    cautious_weight_decay: bool
    max_scratch_bytes: int | None
    fused: bool | None

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> MatrixOptions:
        """Reads a param group as it stands now, so that schedulers and users may change it."""
        return cls(
            lr=scalar(group["lr"]),
            weight_decay=scalar(group["weight_decay"]),
            momentum=scalar(group["momentum"]),
            nesterov=group["nesterov"],
            normalizer=normalizer_of(group),
            coefficients=resolve_coefficients(group["ns_coefficients"], group["ns_steps"]),
            orthogonalizer=group["orthogonalizer"],
            ns_backend=group["ns_backend"],
            ns_dtype=group["ns_dtype"],
            compute_device=group["compute_device"],
            equilibrate=group["equilibrate"],
            skip_nonfinite=group["skip_nonfinite"],
            maximize=group["maximize"],
            cautious_weight_decay=group["cautious_weight_decay"],
            max_scratch_bytes=group["max_scratch_bytes"],
            fused=group["fused"],
        )

    def flops(self, m: int, n: int, *, dtype: torch.dtype, device_type: str) -> int:
        """FLOPs to orthogonalise one m x n matrix by these options."""
        return flops_per_matrix(
            m,
            n,
            coefficients=self.coefficients,
            dtype=dtype,
            device_type=device_type,
            orthogonalizer=self.orthogonalizer,
        )


def scalar(value: Any) -> Any:
    """A number, or a tensor without dims, which goes to a kernel by value if it is on the host.

    Kernels refuse numpy's numbers, and tensors that require gradients.

    Example:
        >>> scalar(torch.tensor([0.5])), scalar(0.5)
        (tensor(0.5000), 0.5)
    """
    if isinstance(value, Tensor):
        return value.detach().reshape(()) if value.ndim or value.requires_grad else value
    return value if isinstance(value, (int, float)) else float(value)


def _number(low: float, below: float = math.inf) -> Check:
    """A number, at least ``low`` and below another; a one-element tensor is not read."""

    def check(name: str, value: object) -> None:
        number = isinstance(value, Real) and not isinstance(value, bool)
        if isinstance(value, Tensor) and value.numel() == 1:
            return  # Reading it would wait for the device.
        if not number or not low <= value < below:  # type: ignore[operator]
            bottom = "" if low == -math.inf else f"at least {low:g} and "
            top = "finite" if below == math.inf else f"below {below:g}"
            raise ValueError(f"{name}={value!r} must be a number, {bottom}{top}")

    return check


def _choice(known: Sequence[object], other: str = "") -> Check:
    """One of some values."""

    def check(name: str, value: object) -> None:
        if value not in known:
            choices = ", ".join(repr(k) for k in known) + (f" or {other}" if other else "")
            raise ValueError(f"{name}={value!r} is not known; choose from {choices}")

    return check


def _or_none(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def _lr(name: str, value: object, low: float = 0.0) -> None:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, but it has {value.numel()} elements")
    _number(low)(name, value)


def _switch(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be True or False")


def _steps(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or not 1 <= int(value) < 100:
        raise ValueError(f"{name}={value!r} must be an integer from 1 to 99")


def _betas(name: str, value: object) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(f"{name}={value!r} must be two numbers, AdamW's (beta1, beta2)")
    for index, beta in enumerate(value):
        _number(0.0, 1.0)(f"{name}[{index}]", beta)


def _orthogonalizer(name: str, value: object) -> None:
    if not callable(value):
        _choice(("auto", *METHODS), "a callable")(name, value)


def _backend(name: str, value: object) -> None:
    _choice(BACKENDS)(name, value)
    check_backend(value)  # type: ignore[arg-type]


def _device(name: str, value: object) -> None:
    try:
        if not isinstance(value, (str, torch.device)):
            raise TypeError
        torch.get_device_module(torch.device(value))
    except (RuntimeError, TypeError):
        raise ValueError(
            f"{name}={value!r} is not a device of torch; pass one, such as 'cuda', or None"
        ) from None


def _process_group(name: str, value: object) -> None:
    if not hasattr(value, "rank"):
        raise ValueError(
            f"{name}={value!r} must be a torch.distributed.ProcessGroup, or None for parameters "
            "that other ranks do not have"
        )


def _view(name: str, value: object) -> None:
    if not isinstance(value, MatrixView):
        raise ValueError(f"{name}={value!r} must be a normuon.MatrixView")


_dtype = _or_none(_choice(NS_DTYPES, "None"))

OPTIONS: Mapping[str, Check] = {
    "algorithm": _choice(ALGORITHMS),
    "lr": _lr,
    "weight_decay": _number(0.0),
    "momentum": _number(0.0, 1.0),
    "beta2": _number(0.0, 1.0),
    "nesterov": _switch,
    "ns_steps": _steps,
    "ns_coefficients": lambda name, value: None,  # With `ns_steps`: `check_options`.
    "eps": _number(0.0),
    "adjust_lr_fn": _choice(ADJUST_LR_FNS),
    "neuron_axis": _choice(NEURON_AXES),
    "orthogonalizer": _orthogonalizer,
    "ns_backend": _backend,
    "ns_dtype": _dtype,
    "momentum_dtype": _or_none(_choice((*NS_DTYPES, torch.int8), "None")),
    "compute_device": _or_none(_device),
    "equilibrate": _switch,
    "cautious_weight_decay": _switch,
    "skip_nonfinite": _switch,
    "maximize": _switch,
    "kahan_sum": _switch,
    "betas": _betas,
    "adamw_eps": _number(0.0),
    "max_scratch_bytes": _or_none(_number(1)),
    "fused": _or_none(_switch),
}
"""Everything that a group may set and the constructor has a default for, with its check."""

GROUP_OPTIONS: Mapping[str, Check] = {
    "view": _or_none(_view),
    "process_group": _or_none(_process_group),
}
"""What only a group may set."""


OTHER_NAMES: Mapping[str, str] = {
    **dict.fromkeys(("learning_rate", "learningrate", "base_lr"), "lr"),
    **dict.fromkeys(("wd", "decay", "weightdecay", "decoupled_weight_decay_rate"), "weight_decay"),
    **dict.fromkeys(("mu", "beta1"), "momentum"),
    **dict.fromkeys(("beta", "adam_betas", "adamw_betas"), "betas"),
    **dict.fromkeys(("epsilon",), "eps"),
    **dict.fromkeys(("adam_eps", "adam_epsilon", "adamw_epsilon"), "adamw_eps"),
    **dict.fromkeys(("steps", "num_steps", "ns_iters", "backend_steps"), "ns_steps"),
    **dict.fromkeys(("use_muon", "type", "algo"), "algorithm"),
    **dict.fromkeys(("momentum_bits", "optim_bits"), "momentum_dtype"),
}
"""What other optimizers and libraries call these options."""

UNUSED_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "normuon": {"betas": "beta2", "adamw_eps": "eps"},
    "muon": {"betas": "momentum", "adamw_eps": "", "beta2": ""},
    "adamw": {"eps": "adamw_eps", "beta2": "betas", "momentum": "betas"},
}
"""For each algorithm the options that would look as if they did something, and what does."""


def check_options(group: Mapping[str, Any]) -> None:
    """Checks every option of a group whose defaults are filled in.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    for name, check in OPTIONS.items():
        check(name, group[name])
    for name, check in GROUP_OPTIONS.items():
        check(name, group.get(name))
    resolve_coefficients(group["ns_coefficients"], group["ns_steps"])


def check_changed_options(
    what: str, group: Mapping[str, Any], names: Sequence[str] = (*OPTIONS, *GROUP_OPTIONS)
) -> None:
    """Checks options of a group that were set after the optimizer was built.

    A learning rate may be negative here: torch's schedulers round their last zero to -1e-19.

    Args:
        what: the group, the start of the message.
        group: as it stands now.
        names: of the options.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    checks: dict[str, Check] = {**OPTIONS, **GROUP_OPTIONS, "lr": partial(_lr, low=-math.inf)}
    try:
        for name in names:
            checks[name](name, group.get(name))
        if "ns_steps" in names or "ns_coefficients" in names:
            resolve_coefficients(group["ns_coefficients"], group["ns_steps"])
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None


def check_sharing(
    balance: str, bucket_bytes: int, teams: str, process_group: object = None
) -> None:
    """Checks the options that say how ranks share matrices.

    Raises:
        ValueError: names the option, its value and what is allowed.
    """
    _choice(("flops", "paper"))("balance", balance)
    _number(1)("bucket_bytes", bucket_bytes)
    _choice(("off", "auto"))("teams", teams)
    GROUP_OPTIONS["process_group"]("process_group", process_group)
    if teams == "auto" and balance == "paper":
        raise ValueError("teams='auto' divides matrices by FLOPs; use balance='flops' with it")


def check_options_dict(what: str, options: Mapping[str, Any], algorithm: str | None = None) -> None:
    """Checks the keys of options that a user wrote down for a group.

    torch allows any key in a group, as schedulers and frameworks need, so a misspelt option would
    silently keep its default.

    Args:
        what: whose options they are, the start of the message.
        options: as written, defaults not filled in.
        algorithm: the group's, where it is known.

    Raises:
        ValueError: a key is a misspelt option, another library's name for one, or an option that
            the group's algorithm does not use.
    """
    known = {*OPTIONS, *GROUP_OPTIONS}
    for key in sorted(options.keys() - known - GROUP_KEYS):
        meant = OTHER_NAMES.get(key)
        if meant is None:
            close = get_close_matches(key, known, n=1, cutoff=MISSPELT)
            meant = close[0] if close else None
        if meant is not None:
            raise ValueError(
                f"{what}: {key!r} is not an option of a group; did you mean {meant!r}?"
            )
    if options.get("amsgrad"):
        raise ValueError(f"{what}: amsgrad is not supported: leave it out")
    algorithm = options.get("algorithm", algorithm)
    if algorithm not in UNUSED_OPTIONS or options.keys() >= OPTIONS.keys():
        return  # Not said, or the whole group of an optimizer that is alive.
    for key in sorted(options.keys() & UNUSED_OPTIONS[algorithm].keys()):
        meant = UNUSED_OPTIONS[algorithm][key]
        raise ValueError(
            f"{what}: {key!r} does nothing in a group with 'algorithm': {algorithm!r}; "
            + (f"use {meant!r} there" if meant else "leave it out")
        )
