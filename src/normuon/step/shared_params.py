"""Parameters that several ranks share, grouped by the ranks that share them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from normuon.distributed.cost import CostModel
from normuon.distributed.dtensor import Shards, axes_with_idle_ranks, group_of_mesh, shards_of
from normuon.distributed.task import MatrixTask
from normuon.options import OPTIONS, MatrixOptions
from normuon.orthogonalize import resolve_ns_dtype
from normuon.params import param_label, planned_name
from normuon.state import compute_device_of, matrix_param
from normuon.step.matrix_tasks import tasks_of_param, wire_dtypes
from normuon.step.pieces import MatrixParam, State, local_tensor


@dataclass(slots=True)
class SharedMatrix:
    """A parameter of matrices that several ranks share.

    Args:
        owner: the parameter and its state.
        name: as the plan lists it.
        place: its group and its index there.
        shards: which rank stores what.
        compute_device: where Newton-Schulz runs.
    """

    owner: MatrixParam
    name: str
    place: tuple[int, int]
    shards: Shards
    compute_device: torch.device

    @property
    def tensor(self) -> Tensor:
        """The parameter."""
        return self.owner.param

    @property
    def label(self) -> str:
        """Its name and shape."""
        return self.owner.label

    @property
    def state(self) -> State:
        """Its state."""
        return self.owner.state

    @property
    def local_grad(self) -> Tensor | None:
        """This rank's part of the gradient at the present step."""
        return self.owner.grad

    @property
    def ns_dtype(self) -> torch.dtype:
        """The dtype of Newton-Schulz."""
        param = self.owner.param
        given: Any = self.owner.group["ns_dtype"]
        return resolve_ns_dtype(given, param_dtype=param.dtype, device=self.compute_device)

    @property
    def wire(self) -> tuple[torch.dtype, torch.dtype]:
        """The dtypes in which matrices and vectors travel."""
        return wire_dtypes(self.ns_dtype, self.owner.param.dtype)

    def tasks(self) -> list[MatrixTask]:
        """The parameter's matrices for the planner."""
        param = self.owner.param
        return tasks_of_param(
            self.name,
            param.shape,
            self.owner.view,
            place=self.place,
            layout=self.shards.layout,
            options=MatrixOptions.from_group(self.owner.group),
            param_dtype=param.dtype,
            ns_dtype=self.ns_dtype,
            device_type=self.compute_device.type,
            wire=self.wire,
        )

    def idle_vectors(self) -> Iterator[tuple[str, list[int]]]:
        """Vectors that some rank holds without any of the matrix, and along which mesh axes."""
        param = self.owner.param
        for name, dims in self.owner.vector_dims.items():
            if isinstance(param, DTensor) and dims is not None:
                axes = axes_with_idle_ranks(param, self.shards.layout, kept_dims=dims)
                if axes:
                    yield name, axes


@dataclass(slots=True, eq=False)
class SharedVector:
    """A parameter of an `adamw` group that several ranks share; the fields are `MatrixParam`'s."""

    label: str
    place: tuple[int, int]
    param: Tensor
    group: Mapping[str, Any]
    state: State
    grad: Tensor | None = None

    @property
    def tensor(self) -> Tensor:
        """The parameter."""
        return self.param

    @property
    def local_grad(self) -> Tensor | None:
        """This rank's part of the gradient at the present step."""
        return self.grad


@dataclass(slots=True)
class SharedParams:
    """All that one set of ranks shares.

    Args:
        group: the ranks.
        matrices: parameters of `normuon` and `muon` groups.
        vectors: parameters of `adamw` groups.
        compute_device: where matrices are orthogonalised and what the ranks exchange is.
        measures: whether the present step is measured.
    """

    group: dist.ProcessGroup
    matrices: list[SharedMatrix]
    vectors: list[SharedVector]
    compute_device: torch.device
    measures: bool = False

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        first = self.matrices[0].owner.param if self.matrices else self.vectors[0].param
        return local_tensor(first).device

    def take_states(self, states: Mapping[Tensor, State]) -> None:
        """Takes the state of each parameter anew, because some were replaced by other dicts."""
        for matrix in self.matrices:
            matrix.owner.state = states[matrix.owner.param]
        for vector in self.vectors:
            vector.state = states[vector.param]

    def option_lines(self) -> Iterator[str]:
        """The options of the groups as they stand now, on which ranks must agree at every step."""
        groups = {matrix.place[0]: matrix.owner.group for matrix in self.matrices}
        groups |= {vector.place[0]: vector.group for vector in self.vectors}
        for number in sorted(groups):
            yield f"group {number}: {options_text(groups[number])}"
        yield f"record_statistics() measures this step: {self.measures}"

    def lines(self) -> Iterator[str]:
        """What ranks must agree on besides the plan: parameters, algorithms and options."""
        yield from self.option_lines()
        labelled = [(m.place, m.owner.label, m.owner.param, m.owner.group) for m in self.matrices]
        labelled += [(v.place, v.label, v.param, v.group) for v in self.vectors]
        for place, label, param, group in sorted(labelled, key=lambda item: item[0]):
            yield f"group {place[0]} ({group['algorithm']}): {label} {param.dtype}"

    def check_copies(self) -> None:
        """Checks that plain parameters, which nothing but `process_group` calls copies, are equal.

        Raises:
            ValueError: on every rank, naming those that are not, and what to write.
        """
        every: list[SharedMatrix | SharedVector] = [*self.matrices, *self.vectors]
        plain = [param for param in every if not isinstance(param.tensor, DTensor)]
        if not plain:
            return
        sums = torch.stack([_checksum(param.tensor) for param in plain]).to(self.compute_device)
        bounds = torch.cat([sums, -sums])
        dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=self.group)
        differs = bounds[: len(plain)] != -bounds[len(plain) :]
        labels = [p.label for p, d in zip(plain, differs.any(1).tolist(), strict=True) if d]
        if labels:
            shown = ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" * (len(labels) > 4))
            raise ValueError(
                f"{shown}: process_group means that its ranks hold equal replicas, but the values "
                "differ between ranks; put parameters that differ, such as experts, into a group "
                "with 'process_group': None"
            )

    def cost_model(self) -> CostModel:
        """Rough rates of the device that computes.

        They decide only whether replicas compute a matrix once or each for itself, and which
        matrices teams divide; they are constants by device type, because every rank must decide
        alike.
        """
        if self.compute_device.type == "cpu":
            # One thread of a CPU, and Gloo over loopback or a 10 Gbit/s network.
            return CostModel(
                flops_per_second=5e10,
                bytes_per_second=1e9,
                latency_seconds=2e-4,
                node_latency_seconds=2e-4,
            )
        return CostModel()


