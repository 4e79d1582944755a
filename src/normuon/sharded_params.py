"""Parameters that several ranks share, and their state, as one rank's step sees them.

Grouped by the ranks that share them, because those ranks plan and exchange together. What the plan
does with them is `sharded_step.py`'s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from normuon.distributed.agreement import check_agreement, first_different_line
from normuon.distributed.cost import CostModel
from normuon.distributed.layout import Shards, axes_with_idle_ranks, group_of_mesh, shards_of
from normuon.distributed.region import Region
from normuon.distributed.task import MatrixTask
from normuon.matrix_tasks import dtype_name, second_moment_dims, tasks_of_param
from normuon.matrix_view import MatrixView
from normuon.options import MatrixOptions, param_label, planned_name
from normuon.orthogonalize import resolve_ns_dtype, transport_dtype
from normuon.state import view_of

MatrixState = dict[str, Tensor]

NO_GRADIENT, GRADIENT, NONFINITE = 0.0, 1.0, 2.0
"""What a rank says of its gradient; the largest that any rank says of a matrix decides."""


@dataclass(slots=True)
class ShardedParam:
    """One parameter of a group of ranks.

    Args:
        label: name and shape, the start of messages.
        name: as the plan lists it.
        param: a DTensor, or a plain tensor that every rank holds whole.
        group: its param group, read at every step.
        state: its state, written to.
        shards: which rank stores what.
        batch_key: equal for parameters whose matrices may share a batch, on every rank.
        view: how it becomes matrices.
        second_moment_dims: the parameter's dims that its second moments have.
    """

    label: str
    name: str
    param: Tensor
    group: Mapping[str, Any]
    state: MatrixState
    shards: Shards
    batch_key: str
    view: MatrixView
    second_moment_dims: tuple[int, ...]

    @property
    def options(self) -> MatrixOptions:
        return MatrixOptions.from_group(self.group)

    @property
    def ns_dtype(self) -> torch.dtype:
        device = self.param.device
        return resolve_ns_dtype(self.group["ns_dtype"], param_dtype=self.param.dtype, device=device)

    @property
    def wire_dtype(self) -> torch.dtype:
        """The dtype in which directions and their orthogonalisations travel."""
        return transport_dtype(self.ns_dtype)

    @property
    def stats_dtype(self) -> torch.dtype:
        """The dtype of second moments, scales and steps."""
        return torch.promote_types(self.param.dtype, torch.float32)

    @property
    def side_dtype(self) -> torch.dtype:
        """The dtype in which second moments, flags and scales travel: never narrower than wire."""
        return torch.promote_types(self.stats_dtype, self.wire_dtype)

    def local_gradient(self) -> Tensor | None:
        """This rank's shard of the gradient, or None."""
        grad = self.param.grad
        return None if grad is None else local_tensor(grad)

    def tasks(self) -> list[MatrixTask]:
        """The parameter's matrices for the planner."""
        options = self.options
        return tasks_of_param(
            self.name,
            self.param.shape,
            self.view,
            layout=self.shards.layout,
            neuron_axis=options.neuron_axis,
            normalizes_neurons=options.normalizes_neurons,
            key=self.batch_key,
            wire_dtype=dtype_name(self.wire_dtype),
            neuron_dtype=dtype_name(self.side_dtype),
        )

    def second_moment_slices(self, region: Region) -> tuple[slice, ...]:
        """Where the second moments of a region's neurons lie in the local state."""
        slices = self.shards.local_slices(region)
        return tuple(slices[dim] for dim in self.second_moment_dims)


def local_tensor(tensor: Tensor) -> Tensor:
    """A DTensor's shard on this rank; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gradient_flag(param: Tensor, skip_nonfinite: bool) -> Tensor:
    """``[1]``: what this rank says of a parameter's gradient, without waiting for the device."""
    if param.grad is None:
        return torch.full((1,), NO_GRADIENT, device=param.device)
    flag = torch.full((1,), GRADIENT, device=param.device)
    return flag_nonfinite(flag, local_tensor(param.grad)) if skip_nonfinite else flag


def flag_nonfinite(flag: Tensor, grad: Tensor) -> Tensor:
    """The flag, raised to `NONFINITE` if the gradient holds a NaN or an infinity."""
    if not grad.numel():
        return flag
    finite = torch.isfinite(torch.linalg.vector_norm(grad, ord=float("inf")))
    return torch.where(finite, flag, NONFINITE)


def _options_text(group: Mapping[str, Any], param: Tensor) -> str:
    """Everything about a group that ranks must agree on, in words that are equal on all of them."""
    options = MatrixOptions.from_group(group)
    fields = {name: getattr(options, name) for name in options.__slots__}
    del fields["max_scratch_bytes"]
    chosen = fields["orthogonalizer"]
    if callable(chosen):
        # Its repr would hold an address, which differs between processes.
        fields["orthogonalizer"] = getattr(chosen, "__qualname__", type(chosen).__qualname__)
    return f"{fields}, {dtype_name(param.dtype)}"


