"""Which optimizer wrote a state, and what its entries mean in torch.optim's words."""

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
    """Which known algorithm a saved group's options belong to.

    Raises:
        ValueError: none, or one whose state cannot be carried over; says why.
    """
    keys = group.keys()
    if "adamw_eps" in keys:
        raise ValueError("this is a NorMuon's state already: give it to load_state_dict as it is")
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
                f"torch.optim.Adam with weight_decay={group['weight_decay']} has the decay inside "
                "its first moment, which cannot be carried over; only AdamW's, or Adam's without"
            )
        return "AdamW"
    options = sorted(str(key) for key in keys - {"params", "param_names"})
    raise ValueError(
        f"a group with the options {options} belongs to no optimizer that convert_state knows: "
        f"{KNOWN}"
    )


def _kind_of_dion(algorithm: str) -> Kind:
    kinds: dict[str, Kind] = {"muon": "Muon", "normuon": "NorMuon", "adamw": "AdamW"}
    if algorithm not in kinds:
        raise ValueError(
            f"a group of dion's with algorithm={algorithm!r} cannot be carried over: its state is "
            f"not that of {', '.join(map(repr, kinds))}"
        )
    return kinds[algorithm]


def canonical_state(
    kind: Kind, group: Mapping[str, Any], state: Mapping[str, Any], label: str
) -> Mapping[str, Any]:
    """A parameter's state in torch.optim's names, with first moments ``b x + (1 - b) g``.

    Args:
        kind: from `kind_of`.
        group: the parameter's.
        state: as it was saved; empty if the parameter has never been stepped.
        label: how messages call the parameter.

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
            f"{label}: its state has {sorted(map(str, state))}, and {kind}'s has {missing} too; it "
            "was written by another optimizer"
        )
    if is_dions and kind != "AdamW":
        # Its momentum is a sum, mu M + G; ours is the mean of the same.
        momentum: Tensor = found["momentum_buffer"]
        found["momentum_buffer"] = momentum * (1 - group["mu"])
    return found