def _checksum(param: Tensor) -> Tensor:
    """``[2]``: two sums over a parameter's bits, one of them weighted by place; exact integers."""
    local = local_tensor(param).detach()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[local.element_size()]
    rows = local.contiguous().view(integer).reshape(len(local) if local.ndim > 1 else 1, -1)
    columns = rows.sum(0, dtype=torch.int64)
    weights = torch.arange(1, len(columns) + 1, device=local.device)
    return torch.stack([columns.sum(), (columns * weights).sum()])


def options_text(group: Mapping[str, Any]) -> str:
    """A group's options in words that are equal on all ranks that have the same."""
    shown = {}
    for name in sorted(OPTIONS.keys() - {"max_scratch_bytes"}):
        value = group[name]
        if isinstance(value, Tensor):
            value = "a tensor"  # Reading it would wait for the device.
        elif name == "compute_device" and value is not None:
            value = torch.device(value).type  # Every rank has its own of that type.
        elif callable(value):
            # Its repr would hold an address, which differs between processes.
            value = getattr(value, "__qualname__", type(value).__qualname__)
        shown[name] = value
    return str(shown)


def group_that_shares(param: Tensor, process_group: Any) -> dist.ProcessGroup | None:
    """The ranks that share a parameter; None for one that is this rank's own."""
    if isinstance(param, DTensor):
        return group_of_mesh(param.device_mesh)
    shared: dist.ProcessGroup | None = process_group
    return shared


def shared_params(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Tensor, State],
    *,
    process_group: dist.ProcessGroup | None,
) -> list[SharedParams]:
    """The parameters that several ranks share, by the ranks that share them.

    Args:
        groups: all param groups.
        state: the optimizer's.
        process_group: the ranks that hold plain tensors alike, where a group says no other; None
            leaves those to this rank.

    Returns:
        Sets of ranks in ascending order: ranks that are in several of them take these in the same
        order, whatever the order of their parameters.

    Raises:
        ValueError: a placement or view that cannot be exchanged, or a parameter that is or computes
            on another device than the rest; names it.
    """
    found: dict[tuple[int, ...], SharedParams] = {}
    _make_groups(groups)
    for number, group in enumerate(groups):
        shared_by_plain = group.get("process_group", process_group)
        for index, param in enumerate(group["params"]):
            shared_by = group_that_shares(param, shared_by_plain)
            if shared_by is None or not param.numel():
                continue
            label = param_label(group, index)
            ranks = tuple(dist.get_process_group_ranks(shared_by))
            compute_device = compute_device_of(label, param, group)
            shared = found.setdefault(ranks, SharedParams(shared_by, [], [], compute_device))
            place = (number, index)
            if group["algorithm"] == "adamw":
                shared.vectors.append(SharedVector(label, place, param, group, state[param]))
            else:
                owner = matrix_param(label, param, group, state[param])
                _check_vectors(owner)
                shards = shards_of(param, label=label, process_group=shared_by)
                name = planned_name(group, number, index)
                matrix = SharedMatrix(owner, name, place, shards, compute_device)
                shared.matrices.append(matrix)
            device = local_tensor(param).device
            if device != shared.device:
                raise ValueError(
                    f"{label}: it is on {device}, but other parameters of the same ranks are on "
                    f"{shared.device}; move the model to one device"
                )
            if compute_device != shared.compute_device:
                raise ValueError(
                    f"{label}: its group computes on {compute_device}, but other parameters of the "
                    f"same ranks on {shared.compute_device}; give all groups one compute_device"
                )
    return [found[ranks] for ranks in sorted(found)]


def _make_groups(groups: Sequence[Mapping[str, Any]]) -> None:
    """Makes the process groups over meshes, in an order that is the same on all ranks.

    Making one waits for its members, so that ranks that are in several must not take them in the
    order of their parameters.
    """
    meshes = {
        tuple(sorted(param.device_mesh.mesh.flatten().tolist())): param.device_mesh
        for group in groups
        for param in group["params"]
        if isinstance(param, DTensor)
    }
    for ranks in sorted(meshes):
        group_of_mesh(meshes[ranks])


def _check_vectors(owner: MatrixParam) -> None:
    if None in owner.vector_dims.values():
        raise ValueError(
            f"{owner.label}: neuron_axis='short' does not support views that split a parameter "
            "which ranks share; use neuron_axis='row'"
        )
