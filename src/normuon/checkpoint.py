"""What a `state_dict` says of an optimizer, and how it is fitted to one that is alive.

A saved group holds None, numbers, strings, booleans, lists and tuples only (and what schedulers and
users put there), so that any loader and torch's distributed checkpoints take it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from normuon.models.wrappers import bare_name
from normuon.options import PROGRAM_KEYS, UNSAVED_KEYS, param_label
from normuon.state import initial_state, is_dtensor, vector_dims_of, view_of
from normuon.step.pieces import State

NAMES_KEY = "param_names"
Names = Sequence[str] | None


def saved_form(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch's `Optimizer.state_dict` gave, in plain types; written to and returned.

    Names move from the groups, which keep an empty list, to ``state_dict["param_names"]``,
    one list per group: a flattened distributed checkpoint repeats what a group says once for each
    of its parameters, and asks for every key that a live group has.
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
    """A group's value in plain types; what is not loaded again is described in words.

    Of reasons it says nothing: a flattened checkpoint would repeat them for each parameter.
    """
    if key == "reasons":
        return ""
    if key == NAMES_KEY:
        return []
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if key in PROGRAM_KEYS and not isinstance(value, (str, int, type(None))):
        return getattr(value, "__qualname__", None) or str(value)
    return value


def _option(key: str, value: object) -> object:
    """An option as a group has it, from what `_plain` made of it or from the option itself."""
    if key.endswith("_dtype") and isinstance(value, str):
        return getattr(torch, value.removeprefix("torch."))
    return deepcopy(value)


def merged_groups(
    live_groups: Sequence[Mapping[str, Any]], state_dict: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Saved hyperparameters on live parameters, and where the state of each of them was saved.

    What describes the model, the program or the machine (`PROGRAM_KEYS`) stays as it is.

    Args:
        live_groups: the optimizer's.
        state_dict: a saved one.

    Returns:
        The new groups; and for each, for each of its parameters, the saved parameter's place.

    Raises:
        ValueError: another number of groups or parameters, another algorithm, or names that are
            partly those of other places.
    """
    saved_groups = state_dict["param_groups"]
    if len(live_groups) != len(saved_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} param groups and this optimizer "
            f"{len(live_groups)}"
        )
    all_names = _names_of_groups(state_dict)
    merged, places = [], []
    for number, (live, saved) in enumerate(zip(live_groups, saved_groups, strict=True)):
        here = f"param_groups[{number}]"
        if len(saved["params"]) != len(live["params"]):
            raise ValueError(
                f"{here} has {len(saved['params'])} parameters in the checkpoint and "
                f"{len(live['params'])} in this optimizer"
            )
        algorithm = saved.get("algorithm", live["algorithm"])
        if algorithm != live["algorithm"]:
            raise ValueError(
                f"{here} is {algorithm!r} in the checkpoint and {live['algorithm']!r} in this "
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
    """For each saved group its names, or None where they tell nothing.

    Where the parameters themselves are names, as in torch's distributed checkpoints, they have been
    put in order by these; and one of several pipeline stages lists its own names for all.
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
                f"{here}: {sorted(moved)[0]!r} is in param_groups[{other}] of the checkpoint; give "
                "the groups in the order in which they were saved"
            )


def _places_by_name(here: str, live: Sequence[str], saved: Sequence[str]) -> list[int]:
    """For each live parameter its place among the saved ones; equal names match in order.

    Parameters that have been renamed stay where they are.
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
            f"{here}: {elsewhere[0]!r} has another place in the checkpoint, and {renamed} are "
            "named in one of the two only, so neither names nor order say whose state is whose; "
            "build the groups in the order in which they were saved"
        )
    return list(range(len(live)))


def loaded_state(group: Mapping[str, Any], index: int, saved: Mapping[str, Any]) -> State:
    """A parameter's state with the values of a checkpoint, on its device and in the group's dtypes.

    A parameter that the checkpoint knows nothing of starts at zero, as it would have there.

    Raises:
        ValueError: a tensor is missing or has another shape; names the parameter and both shapes.
    """
    label = param_label(group, index)
    state = initial_state(group["params"][index], group)
    for key, tensor in state.items() if saved else ():
        value = saved.get(key)
        if key in ("skipped_steps", "weight_residual") and value is None:
            continue  # Turned on since the checkpoint was written: starts at zero.
        if key == "step" and isinstance(value, (int, float)):
            value = torch.full((), float(value), device=tensor.device)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{label}: the checkpoint has no {key!r} for it (it has "
                f"{sorted(map(str, saved))}); it was written by another optimizer or algorithm"
            )
        if value.shape != tensor.shape:
            raise ValueError(
                f"{label}: the checkpoint's {key!r} has shape {list(value.shape)}, and this "
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
    if key == "skipped_steps":
        kept = ()
    elif group["algorithm"] != "adamw" and key not in ("momentum_buffer", "weight_residual"):
        view = view_of(group)
        kept = view.vector_dims(param.shape, vector_dims_of(group, view, param)[key])
    assert kept is not None, "a flat list is no DTensor"
    copy_to_shards_(tensor, value, param=param, kept_dims=kept, label=param_label(group, index))
