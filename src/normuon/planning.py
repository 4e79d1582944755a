"""Makes the plan of a distributed step from param groups, without training."""

from __future__ import annotations

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from normuon.distributed.assignment import Balance
from normuon.distributed.cost import CostModel
from normuon.distributed.layout import Placement, layout_from_placements
from normuon.distributed.plan import DEFAULT_BUCKET_BYTES, Plan, make_plan
from normuon.distributed.task import MatrixTask
from normuon.distributed.teams import Teams
from normuon.momentum_forms import is_dtensor
from normuon.optimizer import NorMuon
from normuon.options import OPTIONS, MatrixOptions, check_options, check_sharing
from normuon.orthogonalize import NS_DTYPES, transport_dtype
from normuon.params import check_matrix_param, param_label, planned_name
from normuon.state import view_of
from normuon.step.matrix_tasks import tasks_of_param, wire_dtypes
from normuon.step.pieces import State

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Placements: TypeAlias = Sequence[Placement] | Callable[[str, Tensor], Sequence[Placement]]
"""One placement per mesh axis, for all parameters or as a function of a parameter and its name."""


def plan_for(
    groups: Iterable[Mapping[str, Any]],
    *,
    mesh_shape: Sequence[int] | None = None,
    placements: Placements | None = None,
    process_group: ProcessGroup | None = None,
    cost_model: CostModel | None = None,
    balance: Balance = "flops",
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    teams: Teams = "off",
    wire_dtype: torch.dtype | None = None,
) -> Plan:
    """The plan with which `NorMuon` would step the matrices of these groups.

    With `mesh_shape` and `placements` only names and shapes are read: parameters may be on the
    meta device, without processes or GPUs. Without them, the layout is the parameters' own, as in
    the optimizer: DTensors' meshes, or `process_group` for plain parameters; then call it on one
    or more ranks. `adamw` groups are ignored.

    Args:
        groups: from `param_groups`, or an optimizer's `param_groups`; missing options take
            `NorMuon`'s defaults.
        mesh_shape: size of every mesh axis; ranks are numbered row-major.
        placements: one per mesh axis, spelled `("replicate",)`, `("shard", dim)` or
            `("strided_shard", dim, split_factor)` (FSDP2 over TP on one dim); or a function of a
            parameter's name and tensor that returns them.
        process_group: the ranks that replicate plain parameters, as `NorMuon`'s.
        cost_model: rates and latency. None: `CostModel`'s defaults, or the device's if the layout
            is the parameters' own.
        balance: "flops" or "paper", as `NorMuon`'s.
        bucket_bytes: as `NorMuon`'s.
        teams: as `NorMuon`'s.
        wire_dtype: dtype of matrices on the wire. None: the groups' `ns_dtype`; if that is None
            too, bfloat16 for given placements (assumed on accelerators), else the device's.

    Returns:
        The plan: owners, buckets, FLOPs by rank. `normuon plan` prints it, with its bytes, memory
        and time.

    Raises:
        ValueError: no shared matrix, parameters on different sets of ranks, an option out of range,
            or a placement that does not fit; names the parameter.

    Example:
        >>> import normuon
        >>> layers = [torch.nn.Linear(8, 6), torch.nn.Linear(6, 8), torch.nn.Linear(8, 2)]
        >>> groups = normuon.param_groups(torch.nn.Sequential(*layers))
        >>> plan = normuon.plan_for(groups, mesh_shape=(2,), placements=[("shard", 0)])
        >>> plan.owners, plan.imbalance
        (((0,), (1,)), 1.0)
    """
    if (mesh_shape is None) != (placements is None):
        raise ValueError("mesh_shape and placements go together: pass both or neither")
    check_sharing(balance, bucket_bytes, teams)
    if wire_dtype is not None and wire_dtype not in NS_DTYPES:
        raise ValueError(f"wire_dtype={wire_dtype!r}: pass None or one of {NS_DTYPES}")
    filled = [_with_defaults(group) for group in groups]
    if mesh_shape is None or placements is None:
        tasks, world_size, model = _live_tasks(filled, process_group)
    else:
        tasks = [
            task
            for number, group in enumerate(filled)
            for task in _placed_tasks(group, number, mesh_shape, placements, wire_dtype)
        ]
        world_size, model = math.prod(mesh_shape), None
    if not tasks:
        raise ValueError(
            "these groups have no hidden matrix that ranks share; pass groups with 'algorithm': "
            "'normuon' whose parameters are DTensors, or mesh_shape and placements, or the "
            "process_group that replicates them"
        )
    return make_plan(
        tasks,
        world_size=world_size,
        cost_model=cost_model or model,
        balance=balance,
        bucket_bytes=bucket_bytes,
        teams=teams,
    )


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(NorMuon).parameters.items()
    if name in OPTIONS and parameter.default is not inspect.Parameter.empty
}


