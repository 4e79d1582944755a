"""The only reader of DTensor placements: which rank of which process group stores what.

Turns a sharded parameter into the planner's `ShardLayout`, and derives how its second moments are
placed. Who owns what is `plan`'s decision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement as TorchPlacement
from torch.distributed.tensor.placement_types import _StridedShard

from normuon.distributed.mesh_layout import Placement, StridedOrder, layout_from_placements
from normuon.distributed.region import Region, ShardLayout


@dataclass(frozen=True, slots=True)
class Shards:
    """How one parameter lies over the ranks of a group.

    Args:
        group: every rank that stores some of it, in ascending order of global rank.
        layout: who stores which region, ranks numbered as in `group`.
    """

    group: dist.ProcessGroup
    layout: ShardLayout

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return dist.get_rank(self.group)

    def local_slices(self, region: Region) -> tuple[slice, ...]:
        """Where a piece of the parameter lies in this rank's local tensor.

        Args:
            region: in global coordinates, inside one of the regions this rank stores.
        """
        return local_slices(self.layout, self.rank, region)


@lru_cache(maxsize=65536)
def local_slices(layout: ShardLayout, rank: int, region: Region) -> tuple[slice, ...]:
    """The index of a region in the local tensor of a rank that stores it.

    Example:
        >>> layout = layout_from_placements((6, 4), mesh_shape=(2,), placements=[("shard", 0)])
        >>> local_slices(layout, 1, Region((4, 0), (2, 4)))
        (slice(1, 3, None), slice(0, 4, None))
    """
    for stored, local in zip(layout.regions_by_rank[rank], layout.local_regions(rank), strict=True):
        if stored.contains(region):
            inside = region.relative_to(stored)
            starts = [a + b for a, b in zip(local.offsets, inside.offsets, strict=True)]
            return tuple(slice(s, s + n) for s, n in zip(starts, region.shape, strict=True))
    raise AssertionError(f"rank {rank} does not store {region}")


def shards_of(param: Tensor, *, label: str, process_group: dist.ProcessGroup | None) -> Shards:
    """How a parameter lies over ranks.

    Args:
        param: a DTensor, or a plain tensor that every rank of `process_group` holds whole.
        label: the parameter's name and shape, the start of every message.
        process_group: for plain tensors.

    Raises:
        ValueError: a placement other than Shard and Replicate, or a local tensor that the
            placements do not explain.
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
        if _stored_shape(layout, dist.get_rank(group), param) == tuple(param.to_local().shape):
            return Shards(group, layout)
    raise ValueError(
        f"{label}: its local tensor is {list(param.to_local().shape)}, which {param.placements} on "
        f"{mesh} do not explain; distribute it with fully_shard or distribute_tensor"
    )


def misplaced_gradient(param: Tensor) -> str | None:
    """What is wrong with where a sharded parameter's gradient lies, and the mend; None if nothing.

    A gradient must be placed as its parameter is: not a plain tensor, and not Partial.
    """
    grad = param.grad
    if grad is None or not isinstance(param, DTensor):
        return None
    if isinstance(grad, DTensor) and (
        grad.placements == param.placements and grad.device_mesh == param.device_mesh
    ):
        return None
    placed = grad.placements if isinstance(grad, DTensor) else "a plain tensor"
    return (
        f"its gradient is {placed} and the parameter {param.placements}; redistribute the gradient "
        "before the step: param.grad = param.grad.redistribute(placements=...)"
    )


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
    return replace(
        layout,
        regions_by_rank=tuple(layout.regions_by_rank[p] for p in positions),
        replica_of_rank=tuple(layout.replicas[p] for p in positions),
    )


def _stored_shape(layout: ShardLayout, rank: int, param: DTensor) -> tuple[int, ...]:
    regions = layout.local_regions(rank)
    if not regions:
        # An empty shard keeps its other dims: torch says which of them is 0.
        local = tuple(param.to_local().shape)
        return local if 0 in local else (-1,)
    return tuple(max(ends) for ends in zip(*(region.ends for region in regions), strict=True))


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


def sharded_zeros(param: Tensor, *, kept_dims: Sequence[int], dtype: torch.dtype) -> DTensor:
    """Zeros over some dims of a sharded parameter, placed as the parameter is along them.

    Where the parameter is split along another dim, the result is replicated: the second moments of
    a row are whole on every rank that stores a part of the row.

    Args:
        param: the parameter.
        kept_dims: the dims that the result has, in order.
        dtype: of the result.
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
    zeros = torch.zeros([local.shape[dim] for dim in kept], dtype=dtype, device=local.device)
    shape = torch.Size([param.shape[dim] for dim in kept])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        zeros, param.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )


def replicated_like(tensor: Tensor, param: Tensor) -> DTensor:
    """A plain tensor, equal on all ranks, as a DTensor replicated over a parameter's mesh."""
    assert isinstance(param, DTensor)
    placements = [Replicate()] * param.device_mesh.ndim
    return DTensor.from_local(tensor, param.device_mesh, placements, run_check=False)


def copy_to_shards_(target: Tensor, value: Tensor) -> None:
    """Fills a DTensor from another, however placed, or from a plain tensor that is whole."""
    assert isinstance(target, DTensor)
    mesh, placements = target.device_mesh, target.placements
    if not isinstance(value, DTensor):
        # Every rank holds the whole value and cuts its own part: nothing is sent.
        value = value.to(target.device)
        value = distribute_tensor(value, mesh, placements, src_data_rank=None)
    elif value.placements != placements or value.device_mesh != mesh:
        value = value.redistribute(mesh, placements)
    target.to_local().copy_(value.to_local())


def axes_with_idle_ranks(
    param: DTensor, layout: ShardLayout, *, kept_dims: Sequence[int]
) -> list[int]:
    """Mesh axes along which a rank may hold second moments of a parameter it stores nothing of.

    Those that split a dim outside `kept_dims`, if the layout leaves any rank empty: which axis
    does cannot be told from its size alone, since another may have split the dim before.
    """
    if len(layout.storing_ranks) == layout.world_size:
        return []
    dims = [getattr(placement, "dim", None) for placement in param.placements]
    return [
        axis
        for axis, dim in enumerate(dims)
        if dim is not None and dim % param.ndim not in kept_dims
    ]
