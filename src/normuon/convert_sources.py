"""Finds which optimizer wrote a state, and renames its entries to torch.optim's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

Kind = Literal["AdamW", "Muon", "NorMuon", "this library"]

NEEDED_STATE: dict[Kind, tuple[str, ...]] = {
    "AdamW": ("step", "exp_avg", "exp_avg_sq"),
    "Muon": ("momentum_buffer",),
    "NorMuon": ("momentum_buffer", "second_momentum_buffer"),
}
MUON_KEYS = {"momentum", "nesterov", "ns_coefficients", "ns_steps", "adjust_lr_fn"}

DION_KEYS = {"algorithm", "mu", "beta1", "beta2", "epsilon", "adjust_lr"}
"""What dion's Muon and NorMuon have in every group."""

DION_STATE: dict[Kind, dict[str, str]] = {
    "AdamW": {"momentum": "exp_avg", "variance": "exp_avg_sq", "step_dev": "step"},
    "Muon": {"momentum": "momentum_buffer"},
    "NorMuon": {"momentum": "momentum_buffer", "variance_neuron": "second_momentum_buffer"},
}
"""Its names for what NEEDED_STATE has."""

MEGATRON_EXTRAS = frozenset(
    (
        *("params", "param_names", "initial_lr", "lr_mult", "wd_mult", "max_lr", "min_lr"),
        *("start_wd", "end_wd", "is_expert_parallel", "is_decoupled_lr", "default_config"),
        *("pre_lr_mult", "pre_wd_mult", "pre_mult_lr", "optimizer", "step"),
    )
)
"""What Megatron-LM puts into groups beside the options of the optimizer."""

MEGATRON_KEYS = (
    {"lr", "momentum", "weight_decay"},
    {"lr", "momentum", "weight_decay", "beta2", "eps"},
)
"""Options of emerging_optimizers' Muon and AdaptiveMuon, of which Megatron-LM makes its own."""

KNOWN = (
    "torch.optim.AdamW, torch.optim.Muon, the authors' NorMuon, dion's Muon and NorMuon, Muon with "
    "'use_muon' groups, as Keller Jordan's and DeepSpeed's, Megatron-LM's Muon, and this library's"
)


def is_megatrons(group: Mapping[str, Any]) -> bool:
    """Whether a group is that of Megatron-LM's Muon, or of emerging_optimizers' own.

    Example:
        >>> is_megatrons({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "is_expert_parallel": 0})
        True
        >>> is_megatrons({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "dampening": 0.0})
        False
    """
    # Before 0.3 it spelt the momentum "momentum_beta".
    options = {"momentum" if key == "momentum_beta" else key for key in group}
    return options - MEGATRON_EXTRAS in MEGATRON_KEYS


def check_momentum_is_of_gradients(source: Any) -> None:
    """Checks that a live optimizer of Megatron-LM's keeps weight decay out of its momentum.

    Raises:
        ValueError: its decay is L2, a part of every gradient.
    """
    if getattr(source, "weight_decay_method", None) != "l2":
        return
    if any(group["weight_decay"] for group in source.param_groups):
        raise ValueError(
            f"{type(source).__name__} with weight_decay_method='l2' has the decay inside its first "
            "moment, which cannot be carried over: decoupled decay, or none, can be converted"
        )


def kind_of(group: Mapping[str, Any]) -> Kind:
    """The known algorithm that a saved group's options belong to.

    Raises:
        ValueError: it is unknown, or its state cannot be converted; says why.
    """
    keys = group.keys()
    if "adamw_eps" in keys:
        return "this library"
    if keys >= DION_KEYS:
        return _kind_of_dion(str(group["algorithm"]))
    if keys >= MUON_KEYS or is_megatrons(group):
        return "Muon"
    if {"momentum", "beta2"} <= keys and group.get("use_muon", True):
        return "NorMuon"
    if "momentum" in keys and group.get("use_muon") is True:
        return "Muon"
    if {"betas", "eps"} <= keys and ("amsgrad" in keys or group.get("use_muon") is False):
        if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
            raise ValueError(
                f"torch.optim.Adam with weight_decay={group['weight_decay']} adds the decay to its "
                "first moment, which cannot be converted; convert AdamW, or Adam without decay"
            )
        return "AdamW"
    options = sorted(str(key) for key in keys - {"params", "param_names"})
    raise ValueError(
        f"convert_state does not know the optimizer of a group with the options {options}; it "
        f"takes {KNOWN}"
    )


def _kind_of_dion(algorithm: str) -> Kind:
    kinds: dict[str, Kind] = {"muon": "Muon", "normuon": "NorMuon", "adamw": "AdamW"}
    if algorithm not in kinds:
        raise ValueError(
            f"a dion group with algorithm={algorithm!r} cannot be converted; convert_state takes "
            f"{', '.join(map(repr, kinds))}"
        )
    return kinds[algorithm]


def canonical_state(
    kind: Kind, group: Mapping[str, Any], state: Mapping[str, Any], label: str
) -> Mapping[str, Any]:
    """A parameter's state in torch.optim's names, with first moments ``b x + (1 - b) g``.

    Args:
        kind: from `kind_of`.
        group: the parameter's.
        state: as saved; empty before the parameter's first step.
        label: the parameter's name in messages.

    Raises:
        ValueError: entries are missing; names them.
    """
    if not state or kind == "this library":
        return state
    is_dions = group.keys() >= DION_KEYS
    if is_dions:
        found = {
            ours: state[theirs] for theirs, ours in DION_STATE[kind].items() if theirs in state
        }
        if "step_dev" not in state and kind == "AdamW":
            found["step"] = group["step"]  # Before it had one for each parameter.
    else:
        found = dict(state)
    if "moment2_buffer" in found and is_megatrons(group):
        # Of NorMuon's kind if it has one entry a row or column; else it is not carried over.
        found["second_momentum_buffer"] = found.pop("moment2_buffer")
    missing = [needed for needed in NEEDED_STATE[kind] if needed not in found]
    if missing:
        raise ValueError(
            f"{label}: its state has {sorted(map(str, state))}, but lacks {kind}'s {missing}; it "
            "was written by another optimizer"
        )
    if is_dions and kind != "AdamW":
        # Its momentum is a sum, mu M + G; ours is the mean of the same.
        momentum: Tensor = found["momentum_buffer"]
        found["momentum_buffer"] = momentum * (1 - group["mu"])
    return found
