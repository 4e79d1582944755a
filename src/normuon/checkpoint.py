"""Writes a `state_dict`, and fits one to a live optimizer.

A saved group has only None, numbers, strings, booleans, lists and tuples (and what schedulers and
users add), so that any loader and torch's distributed checkpoints take it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from normuon.models.blocks import block_grid
from normuon.models.wrappers import bare_name
from normuon.momentum_forms import is_dtensor, recoded
from normuon.options import PROGRAM_KEYS, UNSAVED_KEYS
from normuon.params import param_label
from normuon.state import initial_state, momentum_dtype, vector_dims_of, view_of
from normuon.step.pieces import State

NAMES_KEY = "param_names"
PARAM_SHAPED = ("momentum_buffer", "momentum_codes", "weight_residual")
Names = Sequence[str] | None


def saved_form(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch's `Optimizer.state_dict` gave, in plain types; written to and returned.

    Names move from the groups, which keep an empty list, to ``state_dict["param_names"]``, one list
    per group: a flattened distributed checkpoint repeats a group's values for each of its
    parameters, and requires every key of a live group.
    """
    groups = state_dict["param_groups"]
    names = [group.get(NAMES_KEY) for group in groups]
    for group in groups:
        for key in UNSAVED_KEYS & group.keys():
            del group[key]
        for key, value in group.items():
            if key != "params":
                group[key] = _plain(key, value)
    if any(names):
        state_dict[NAMES_KEY] = names
    return state_dict


def _plain(key: str, value: object) -> object:
    """A group's value in plain types; values that are not loaded again become words.

    Reasons are left out: a flattened checkpoint would repeat them for each parameter.
    """
    if key == "reasons":
        return ""
    if key == NAMES_KEY:
        return []
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(key, entry) for entry in value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)  # Such as numpy's.
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if key in PROGRAM_KEYS and not isinstance(value, (str, int, type(None))):
        return getattr(value, "__qualname__", None) or str(value)
    return value


def _option(key: str, value: object) -> object:
    """An option as a group has it, from what `_plain` made of it or from the option itself."""
    if key.endswith("_dtype") and isinstance(value, str):
        return getattr(torch, value.removeprefix("torch."))
    if key == "adjust_lr_fn" and value is None:
        return "original"  # What None means to torch.optim.Muon.
    return deepcopy(value)