def check_shared_params(
    groups: Sequence[Mapping[str, Any]], *, process_group: dist.ProcessGroup | None
) -> None:
    """Checks that ranks share the same parameters under the same algorithms, before any exchange.

    `adamw` groups are included: ranks that list other parameters than each other would issue
    collectives of different sizes.

    Raises:
        ValueError: on every rank that shares parameters, naming the first that differs; or on this
            one, naming a parameter on another device than the rest.
    """
    lists: dict[dist.ProcessGroup, list[str]] = {}
    devices: dict[dist.ProcessGroup, torch.device] = {}
    for number, group in enumerate(groups):
        for index, param in enumerate(group["params"]):
            shared_by = group_that_shares(param, process_group)
            if shared_by is None:
                continue
            line = f"group {number} ({group['algorithm']}): {param_label(group, index)}"
            lists.setdefault(shared_by, []).append(f"{line} {dtype_name(param.dtype)}")
            device = local_tensor(param).device
            if devices.setdefault(shared_by, device) != device:
                raise ValueError(
                    f"{param_label(group, index)}: it is on {device}, and others that the same "
                    f"ranks share are on {devices[shared_by]}; move the model to one device"
                )
    for shared_by, lines in lists.items():
        check_agreement(
            shared_by,
            "\n".join(lines),
            device=devices[shared_by],
            difference=first_different_line,
        )


def group_that_shares(
    param: Tensor, process_group: dist.ProcessGroup | None
) -> dist.ProcessGroup | None:
    """The ranks that share a parameter; None for one that is this rank's own."""
    return group_of_mesh(param.device_mesh) if isinstance(param, DTensor) else process_group


def sharded_params(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, MatrixState],
    *,
    process_group: dist.ProcessGroup | None,
) -> list[list[ShardedParam]]:
    """The matrices that several ranks share, one list for each set of ranks.

    Args:
        groups: all param groups; `adamw` groups are passed over.
        state: the optimizer's.
        process_group: the ranks that hold plain tensors alike; None leaves those to this rank.

    Returns:
        Lists in order of first appearance, which is the same on every rank of a list.

    Raises:
        ValueError: a placement or view that cannot be exchanged; names the parameter.
    """
    by_ranks: dict[tuple[int, ...], list[ShardedParam]] = {}
    for number, group in enumerate(groups):
        if group["algorithm"] == "adamw":
            continue
        view = view_of(group)
        for index, param in enumerate(group["params"]):
            if not isinstance(param, DTensor) and process_group is None:
                continue
            label = param_label(group, index)
            shards = shards_of(param, label=label, process_group=process_group)
            dims = second_moment_dims(view, param.shape, group["neuron_axis"])
            if dims is None:
                raise ValueError(
                    f"{label}: neuron_axis='short' with a view that splits the parameter is not "
                    "supported for parameters that ranks share; use neuron_axis='row'"
                )
            name = planned_name(group, number, index)
            # By param group, because each one's options may change at any step.
            key = f"group {number}: {_options_text(group, param)}"
            ranks = tuple(dist.get_process_group_ranks(shards.group))
            by_ranks.setdefault(ranks, []).append(
                ShardedParam(label, name, param, group, state[param], shards, key, view, dims)
            )
    return list(by_ranks.values())


def idle_second_moment_axes(entry: ShardedParam) -> list[int]:
    """Mesh axes along which some rank holds second moments but no part of the matrix."""
    if not isinstance(entry.param, DTensor) or "second_momentum_buffer" not in entry.state:
        return []
    return axes_with_idle_ranks(
        entry.param, entry.shards.layout, kept_dims=entry.second_moment_dims
    )


def cost_model_for(params: Sequence[ShardedParam]) -> CostModel:
    """FLOPs of the orthogonaliser in use, and rough rates of the device.

    The rates decide only whether replicas compute a matrix once or each for itself; they are
    constants by device type, because every rank must decide alike.
    """
    # One count serves the whole plan: the longest iteration's, where groups differ.
    entry = max(params, key=lambda entry: len(entry.options.coefficients))
    device_type = entry.param.device.type
    flops = partial(entry.options.flops, dtype=entry.ns_dtype, device_type=device_type)
    if device_type == "cpu":
        # One thread of a CPU, and Gloo over loopback or a 10 Gbit/s network.
        return CostModel(
            flops=flops, flops_per_second=5e10, bytes_per_second=1e9, latency_seconds=2e-4
        )
    return CostModel(flops=flops)
