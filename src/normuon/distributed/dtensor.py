"""The only reader of DTensor placements: which rank of which process group stores what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from normuon.distributed.layout import Placement, ShardLayout, StridedOrder, layout_from_placements


@dataclass(frozen=True, slots=True)
class Shards:
    """How one parameter lies over the ranks of a group.

    Args:
        group: every rank that stores some of it, in ascending order of global rank.
        layout: who stores which region, ranks numbered as in `group`.
    """

    group: dist.ProcessGroup
    layout: ShardLayout


def shards_of(param: Tensor, *, label: str, process_group: dist.ProcessGroup | None) -> Shards:
    """How a parameter lies over ranks.

    Args:
        param: a DTensor, or a plain tensor that every rank of `process_group` holds whole.
        label: the parameter's name and shape, the start of every message.
        process_group: for plain tensors.

    Raises:
        ValueError: a placement other than Shard and Replicate, or a local tensor that does not
            match the placements.
    """
    if not isinstance(param, DTensor):
        assert process_group is not None
        world_size = dist.get_world_size(process_group)
        layout = layout_from_placements(
            param.shape, mesh_shape=(world_size,), placements=[("replicate",)]
        )
        return Shards(process_group, layout)
    mesh = param.device_mesh
    placements = [read_placement(p, label=label, param=param) for p in param.placements]
    group = group_of_mesh(mesh)
    for order in ("fsdp2", "dtensor"):
        layout = _layout_in_group(param.shape, mesh, placements, order, group)
        if _explains(layout, dist.get_rank(group), param):
            return Shards(group, layout)
    raise ValueError(
        f"{label}: its local tensor {list(param.to_local().shape)} does not match "
        f"{param.placements} on {mesh}; distribute it with fully_shard or distribute_tensor"
    )


def placed_gradient(param: Tensor, *, label: str) -> Tensor | None:
    """This rank's part of a parameter's gradient, placed as the parameter is.

    None without one, and for a parameter that has been frozen.

    A gradient that lies otherwise, such as the `Partial` one of a norm under sequence parallelism,
    is redistributed into a copy: then all ranks of the mesh must call this.

    Raises:
        ValueError: the gradient of a DTensor is a plain tensor, whose placement is unknown.
    """
    grad = param.grad
    if grad is None or not param.requires_grad:
        return None
    if not isinstance(param, DTensor):
        return grad.to_local() if isinstance(grad, DTensor) else grad
    if isinstance(grad, DTensor):
        spec, own = grad._spec, param._spec
        if spec is own or (spec.mesh is own.mesh and spec.placements == own.placements):
            return grad._local_tensor  # The usual case, without questions that cost more.
    if not isinstance(grad, DTensor) or grad.device_mesh != param.device_mesh:
        placed = "a plain tensor" if not isinstance(grad, DTensor) else f"on {grad.device_mesh}"
        raise ValueError(
            f"{label}: its gradient is {placed}, but the parameter is {param.placements} on "
            f"{param.device_mesh}; redistribute the gradient before the step: "
            "param.grad = DTensor.from_local(...)"
        )
    if grad.placements != param.placements:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return grad.to_local()


def read_placement(placement: TorchPlacement, *, label: str, param: DTensor) -> Placement:
    """A torch placement as the planner spells it.

    Raises:
        ValueError: the placement is neither a shard nor a replica, such as Partial.
    """
    split_factor = getattr(placement, "split_factor", None)
    dim = getattr(placement, "dim", None)
    if split_factor is not None and dim is not None:
        return ("strided_shard", dim, split_factor)
    if isinstance(placement, Shard):
        return ("shard", placement.dim)
    if isinstance(placement, Replicate):
        return ("replicate",)
    raise ValueError(
        f"{label}: its placement {placement} on {param.device_mesh} is neither Shard nor "
        "Replicate; redistribute the parameter before building the optimizer"
    )


def _layout_in_group(
    shape: Sequence[int],
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    order: StridedOrder,
    group: dist.ProcessGroup,
) -> ShardLayout:
    layout = layout_from_placements(
        shape, mesh_shape=tuple(mesh.mesh.shape), placements=placements, strided_order=order
    )
    mesh_ranks = mesh.mesh.flatten().tolist()
    group_ranks = dist.get_process_group_ranks(group)
    if mesh_ranks == group_ranks:
        return layout
    positions = tuple(mesh_ranks.index(rank) for rank in group_ranks)
    return _permuted(layout, positions)


@lru_cache(maxsize=256)
def _permuted(layout: ShardLayout, positions: tuple[int, ...]) -> ShardLayout:
    return ShardLayout(
        layout.global_shape,
        tuple(layout.intervals_by_rank[p] for p in positions),
        tuple(layout.replicas[p] for p in positions),
    )


def _explains(layout: ShardLayout, rank: int, param: DTensor) -> bool:
    """Whether a layout gives this rank what it stores."""
    found, stored = layout.local_shape(rank), tuple(param.to_local().shape)
    # Which dim of an empty shard is 0 is torch's to say.
    return found == stored or (0 in found and 0 in stored)


# By the world they are part of, so that none outlives `destroy_process_group`.
_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    WeakKeyDictionary()
)


def group_of_mesh(mesh: DeviceMesh) -> dist.ProcessGroup:
    """One process group over all ranks of a mesh, made once per set of ranks.

    A 1-D mesh has its own; the world's is used where the mesh covers it. Otherwise the members of
    the mesh, and they alone, make one together.
    """
    if mesh.ndim == 1:
        return mesh.get_group()
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    world = dist.group.WORLD
    assert world is not None
    if len(ranks) == dist.get_world_size():
        return world
    groups = _GROUPS.setdefault(world, {})
    if ranks not in groups:
        groups[ranks] = dist.new_group(list(ranks), use_local_synchronization=True)
    return groups[ranks]


def sharded_zeros(
    param: Tensor, *, kept_dims: Sequence[int], dtype: torch.dtype, more: Sequence[int] = ()
) -> DTensor:
    """Zeros over some dims of a sharded parameter, placed as the parameter is along them.

    Where the parameter is split along another dim, the result is replicated: the second moments of
    a row are whole on every rank that stores a part of the row.

    Args:
        param: the parameter.
        kept_dims: the dims that the result has, in order.
        dtype: of the result.
        more: sizes of dims after these, which every rank has whole.
    """
    assert isinstance(param, DTensor)
    kept = list(kept_dims)
    placements: list[TorchPlacement] = []
    for placement in param.placements:
        dim = getattr(placement, "dim", None)
        if dim is None or dim % param.ndim not in kept:
            placements.append(Replicate())
            continue
        new_dim = kept.index(dim % param.ndim)
        split_factor = getattr(placement, "split_factor", None)
        placements.append(
            Shard(new_dim)
            if split_factor is None
            else _StridedShard(new_dim, split_factor=split_factor)
        )
    local = param.to_local()
    sizes = [*(local.shape[dim] for dim in kept), *more]
    zeros = torch.zeros(sizes, dtype=dtype, device=local.device)
    shape = torch.Size([*(param.shape[dim] for dim in kept), *more])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, param.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def is_sharded_along(param: Tensor, dims: Sequence[int]) -> bool:
    """Whether ranks store different parts of some dims of a parameter."""
    assert isinstance(param, DTensor)
    return any(
        getattr(placement, "dim", None) is not None
        and placement.dim % param.ndim in dims  # type: ignore[attr-defined]
        and param.device_mesh.size(axis) > 1
        for axis, placement in enumerate(param.placements)
    )


def replicated_like(tensor: Tensor, param: Tensor) -> DTensor:
    """A plain tensor, equal on all ranks, as a DTensor replicated over a parameter's mesh."""
    assert isinstance(param, DTensor)
    placements = [Replicate()] * param.device_mesh.ndim
    return DTensor.from_local(tensor, param.device_mesh, placements, run_check=False)


