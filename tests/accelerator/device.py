"""A device that exists in name only, and ranks that only pretend to communicate.

Registering it changes the process for good, so only the worker of `conftest` calls `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import backend_registration

import normuon.step.sharded
from normuon.step.shared_params import SharedParams

NAME = "faked"

_LIBRARIES: list[torch.library.Library] = []
"""What they register lasts as long as they do."""


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of `torch.faked`; of autocast it knows nothing."""

    def set_device(self, device: object) -> None:
        """There is one."""

    def device(self, device: object) -> AbstractContextManager[None]:
        """There is one."""
        return nullcontext()


class FakeDevices(FakeTensorMode):
    """Tensors without values on any device; what torch takes for available is not touched."""

    avoid_device_init = True


class _HostRanks:
    """A mesh's ranks, which are real even where all other tensors are fake."""

    def __init__(self, ranks: Tensor) -> None:
        self.shape, self._ranks = tuple(ranks.shape), ranks.flatten().tolist()

    def flatten(self) -> _HostRanks:
        """All ranks."""
        return self

    def tolist(self) -> list[int]:
        """As numbers."""
        return list(self._ranks)


def register() -> None:
    """Makes the device, once in a process."""
    # Gives c10d's operations what a fake tensor needs of them.
    import_module("torch.distributed._tools.fake_collectives")
    torch.set_num_threads(1)
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    kernels, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL")
    _LIBRARIES.extend((kernels, fallback))
    # Matrix products that autocast rounds, as backends register them.
    for name in ("mm", "bmm", "matmul", "addmm", "baddbmm"):
        kernels.impl(name, partial(_rounded_product, getattr(torch, name)), "AutocastPrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # Written to and not returned; torch has this of the overload for numbers only.
    kernels.impl("_fused_adamw_.tensor_lr", lambda *_, **__: None, "Meta")
    # Drawing up a plan compares values between ranks, and a fake tensor has none.
    normuon.step.sharded.check_agreement = lambda *_, **__: None
    SharedParams.check_copies = lambda self: None
    ranks_of = DeviceMesh.mesh.fget

    def host_ranks(mesh: DeviceMesh) -> _HostRanks | Tensor:
        with unset_fake_temporarily() as mode:
            return ranks_of(mesh) if mode is None else _HostRanks(ranks_of(mesh))

    DeviceMesh.mesh = property(host_ranks)


def _rounded_product(product: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    dtype = torch.get_autocast_dtype(NAME)
    with torch.autocast(NAME, enabled=False):
        rounded = [arg.to(dtype) if isinstance(arg, Tensor) else arg for arg in args]
        return product(*rounded, **kwargs)


@contextmanager
def autocast() -> Iterator[None]:
    """Autocast of the device, of which it knows nothing outside."""
    module = torch.get_device_module(NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    try:
        with torch.autocast(NAME, dtype=torch.bfloat16):
            yield
    finally:
        del module.get_amp_supported_dtype


@contextmanager
def pretended_mesh(sizes: Sequence[int]) -> Iterator[DeviceMesh]:
    """A mesh of the device, seen from rank 0; its collectives return at once."""
    backend = f"cpu:fake,{NAME}:fake"
    dist.init_process_group(backend, store=FakeStore(), rank=0, world_size=prod(sizes))
    try:
        yield init_device_mesh(NAME, tuple(sizes))
    finally:
        dist.destroy_process_group()


def sharded(shape: Sequence[int], mesh: DeviceMesh, dtype: torch.dtype) -> DTensor:
    """Rows sharded over the mesh's last axis as FSDP2 does it, replicated over the others."""
    rows = -(-shape[0] // mesh.size(-1))
    local = torch.empty(min(rows, shape[0]), *shape[1:], device=NAME, dtype=dtype)
    placements: list[Any] = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def make_param(
    shape: Sequence[int], *, dtype: torch.dtype, mesh: DeviceMesh | None
) -> nn.Parameter:
    """A parameter on the device, sharded if there is a mesh."""
    if mesh is None:
        return nn.Parameter(torch.empty(shape, device=NAME, dtype=dtype))
    return nn.Parameter(sharded(shape, mesh, dtype))