def merged_groups(
    live_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Saved hyperparameters on live parameters, and where the state of each of them was saved.

    Settings of the model, the program or the machine (`PROGRAM_KEYS`) stay as they are.

    Args:
        live_groups: the optimizer's.
        state_dict: a saved one.

    Returns:
        The new groups; and for each, for each of its parameters, the saved parameter's place.

    Raises:
        ValueError: the number of groups or parameters or an algorithm differs, or some names are
            at other positions.
    """
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"this is not an optimizer's state_dict: it has the keys {sorted(map(str, state_dict))}"
            ", but not 'state' and 'param_groups'"
        )
    saved_groups = state_dict["param_groups"]
    if len(live_groups) != len(saved_groups):
        raise ValueError(
            f"number of param groups: {len(saved_groups)} in the checkpoint, {len(live_groups)} in "
            "this optimizer"
        )
    all_names = _names_of_groups(state_dict)
    merged, places = [], []
    for number, (live, saved) in enumerate(zip(live_groups, saved_groups, strict=True)):
        here = f"param_groups[{number}]"
        if len(saved["params"]) != len(live["params"]):
            raise ValueError(
                f"{here}: number of parameters: {len(saved['params'])} in the checkpoint, "
                f"{len(live['params'])} in this optimizer"
            )
        algorithm = saved.get("algorithm", live["algorithm"])
        if algorithm != live["algorithm"]:
            raise ValueError(
                f"{here} is {algorithm!r} in the checkpoint but {live['algorithm']!r} in this "
                "optimizer"
            )
        own = (*PROGRAM_KEYS, *UNSAVED_KEYS, "params", NAMES_KEY)
        kept = {key: live[key] for key in own if key in live}
        options = {key: _option(key, value) for key, value in saved.items() if key not in own}
        names = all_names[number]
        order = list(range(len(live["params"])))
        if names is not None:
            live_names = live.get(NAMES_KEY)
            if live_names is not None:
                _check_same_group(here, live_names, number, all_names)
                order = _places_by_name(here, live_names, names)
            # Saved names win, as in any torch optimizer.
            kept[NAMES_KEY] = [names[place] for place in order]
        places.append(order)
        merged.append({**live, **options, **kept})
    return merged, places


def _names_of_groups(state_dict: Mapping[str, Any]) -> list[Names]:
    """For each saved group its names, or None if they do not help.

    If the parameters themselves are names, as in torch's distributed checkpoints, they are in order
    already; and one of several pipeline stages lists its own names for all.
    """
    groups = state_dict["param_groups"]
    apart = state_dict.get(NAMES_KEY) or [None] * len(groups)
    found: list[Names] = []
    for group, names_apart in zip(groups, apart, strict=True):
        names = group.get(NAMES_KEY) or names_apart
        are_keys = any(isinstance(key, str) for key in group["params"])
        fits = names is not None and len(names) == len(group["params"])
        found.append(names if fits and not are_keys else None)
    return found


def _check_same_group(here: str, live: Sequence[str], number: int, saved: Sequence[Names]) -> None:
    missing = {*map(bare_name, live)} - {*map(bare_name, saved[number] or ())}
    for other, names in enumerate(saved):
        moved = missing & {*map(bare_name, names or ())}
        if other != number and moved:
            raise ValueError(
                f"{here}: {sorted(moved)[0]!r} is in param_groups[{other}] of the checkpoint; "
                "build the groups in the saved order"
            )


def _places_by_name(here: str, live: Sequence[str], saved: Sequence[str]) -> list[int]:
    """For each live parameter its index among the saved ones; equal names match in order.

    Renamed parameters keep their position.
    """
    live, saved = list(map(bare_name, live)), list(map(bare_name, saved))
    if sorted(live) == sorted(saved):
        by_name: dict[str, list[int]] = {}
        for place, name in enumerate(saved):
            by_name.setdefault(name, []).append(place)
        return [by_name[name].pop(0) for name in live]
    elsewhere = [name for place, name in enumerate(live) if name != saved[place] and name in saved]
    if elsewhere:
        renamed = sorted(set(live) ^ set(saved))
        raise ValueError(
            f"{here}: {elsewhere[0]!r} has another position in the checkpoint, and {renamed} exist "
            "in only one of the two, so state can be matched neither by name nor by order; "
            "build the groups in the saved order"
        )
    return list(range(len(live)))


def check_state_is_owned(saved: Mapping[Any, Any], owned: Collection[object]) -> None:
    """Checks that the state in a checkpoint belongs to its parameters.

    Args:
        saved: the checkpoint's state.
        owned: the parameters in its groups.

    Raises:
        ValueError: none of it does, as after a detour through JSON, whose keys are strings.
    """
    if saved and not any(key in saved for key in owned):
        raise ValueError(
            f"the checkpoint's state belongs to none of its parameters: its first key is "
            f"{next(iter(saved))!r}, but the first parameter is {next(iter(owned), None)!r}"
        )


def loaded_state(group: Mapping[str, Any], index: int, saved: Mapping[str, Any]) -> State:
    """A parameter's state with the values of a checkpoint, on its device and in the group's dtypes.

    A parameter without state in the checkpoint starts at zero.

    Raises:
        ValueError: a tensor is missing or has another shape; names the parameter and both shapes.
    """
    label = param_label(group, index)
    state = initial_state(group["params"][index], group)
    if group["algorithm"] != "adamw":
        param = group["params"][index]
        saved = recoded(saved, param, view_of(group), momentum_dtype(param, group))
    for key, tensor in state.items() if saved else ():
        value = saved.get(key)
        if key in ("skipped_steps", "weight_residual", "momentum_roundings") and value is None:
            continue  # Turned on since the checkpoint was written: starts at zero.
        if key == "step" and isinstance(value, Real):
            value = torch.full((), float(value), device=tensor.device)
        if key in saved and not isinstance(value, Tensor):
            raise ValueError(
                f"{label}: the checkpoint's {key!r} is a {type(value).__name__}, not a tensor"
            )
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{label}: the checkpoint has no {key!r} for it (it has "
                f"{sorted(map(str, saved))}); it was written by another optimizer or algorithm"
            )
        if value.shape != tensor.shape:
            raise ValueError(
                f"{label}: the checkpoint's {key!r} has shape {list(value.shape)}, but this "
                f"parameter with its view needs {list(tensor.shape)}"
            )
        _copy_(tensor, value, group, index, key)
    return {**{k: v for k, v in saved.items() if k not in state}, **state}


def _copy_(tensor: Tensor, value: Tensor, group: Mapping[str, Any], index: int, key: str) -> None:
    """Fills a state, whose shape is that of the value, from a checkpoint's value."""
    if not is_dtensor(tensor):
        tensor.copy_(value)
        return
    from torch.distributed.tensor import DTensor

    from normuon.distributed.dtensor import copy_to_shards_

    param = group["params"][index]
    assert isinstance(tensor, DTensor)
    assert isinstance(param, DTensor)
    kept: Sequence[int] | None = range(param.ndim)
    view = view_of(group)
    if key in ("skipped_steps", "momentum_roundings"):
        kept = ()
    elif key == "momentum_absmax":
        kept = block_grid(view, tuple(param.shape)).line_dims
    elif group["algorithm"] != "adamw" and key not in PARAM_SHAPED:
        kept = view.vector_dims(param.shape, vector_dims_of(group, view, param)[key])
    assert kept is not None, "a flat list is no DTensor"
    copy_to_shards_(tensor, value, param=param, kept_dims=kept, label=param_label(group, index))
