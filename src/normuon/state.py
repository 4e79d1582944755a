"""The optimizer's state: which tensors each algorithm keeps, their shapes, dtypes and loading.

State exists from construction, so that a checkpoint's keys never depend on which gradients have
arrived. Spellings are torch.optim's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from normuon.flattened import USE_FSDP2, check_not_flattened
from normuon.matrix_view import DimOf, MatrixView
from normuon.options import STRUCTURE_KEYS, UNSAVED_KEYS, check_param, param_label
from normuon.step.normalizer import normalizer_of
from normuon.step.pieces import MatrixParam, State

_LINEAR = MatrixView.linear()


def is_dtensor(tensor: Tensor) -> bool:
    """Whether a tensor is sharded or replicated over a mesh, told without importing DTensor."""
    return hasattr(tensor, "placements")


def view_of(group: Mapping[str, Any]) -> MatrixView:
    """The group's view; without one, a matrix is its own."""
    view = group.get("view")
    return view if view is not None else _LINEAR


def initial_state(param: Tensor, group: Mapping[str, Any]) -> State:
    """The zero state of one parameter under its group's algorithm.

    - `normuon`: ``momentum_buffer`` (the parameter's shape, ``momentum_dtype`` or the parameter's)
      and ``second_momentum_buffer`` (one entry per neuron, at least float32): m (n + 1) elements.
    - `muon`: ``momentum_buffer``: m n elements.
    - `adamw`: torch's ``exp_avg``, ``exp_avg_sq`` and ``step``.

    With ``skip_nonfinite`` also ``skipped_steps``, one int32 count per matrix. The state of a
    DTensor is DTensors: placed like it, and replicated along dims that the state does not have.
    """
    if group["algorithm"] == "adamw":
        state = {
            # A float32 tensor beside its parameter, as torch's capturable and fused AdamW keep it.
            "step": torch.zeros((), dtype=torch.float32, device=param.device),
            "exp_avg": torch.zeros_like(param, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(param, memory_format=torch.preserve_format),
        }
        num_matrices = 1
    else:
        view = view_of(group)
        dtype = group["momentum_dtype"] or param.dtype
        state = {"momentum_buffer": _zeros_over(param, range(param.ndim), dtype)}
        for name, dim_of in vector_dims_of(group, view, param).items():
            state[name] = _vector(param, view, dim_of)
        num_matrices = sum(part.batch for part in view.parts(param.shape))
    if group["skip_nonfinite"]:
        state["skipped_steps"] = _replicated_counts(param, num_matrices)
    return {key: value.detach() for key, value in state.items()}


def vector_dims_of(group: Mapping[str, Any], view: MatrixView, param: Tensor) -> dict[str, DimOf]:
    """The vectors that a group's normalizer keeps for every matrix of a parameter."""
    normalizer = normalizer_of(group)
    names: dict[str, DimOf] = {}
    for part in view.parts(param.shape):
        for name in normalizer.state_dims(part.m, part.n):
            names[name] = lambda m, n, name=name: normalizer.state_dims(m, n)[name]  # type: ignore[misc]
    return names


def matrix_param(label: str, param: Tensor, group: Mapping[str, Any], state: State) -> MatrixParam:
    """A parameter of matrices and its state, as a step sees them."""
    view = view_of(group)
    dims = {
        name: view.vector_dims(param.shape, dim_of)
        for name, dim_of in vector_dims_of(group, view, param).items()
    }
    return MatrixParam(label, param, group, state, view, dims)


def _vector(param: Tensor, view: MatrixView, dim_of: DimOf) -> Tensor:
    dtype = torch.promote_types(param.dtype, torch.float32)
    dims = view.vector_dims(param.shape, dim_of)
    if dims is not None:
        return _zeros_over(param, dims, dtype)
    shape = view.vector_shape(param.shape, dim_of)
    return torch.zeros(shape, dtype=dtype, device=param.device)


def _zeros_over(param: Tensor, dims: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros over some dims of a parameter, sharded as the parameter is."""
    if is_dtensor(param):
        from normuon.distributed.dtensor import sharded_zeros

        return sharded_zeros(param, kept_dims=dims, dtype=dtype)
    return torch.zeros([param.shape[dim] for dim in dims], dtype=dtype, device=param.device)


def _replicated_counts(param: Tensor, num_matrices: int) -> Tensor:
    counts = torch.zeros(num_matrices, dtype=torch.int32, device=param.device)
    if is_dtensor(param):
        from normuon.distributed.dtensor import replicated_like

        return replicated_like(counts, param)
    return counts


def merged_groups(
    live_groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Saved hyperparameters on live parameters, views and callables.

    Raises:
        ValueError: another number of groups or parameters, or another algorithm.
    """
    if len(live_groups) != len(saved_groups):
        raise ValueError(
            f"the checkpoint has {len(saved_groups)} param groups and this optimizer "
            f"{len(live_groups)}"
        )
    merged = []
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
        own = (*STRUCTURE_KEYS, *UNSAVED_KEYS, "params", "param_names")
        kept = {key: live[key] for key in own if key in live}
        options = {key: value for key, value in saved.items() if key not in own}
        # Saved names win, as in any torch optimizer, if they are of this group's parameters: a
        # flattened checkpoint of several pipeline stages lists those of one stage.
        names = saved.get("param_names")
        if names and len(names) == len(live["params"]):
            kept["param_names"] = names
        merged.append({**live, **deepcopy(options), **kept})
    return merged


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
        if key == "skipped_steps" and value is None:
            continue  # Turned on since the checkpoint was written: counts from zero.
        if key == "step" and isinstance(value, (int, float)):
            value = torch.tensor(float(value))
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
    elif group["algorithm"] != "adamw" and key != "momentum_buffer":
        view = view_of(group)
        kept = view.vector_dims(param.shape, vector_dims_of(group, view, param)[key])
    assert kept is not None, "a flat list is no DTensor"
    copy_to_shards_(tensor, value, param=param, kept_dims=kept, label=param_label(group, index))


def check_param_fits(group: Mapping[str, Any], index: int, state: State) -> None:
    """Checks that a parameter still has the shape for which its state was made.

    Raises:
        ValueError: another shape.
    """
    param = group["params"][index]
    key = "exp_avg" if group["algorithm"] == "adamw" else "momentum_buffer"
    if state[key].shape != param.shape:
        label = param_label(group, index)
        check_not_flattened(label, param)
        raise ValueError(
            f"{label}: it had shape {list(state[key].shape)} when the optimizer was built; build "
            "the optimizer after whatever reshapes the model"
        )


def check_vectors_fit(group: Mapping[str, Any], states: Mapping[Tensor, State]) -> None:
    """Checks that a group still has the ``neuron_axis`` and the view for which its state was made.

    Raises:
        ValueError: another one, with which the second moments would have other shapes.
    """
    if group["algorithm"] == "adamw":
        return
    view = view_of(group)
    for index, param in enumerate(group["params"]):
        if states[param]["momentum_buffer"].shape != param.shape:
            continue  # `check_param_fits` says so.
        for name, dim_of in vector_dims_of(group, view, param).items():
            shape, needed = states[param][name].shape, view.vector_shape(param.shape, dim_of)
            if shape != needed:
                raise ValueError(
                    f"{param_label(group, index)}: its {name!r} has shape {list(shape)}, and "
                    f"neuron_axis={group['neuron_axis']!r} with its view needs {list(needed)}; "
                    "these two options cannot change once the optimizer is built"
                )


def adopt_params_(state: dict[Tensor, State], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Starts the state of parameters that have taken the place of others in the groups.

    Accelerate builds the optimizer first and puts FSDP2's shards into its groups later; DeepSpeed
    puts flat pieces there, which are refused.

    Args:
        state: the optimizer's; what belongs to no parameter of the groups any more is dropped.
        groups: the optimizer's.

    Returns:
        Whether there was any.

    Raises:
        ValueError: such a parameter cannot be trained by its group; names it.
    """
    adopted = False
    for group in groups:
        for index, param in enumerate(group["params"]):
            if param in state:
                continue
            _check_replacement(group, index)
            state[param] = initial_state(param, group)
            adopted = True
    if adopted:
        kept = {id(param) for group in groups for param in group["params"]}
        for param in [key for key in state if isinstance(key, Tensor) and id(key) not in kept]:
            del state[param]
    return adopted


def _check_replacement(group: Mapping[str, Any], index: int) -> None:
    param = group["params"][index]
    if group["algorithm"] != "adamw" and param.ndim < 2 and not is_dtensor(param):
        raise ValueError(
            f"{param_label(group, index)}: this took a matrix's place after the optimizer was "
            "built, as DeepSpeed ZeRO (stages 1 to 3) flattens a group into one vector; "
            f"{USE_FSDP2}, or DeepSpeed with zero_optimization.stage 0"
        )
    check_param(group, index)


def follow_param_(state: State, param: Tensor) -> bool:
    """Moves a parameter's state to the device that the parameter has been moved to.

    Returns:
        Whether anything was moved.
    """
    device, moved = param.device, False
    for key, value in state.items():
        if value.device != device:
            state[key] = value.to(device)
            moved = True
    return moved
