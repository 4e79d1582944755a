"""Optimizers on the fake accelerator, and their steps under watch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from normuon import MatrixView, NorMuon
from tests.accelerator.device import NAME, FakeDevices, make_param, pretended_mesh
from tests.accelerator.watch import Watch

MATRICES, VECTORS = [(16, 32), (16, 32)], [(32,), (48, 16)]
TALL, EXPERTS, CONV = (64, 16), (4, 16, 32), (16, 4, 3, 3)

TENSORS = ("device", "device of one dim", "host", "host of one dim")
"""How a user may give a number as a tensor."""


def number(value: float, how: str | None) -> float | Tensor:
    """A number as one of `TENSORS`, or as it is."""
    if how is None:
        return value
    shape = (1,) if "dim" in how else ()
    return torch.full(shape, value, device="cpu" if how.startswith("host") else NAME)


@contextmanager
def built(
    *,
    mesh_sizes: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    lr: str | None = None,
    weight_decay: str | None = None,
    matrices: Sequence[tuple[int, ...]] = MATRICES,
    all_kinds: bool = False,
    copies: bool = False,
    ns_steps: int = 2,
    **options: Any,
) -> Iterator[NorMuon]:
    """An optimizer of matrices and what AdamW takes.

    Args:
        mesh_sizes: of a mesh that shards everything; empty for a single device.
        dtype: of the parameters.
        lr: how the learning rate is given, see `number`.
        weight_decay: how it is given.
        matrices: shapes.
        all_kinds: also a tall matrix, experts and a convolution.
        copies: parameters are whole on every rank, as under DDP.
        ns_steps: few, since a fake tensor's operation takes a millisecond.
        options: of the optimizer.
    """
    if options.get("orthogonalizer") == "callable":
        options["orthogonalizer"] = orthogonalizer
    with pretended_mesh(mesh_sizes) if mesh_sizes else nullcontext() as mesh, FakeDevices():
        if copies:
            assert mesh is not None
            options["process_group"] = mesh.get_group()
            mesh = None
        groups = param_groups(matrices, dtype=dtype, mesh=mesh, all_kinds=all_kinds)
        if options.pop("algorithm", None) == "muon":
            for group in groups[:-1]:
                group["algorithm"] = "muon"
        yield NorMuon(
            groups,
            lr=number(1e-3, lr),
            weight_decay=number(0.1, weight_decay),
            ns_steps=ns_steps,
            **options,
        )


def param_groups(
    matrices: Iterable[tuple[int, ...]],
    *,
    dtype: torch.dtype,
    mesh: DeviceMesh | None = None,
    all_kinds: bool = False,
) -> list[dict[str, Any]]:
    """Groups of matrices and vectors, the latter last; see `built`."""

    def params(shapes: Iterable[tuple[int, ...]]) -> list[torch.nn.Parameter]:
        return [make_param(shape, dtype=dtype, mesh=mesh) for shape in shapes]

    others = [
        {"params": params([TALL])},
        {"params": params([EXPERTS]), "view": MatrixView.experts()},
        {"params": params([CONV]), "view": MatrixView.conv()},
    ]
    return [
        {"params": params(matrices)},
        *(others if all_kinds else ()),
        {"params": params(VECTORS), "algorithm": "adamw", "cautious_weight_decay": False},
    ]


def orthogonalizer(x_BMN: Tensor) -> Tensor:
    """A callable of the user's."""
    return x_BMN * 2


def all_params(optimizer: NorMuon) -> list[Tensor]:
    """All parameters."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def set_gradients(optimizer: NorMuon, *, missing: Iterable[int] = ()) -> None:
    """New gradients, as backward leaves them after `zero_grad`.

    Args:
        optimizer: whose parameters get them.
        missing: numbers of those that get none.
    """
    without = set(missing)
    for place, param in enumerate(all_params(optimizer)):
        param.grad = None if place in without else torch.empty_like(param).detach()


def given_tensors(optimizer: NorMuon) -> list[Tensor]:
    """Tensors of the user's on the host."""
    values = (group[name] for group in optimizer.param_groups for name in ("lr", "weight_decay"))
    return [value for value in values if isinstance(value, Tensor) and value.is_cpu]


def watch_steps(
    optimizer: NorMuon,
    *,
    is_sharded: bool = False,
    may_copy_from_host: bool = False,
    missing: Sequence[Iterable[int]] = ((),) * 4,
) -> list[Watch]:
    """Steps under watch; what is allocated after the second of them may not be kept.

    The first step of parameters that ranks share is not watched: there they draw up a plan and
    compare it, which reads.

    Args:
        optimizer: to step.
        is_sharded: whether it has such parameters.
        may_copy_from_host: see `Watch`.
        missing: for each step, which parameters have no gradient.

    Raises:
        Fault: see `Watch`.
    """
    watches = []
    for step, without in enumerate(missing):
        set_gradients(optimizer, missing=without)
        watch = Watch(given=given_tensors(optimizer), may_copy_from_host=may_copy_from_host)
        with nullcontext() if is_sharded and step == 0 else watch:
            optimizer.step()
        watches.append(watch)
    for watch in watches[2:]:
        watch.check_nothing_kept()
    return watches


def step_optimizer(case: Mapping[str, Any]) -> None:
    """Builds an optimizer as `built` does and steps it under watch."""
    with built(**case) as optimizer:
        watch_steps(optimizer, is_sharded=bool(case.get("mesh_sizes")))
