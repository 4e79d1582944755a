"""The optimizer's state: the tensors of each algorithm, their shapes, dtypes and devices.

State exists from construction, so that a checkpoint's keys never depend on which gradients have
arrived. Spellings are torch.optim's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normuon.models.blocks import block_grid
from normuon.models.view import DimOf, MatrixView
from normuon.models.wrappers import USE_FSDP2, check_not_flattened
from normuon.momentum_forms import MOMENTUM_KEYS, is_dtensor, momentum_of, recoded
from normuon.orthogonalize.fused import why_not_fused
from normuon.params import check_compute_device, check_param, param_label
from normuon.step.normalizer import normalizer_of
from normuon.step.pieces import MatrixParam, State, local_tensor

_LINEAR = MatrixView.linear()


def view_of(group: Mapping[str, Any]) -> MatrixView:
    """The group's view; without one, a matrix is its own."""
    view = group.get("view")
    return view if view is not None else _LINEAR


def initial_state(param: Tensor, group: Mapping[str, Any]) -> State:
    """The zero state of one parameter under its group's algorithm.

    - `normuon`: ``momentum_buffer`` (the parameter's shape, in `momentum_dtype`)
      and ``second_momentum_buffer`` (one entry per neuron, at least float32): m (n + 1) elements.
    - `muon`: ``momentum_buffer``: m n elements.
    - In place of ``momentum_buffer``, if `momentum_dtype` is int8: ``momentum_codes``, int8, of the
      parameter's shape; ``momentum_absmax``, at least float32, the largest magnitude of each block
      (see `block_grid`); and ``momentum_roundings``, an int32 count per matrix.
    - `adamw`: torch's ``exp_avg``, ``exp_avg_sq`` and ``step``.

    With ``kahan_sum`` parameters of less than 32 bits also have a ``weight_residual`` like them,
    with ``skip_nonfinite`` all have ``skipped_steps``, an int32 count per matrix. The state of a
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
        num_matrices = sum(part.batch for part in view.parts(param.shape))
        state = _initial_momentum(param, view, momentum_dtype(param, group), num_matrices)
        for name, dim_of in vector_dims_of(group, view, param).items():
            state[name] = _vector(param, view, dim_of)
    if keeps_residual(param, group):
        state["weight_residual"] = torch.zeros_like(param, memory_format=torch.preserve_format)
    if group["skip_nonfinite"]:
        state["skipped_steps"] = _replicated_counts(param, num_matrices)
    # DTensors are made where their mesh is; offloaded parameters keep their state on the host.
    return {key: value.detach().to(param.device) for key, value in state.items()}


def _initial_momentum(
    param: Tensor, view: MatrixView, dtype: torch.dtype, num_matrices: int
) -> State:
    if dtype != torch.int8:
        return {"momentum_buffer": _zeros_over(param, range(param.ndim), dtype)}
    grid = block_grid(view, tuple(param.shape))
    return {
        "momentum_codes": _zeros_over(param, range(param.ndim), dtype),
        "momentum_absmax": _zeros_over(
            param, grid.line_dims, stats_dtype(param), more=(grid.num_blocks,)
        ),
        "momentum_roundings": _replicated_counts(param, num_matrices),
    }


def stats_dtype(param: Tensor) -> torch.dtype:
    """The dtype of what is kept per neuron and per block."""
    return torch.promote_types(param.dtype, torch.float32)


def keeps_residual(param: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether the group keeps the rounding error of a parameter: only in less than 32 bits."""
    return bool(group["kahan_sum"]) and param.dtype.itemsize < 4


def missing_keys(state: State, param: Tensor, group: Mapping[str, Any]) -> list[str]:
    """State that is missing because options were turned on after it was made."""
    wanted = {
        "skipped_steps": group["skip_nonfinite"],
        "weight_residual": keeps_residual(param, group),
    }
    return [key for key, needed in wanted.items() if needed and key not in state]


