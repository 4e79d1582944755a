"""Finds which optimizer wrote a state, and renames its entries to torch.optim's names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

Kind = Literal["AdamW", "Muon", "NorMuon"]

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

KNOWN = (
    "torch.optim.AdamW, torch.optim.Muon, the authors' NorMuon, dion's Muon and NorMuon, and Muon "
    "with 'use_muon' groups, as Keller Jordan's and DeepSpeed's"
)


def kind_of(group: Mapping[str, Any]) -> Kind:
    """The known algorithm that a saved group's options belong to.

    Raises:
        ValueError: it is unknown, or its state cannot be converted; says why.
    """
    keys = group.keys()
    if "adamw_eps" in keys:
        raise ValueError("this is NorMuon's state already: pass it to load_state_dict directly")
    if keys >= DION_KEYS:
        return _kind_of_dion(str(group["algorithm"]))
    if keys >= MUON_KEYS:
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
    if not state:
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
