"""The global norm of gradients, however they are sharded, and scaling them down to a bound."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor


def clip_gradients_(parameters: Iterable[Tensor], *, max_norm: float) -> Tensor:
    """Scale all gradients by one factor so that their global norm is at most `max_norm`.

    torch's own `clip_grad_norm_` refuses gradients of several meshes, as tensor parallelism
    leaves them.

    Args:
        parameters: those of the model, the same on every rank and in the same order; plain tensors
            or DTensors. Where they have no gradient they are passed over.
        max_norm: the bound; 0 only measures.

    Returns:
        The norm before, float64 `[]`, the same on every rank. Does not wait for the device.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    by_split: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = {}
    for gradient in gradients:
        by_split.setdefault(_split_of(gradient), []).append(_local(gradient))
    total = torch.zeros((), dtype=torch.float64, device=_local(gradients[0]).device)
    for (mesh, axes), parts in by_split.items():
        squares = _sum_of_squares(parts)
        for axis in axes:
            assert mesh is not None
            dist.all_reduce(squares, group=mesh.get_group(axis))
        total += squares
    norm = total.sqrt()
    if max_norm > 0:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parts in by_split.values():
            torch._foreach_mul_(parts, factor.to(parts[0].dtype))
    return norm


def has_nonfinite(parameters: Iterable[Tensor]) -> Tensor:
    """Whether this rank's part of any parameter holds a NaN or an infinity, bool `[]`."""
    norms = torch.stack(torch._foreach_norm([_local(p.detach()) for p in parameters]))
    return ~norms.isfinite().all()


def _split_of(gradient: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    """The mesh of a gradient and the axes over which it is split; along others it is repeated."""
    if not isinstance(gradient, DTensor):
        return (None, ())
    axes = tuple(
        axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate()
    )
    return (gradient.device_mesh, axes)


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _sum_of_squares(parts: Sequence[Tensor]) -> Tensor:
    norms = torch.stack(torch._foreach_norm(list(parts)))
    return norms.double().square().sum()