def momentum_dtype(param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The group's ``momentum_dtype``, or the parameter's dtype, but float32 for float16.

    In float16 the momentum of gradients below 6e-8 / (1 - b1) is zero, and the direction of those a
    little above is noise; in bfloat16, which has float32's exponents, a step is free of scale.
    """
    given: torch.dtype | None = group["momentum_dtype"]
    if given is not None:
        return given
    return torch.float32 if param.dtype == torch.float16 else param.dtype


def _state_dtype(key: str, param: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    if key in ("skipped_steps", "momentum_roundings"):
        return torch.int32
    if key == "weight_residual":
        return param.dtype
    if group["algorithm"] == "adamw":
        return torch.float32 if key == "step" else param.dtype
    if key in ("momentum_buffer", "momentum_codes"):
        return momentum_dtype(param, group)
    return stats_dtype(param)


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
    shares = False
    if is_dtensor(param) and "momentum_codes" in state:
        from normuon.distributed.dtensor import is_sharded_along

        shares = is_sharded_along(param, block_grid(view, tuple(param.shape)).block_dims)
    return MatrixParam(label, param, group, state, view, dims, shares)


def compute_device_of(label: str, param: Tensor, group: Mapping[str, Any]) -> torch.device:
    """The device on which a parameter's matrices are orthogonalised and exchanged.

    Its own device, if that is an accelerator. For a parameter on the host the group's
    ``compute_device``, or the current device of its mesh's type.

    Raises:
        ValueError: it cannot be moved there, this machine has no such device, or its group needs
            kernels that do not run on the host; names it.
    """
    own, given = local_tensor(param).device, group["compute_device"]
    mesh = getattr(param, "device_mesh", None)
    if given is None and mesh is None:
        return own
    check_compute_device(label, param, given)
    if own.type != "cpu":
        return own
    wanted = torch.device(given if mesh is None or given is not None else mesh.device_type)
    if wanted.type == "cpu":
        return own
    module = torch.get_device_module(wanted)
    if not module.is_available():
        raise ValueError(
            f"{label}: its matrices need the compute_device {str(wanted)!r}, which torch does not "
            "find on this machine"
        )
    if group["fused"]:
        raise ValueError(
            f"{label}: fused=True, but its weights are on the host, where Triton kernels do not "
            "run; leave fused=None"
        )
    index = module.current_device() if wanted.index is None else wanted.index
    return torch.device(wanted.type, index)


def check_runs_fused(label: str, param: Tensor) -> None:
    """Checks that ``fused=True`` can be kept on a parameter's device.

    Raises:
        ValueError: Triton kernels do not run there; names the parameter.
    """
    reason = why_not_fused(local_tensor(param).device.type)
    if reason is not None:
        raise ValueError(f"{label}: fused=True, but {reason}; fused=None fuses where possible")


def _vector(param: Tensor, view: MatrixView, dim_of: DimOf) -> Tensor:
    dtype = stats_dtype(param)
    dims = view.vector_dims(param.shape, dim_of)
    if dims is not None:
        return _zeros_over(param, dims, dtype)
    shape = view.vector_shape(param.shape, dim_of)
    return torch.zeros(shape, dtype=dtype, device=param.device)


def _zeros_over(
    param: Tensor, dims: Sequence[int], dtype: torch.dtype, more: Sequence[int] = ()
) -> Tensor:
    """Zeros over some dims of a parameter, sharded as the parameter is, and dims of other sizes."""
    if is_dtensor(param):
        from normuon.distributed.dtensor import sharded_zeros

        return sharded_zeros(param, kept_dims=dims, dtype=dtype, more=more)
    sizes = [*(param.shape[dim] for dim in dims), *more]
    return torch.zeros(sizes, dtype=dtype, device=param.device)


def _replicated_counts(param: Tensor, num_matrices: int) -> Tensor:
    counts = torch.zeros(num_matrices, dtype=torch.int32, device=param.device)
    if is_dtensor(param):
        from normuon.distributed.dtensor import replicated_like

        return replicated_like(counts, param)
    return counts


def _recode_live_(state: State, param: Tensor, group: Mapping[str, Any]) -> None:
    """Changes the form of a momentum whose group's ``momentum_dtype`` was changed in a run.

    Raises:
        ValueError: the parameter is sharded, so a rank has only a part of it.
    """
    if is_dtensor(param):
        index = next(index for index, other in enumerate(group["params"]) if other is param)
        raise ValueError(
            f"{param_label(group, index)}: momentum_dtype has become {group['momentum_dtype']}, "
            "which a sharded momentum cannot follow during a run; build a NorMuon with it and give "
            "that convert_state(old, to=new) to load"
        )
    fresh = initial_state(param, group)
    new = recoded(state, param, view_of(group), momentum_dtype(param, group))
    for key in MOMENTUM_KEYS:
        state.pop(key, None)
        if key in fresh:
            state[key] = new.get(key, fresh[key])


def _largest(state: State, group: Mapping[str, Any]) -> Tensor:
    return state["exp_avg"] if group["algorithm"] == "adamw" else momentum_of(state)


def check_param_fits(group: Mapping[str, Any], index: int, state: State) -> None:
    """Checks that a parameter still has the shape for which its state was made.

    Raises:
        ValueError: another shape.
    """
    param = group["params"][index]
    largest = _largest(state, group)
    if largest.shape != param.shape:
        label = param_label(group, index)
        check_not_flattened(label, param)
        raise ValueError(
            f"{label}: its shape was {list(largest.shape)} when the optimizer was built; "
            "reshape the model first, then build the optimizer"
        )


def check_vectors_fit(group: Mapping[str, Any], states: Mapping[Tensor, State]) -> None:
    """Checks that a group still has the algorithm, ``neuron_axis`` and view of its state.

    Raises:
        ValueError: one of them has changed, so the state would have other entries or shapes.
    """
    is_adamw, view = group["algorithm"] == "adamw", view_of(group)
    for index, param in enumerate(group["params"]):
        state = states[param]
        fits = "exp_avg" in state if is_adamw else any(key in state for key in MOMENTUM_KEYS)
        vectors: Mapping[str, DimOf] = {}
        if fits and not is_adamw:
            if momentum_of(state).shape != param.shape:
                continue  # `check_param_fits` says so.
            vectors = vector_dims_of(group, view, param)
        if not fits or any(name not in state for name in vectors):
            raise ValueError(
                f"{param_label(group, index)}: its state has {sorted(state)}, which is not that of "
                f"algorithm={group['algorithm']!r}; the algorithm cannot change after the "
                "optimizer is built: build another, and give it convert_state(old, to=new) to load"
            )
        for name, dim_of in vectors.items():
            shape, needed = state[name].shape, view.vector_shape(param.shape, dim_of)
            if shape != needed:
                raise ValueError(
                    f"{param_label(group, index)}: its {name!r} has shape {list(shape)}, but "
                    f"neuron_axis={group['neuron_axis']!r} and its view need {list(needed)}; "
                    "neither option can change after the optimizer is built"
                )


def adopt_params_(state: dict[Tensor, State], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Starts the state of parameters that have taken the place of others in the groups.

    Accelerate builds the optimizer first and puts FSDP2's shards into its groups later; DeepSpeed
    puts flat pieces there, which are an error.

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
            if state.get(param):  # An empty one is left by those who only looked.
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
            f"{param_label(group, index)}: this vector replaced a matrix after the optimizer was "
            "built, as DeepSpeed ZeRO (stages 1 to 3) does; "
            f"{USE_FSDP2}, or DeepSpeed with zero_optimization.stage 0"
        )
    check_param(group, index)


def follow_param_(state: State, param: Tensor, group: Mapping[str, Any]) -> bool:
    """Brings a parameter's state to the device and the dtype that the parameter has now.

    State on the meta device, which has no values, starts at zero.

    Returns:
        Whether anything was changed.

    Raises:
        ValueError: the group's ``momentum_dtype`` changed to or from int8, and the parameter is
            sharded; names it.
    """
    followed = _largest(state, group)  # The others have gone wherever it went.
    is_adamw = group["algorithm"] == "adamw"
    wanted = param.dtype if is_adamw else momentum_dtype(param, group)
    if followed.device == param.device and followed.dtype == wanted:
        return False
    fresh = initial_state(param, group)
    if not is_adamw and (followed.dtype == torch.int8) != (wanted == torch.int8):
        _recode_live_(state, param, group)
    for key, value in state.items():
        if key not in fresh:  # A user's own.
            state[key] = value.to(param.device) if isinstance(value, Tensor) else value
        elif value.is_meta and not param.is_meta:
            state[key] = fresh[key]
        else:
            state[key] = value.to(param.device, _state_dtype(key, param, group))
    return True
