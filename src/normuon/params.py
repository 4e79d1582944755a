"""The parameters of a group: what messages and plans call them, and which ones it can train."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from normuon.models.wrappers import check_not_flattened
from normuon.options import check_options


def param_label(group: Mapping[str, Any], index: int) -> str:
    """A parameter's name, if it has one, and its shape: the start of every message about it."""
    names = group.get("param_names")
    name = names[index] if names else f"params[{index}] of a {group['algorithm']!r} group"
    return f"{name} {list(group['params'][index].shape)}"


def planned_name(group: Mapping[str, Any], number: int, index: int) -> str:
    """A parameter's name in a plan, equal on every rank: its name, or its group and index."""
    names = group.get("param_names")
    return names[index] if names else f"group {number} parameter {index}"


def check_params(params: object) -> None:
    """Checks that the optimizer did not get a module.

    Raises:
        TypeError: a module.
    """
    if isinstance(params, torch.nn.Module):
        raise TypeError(
            f"NorMuon needs parameters, but got a {type(params).__name__}: pass "
            "normuon.param_groups(model)"
        )


def check_group(group: Mapping[str, Any]) -> None:
    """Checks a param group as the user gave it, defaults filled in: options and parameters.

    Raises:
        ValueError: names the option or the parameter, and what to do.
    """
    check_options(group)
    params = group["params"]
    entries = [params] if isinstance(params, Tensor) else list(params)
    named = [entry for entry in entries if isinstance(entry, tuple)]
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return  # torch's own add_param_group says it best.
    labelled = {**group, "params": tensors}
    if len(named) == len(entries):
        labelled["param_names"] = [name for name, _ in named]
    for index in range(len(tensors)):
        check_param(labelled, index)


def check_param(group: Mapping[str, Any], index: int) -> None:
    """Checks that a group's algorithm and view can train one of its parameters.

    Raises:
        ValueError: names the parameter and what to do.
    """
    label, param = param_label(group, index), group["params"][index]
    check_trainable_tensor(label, param)
    check_compute_device(label, param, group["compute_device"])
    if group["algorithm"] != "adamw":
        check_matrix_param(label, param, group)


def check_compute_device(label: str, param: Tensor, given: torch.device | str | None) -> None:
    """Checks that a parameter's matrices can be moved to its group's compute device.

    Raises:
        ValueError: its mesh has another device type, or it is on another accelerator already; names
            the parameter.
    """
    mesh = getattr(param, "device_mesh", None)
    if given is None or param.is_meta:
        return
    wanted = torch.device(given)
    if mesh is not None and mesh.device_type != wanted.type:
        raise ValueError(
            f"{label}: compute_device={str(given)!r}, but the parameter's mesh has "
            f"{mesh.device_type} devices; leave compute_device=None"
        )
    own = param.device
    same = wanted.type == own.type and wanted.index in (None, own.index)
    if own.type != "cpu" and not same:
        raise ValueError(
            f"{label}: compute_device={str(given)!r}, but the parameter is on {own}; this "
            "option is for parameters on the host: leave compute_device=None"
        )


def check_matrix_param(label: str, param: Tensor, group: Mapping[str, Any]) -> None:
    """Checks that a parameter can be seen as matrices by its group's view.

    Args:
        label: the parameter's name and shape, the start of every message.
        param: the parameter.
        group: the group it is in, defaults filled in.

    Raises:
        ValueError: too few dims, more than two dims and no view, or a view that does not fit.
    """
    algorithm, view = group["algorithm"], group.get("view")
    if param.ndim < 2:
        raise ValueError(
            f"{label}: a {algorithm!r} group takes matrices, but this parameter has {param.ndim} "
            "dim(s); put it in a group with 'algorithm': 'adamw', or let "
            "normuon.param_groups(model) decide"
        )
    if view is None:
        if param.ndim > 2:
            raise ValueError(
                f"{label}: {param.ndim} dims may be a convolution or a batch of experts; put "
                "'view': MatrixView.conv() or MatrixView.experts() into its group, or let "
                "normuon.param_groups(model) decide"
            )
        return
    try:
        view.parts(param.shape)
    except ValueError as error:
        raise ValueError(f"{label}: the group's view does not fit: {error}") from None


def check_trainable_tensor(label: str, param: Tensor) -> None:
    """Checks that a parameter is not flattened, another rank's, complex, sparse or integer.

    Raises:
        ValueError: names the parameter and what it is.
    """
    check_not_flattened(label, param)
    mesh = getattr(param, "device_mesh", None)
    if mesh is not None and mesh.get_coordinate() is None:
        raise ValueError(
            f"{label}: this rank is not part of the parameter's mesh {mesh}; give the optimizer "
            "only parameters that this rank stores"
        )
    if param.is_complex():
        raise ValueError(
            f"{label}: complex parameters are not supported; optimise torch.view_as_real of it "
            "with another optimizer"
        )
    if param.layout != torch.strided:
        raise ValueError(f"{label}: sparse parameters ({param.layout}) are not supported")
    if not param.is_floating_point():
        raise ValueError(f"{label}: {param.dtype} parameters cannot be optimised")