def _with_defaults(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group as the optimizer would hold it: options filled in and checked, names apart."""
    entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    filled = {"algorithm": "normuon", **_DEFAULTS, **group}
    filled["params"] = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
    if entries and all(isinstance(entry, tuple) for entry in entries):
        filled["param_names"] = [entry[0] for entry in entries]
    check_options(filled)
    if filled["algorithm"] != "adamw":
        for index, param in enumerate(filled["params"]):
            check_matrix_param(param_label(filled, index), param, filled)
    return filled


def _live_tasks(
    groups: Sequence[Mapping[str, Any]], process_group: ProcessGroup | None
) -> tuple[list[MatrixTask], int, CostModel | None]:
    """Tasks, world size and cost model of the live step, which has one plan per set of ranks."""
    tensors = [param for group in groups for param in group["params"]]
    given = [group.get("process_group", process_group) for group in groups]
    if not any(given) and not any(map(is_dtensor, tensors)):
        return [], 1, None
    # Only what ranks share needs torch.distributed.
    from normuon.step.shared_params import shared_params

    no_state: defaultdict[Tensor, State] = defaultdict(dict)
    found = [
        shared
        for shared in shared_params(groups, no_state, process_group=process_group)
        if shared.matrices
    ]
    if len(found) > 1:
        firsts = "; ".join(shared.matrices[0].owner.label for shared in found)
        raise ValueError(
            f"the parameters are on {len(found)} different sets of ranks (the first of each: "
            f"{firsts}), and each set has its own plan; pass the groups of one set at a time"
        )
    if not found:
        return [], 1, None
    tasks = [task for matrix in found[0].matrices for task in matrix.tasks()]
    return tasks, found[0].matrices[0].shards.layout.world_size, found[0].cost_model()


def _placed_tasks(
    group: Mapping[str, Any],
    number: int,
    mesh_shape: Sequence[int],
    placements: Placements,
    wire_dtype: torch.dtype | None,
) -> list[MatrixTask]:
    if group["algorithm"] == "adamw":
        return []
    options = MatrixOptions.from_group(group)
    tasks = []
    for index, param in enumerate(group["params"]):
        name = planned_name(group, number, index)
        chosen = placements(name, param) if callable(placements) else placements
        try:
            layout = layout_from_placements(param.shape, mesh_shape=mesh_shape, placements=chosen)
        except ValueError as error:
            raise ValueError(f"{param_label(group, index)}: {error}") from None
        # Given placements are of accelerators, which compute in bfloat16 what is not float64.
        computed = torch.float64 if param.dtype == torch.float64 else torch.bfloat16
        ns_dtype = group["ns_dtype"] or computed
        tasks += tasks_of_param(
            name,
            param.shape,
            view_of(group),
            place=(number, index),
            layout=layout,
            options=options,
            param_dtype=param.dtype,
            ns_dtype=ns_dtype,
            device_type="cuda",
            wire=wire_dtypes(wire_dtype or transport_dtype(ns_dtype), param.dtype),
        )
    return tasks