def copy_to_shards_(
    target: DTensor, value: Tensor, *, param: DTensor, kept_dims: Sequence[int], label: str
) -> None:
    """Fills a parameter's state from another DTensor, or from a plain tensor that is whole.

    Args:
        target: the state, written to.
        value: its whole values, however placed.
        param: the parameter. FSDP2 over tensor parallelism cuts uneven sizes in another order than
            DTensor's metadata says; the parameter's layout is what it really stores, and its state
            lies alike.
        kept_dims: the parameter's dims that the state has, in order.
        label: the parameter's name and shape, the start of messages.

    Raises:
        ValueError: the state's placement does not follow the parameter's.
    """
    local = target.to_local()
    if isinstance(value, DTensor):
        if value.placements == target.placements and value.device_mesh == target.device_mesh:
            _copy_exactly_(local, value.to_local(), label)
            return
        value = value.full_tensor()
    shards = shards_of(param, label=label, process_group=None)
    stored = shards.layout.intervals_by_rank[dist.get_rank(shards.group)]
    for dim, param_dim in enumerate(kept_dims):
        parts = [value.narrow(dim, start, stop - start) for start, stop in stored[param_dim]]
        value = torch.cat(parts, dim) if parts else value.narrow(dim, 0, 0)
    _copy_exactly_(local, value, label)


def _copy_exactly_(local: Tensor, value: Tensor, label: str) -> None:
    if not local.numel() and not value.numel():
        return  # Which dim of an empty shard is 0 is torch's to say.
    if local.shape != value.shape:
        raise ValueError(
            f"{label}: this rank's state has shape {list(local.shape)}, but its layout needs "
            f"{list(value.shape)}; load the state with torch.distributed.checkpoint"
        )
    local.copy_(value)


def place_among_copies(param: Tensor) -> tuple[int, int] | None:
    """How many different shards of a parameter have copies, and which of them this rank holds.

    Returns:
        None where every rank's shard is the only one of its kind.
    """
    if not isinstance(param, DTensor):
        return (1, 0)
    num_shards, own = 1, 0
    has_copies = False
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    for axis, placement in enumerate(param.placements):
        size = param.device_mesh.size(axis)
        if isinstance(placement, Replicate):
            has_copies |= size > 1
        else:
            num_shards, own = num_shards * size, own * size + coordinate[axis]
    return (num_shards, own) if has_copies else None


def is_first_copy(param: Tensor, group: dist.ProcessGroup) -> bool:
    """Whether what this rank stores of a parameter belongs to the first of its copies.

    Args:
        param: a DTensor, or a plain tensor that every rank of a group has whole.
        group: the ranks that share it.
    """
    if not isinstance(param, DTensor):
        return dist.get_rank(group) == 0
    coordinate = param.device_mesh.get_coordinate()
    assert coordinate is not None
    return all(
        at == 0
        for at, placement in zip(coordinate, param.placements, strict=True)
        if isinstance(placement, Replicate)
    )


def axes_with_idle_ranks(
    param: DTensor, layout: ShardLayout, *, kept_dims: Sequence[int]
) -> list[int]:
    """Mesh axes along which a rank may hold second moments of a parameter it stores nothing of.

    Those that split a dim outside `kept_dims`, if the layout leaves any rank empty: its
    size alone does not say which axis does, because another may have split the dim before.
    """
    if len(layout.storing_ranks) == layout.world_size:
        return []
    dims = [getattr(placement, "dim", None) for placement in param.placements]
    return [
        axis
        for axis, dim in enumerate(dims)
        if dim is not None and dim % param.ndim not in kept_dims
    ]
