"""One rank of many on this one GPU: its sharded step, with a fake process group.

Collectives return at once and write nothing. So the network's time is left out, and what arrives is
whatever was in memory; launches, packing, the rank's own products and the host's work are real.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.matrices import MatrixClass
from normuon_lab.bench.measure import WEIGHT_SCALE, Gradients
from normuon_lab.bench.peers import dion_normuon
from normuon_lab.bench.suite.options import matrices_of
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.bench.suite.rounds import give_back, rounds_of, timed_in_turn, values_of
from normuon_lab.bench.suite.step_contenders import (
    CAPTURED,
    FIRST,
    SLOW_HERE,
    step_contenders,
)

MODEL = "llama-1.1b"
RANKS = (16, 64)
OWN = (FIRST, CAPTURED)
DION = "dion NorMuon"


def run(context: PartContext) -> dict[str, Any]:
    """Times rank 0's step of every contender that shards, for every number of ranks."""
    matrices = matrices_of(MODEL, tiny=context.is_dry)
    values: dict[str, Any] = {"model": MODEL, "elements": sum(m.numel for m in matrices)}
    values["cases"] = [
        {"ranks": ranks, "rounds": 0, "contenders": [], "not_run": {}} for ranks in RANKS
    ]
    reckoned: dict[str, float] = {}
    for case in values["cases"]:
        with first_of(case["ranks"], context.device) as mesh:
            field = contenders(mesh, context)
            context.say(f"rank 0 of {case['ranks']}: {', '.join(one.name for one in field)}")
            params, gradients = sharded_matrices(matrices, mesh, context)
            # What the other ranks would have sent is any number, and NaN as well.
            for runners, not_run in timed_in_turn(
                field, params, gradients, context, reckoned, may_diverge=True
            ):
                case.update(
                    rounds=rounds_of(runners),
                    contenders=[values_of(one, runners[0], context) for one in runners],
                    not_run=not_run,
                )
                context.keep(values)
            del params, gradients, runners
        give_back(context.device)
    return values


@contextmanager
def first_of(ranks: int, device: torch.device) -> Iterator[DeviceMesh]:
    """A mesh of a fake process group, seen from its first rank."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh(device.type, (ranks,))
    finally:
        dist.destroy_process_group()


def contenders(mesh: DeviceMesh, context: PartContext) -> tuple[Contender, ...]:
    """NorMuon, launched and captured, and dion's, of those that `only` names; the first always."""
    options = context.options
    first, *others = (one for one in step_contenders(context.device, dion=None) if one.name in OWN)
    dion = dion_normuon(DION, options.dion, distributed_mesh=mesh)
    if context.is_dry and not options.only:
        dion = replace(dion, missing=dion.missing or SLOW_HERE)
    field = (*others, dion)
    asked = [one for one in field if any(fnmatchcase(one.name, name) for name in options.only)]
    return (first, *(asked if options.only else field))


def sharded_matrices(
    matrices: Sequence[MatrixClass], mesh: DeviceMesh, context: PartContext
) -> tuple[list[nn.Parameter], Gradients]:
    """This rank's rows of every matrix, as FSDP2 shards them, and their gradients."""
    torch.manual_seed(context.options.seed)

    def rows(shape: tuple[int, int], scale: float) -> Tensor:
        whole = torch.randn(shape, device=context.device) * scale
        return distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)

    shapes = [one.shape for one in matrices for _ in range(one.count)]
    params = [nn.Parameter(rows(shape, WEIGHT_SCALE)) for shape in shapes]
    return params, Gradients([rows(shape, 1.0) for shape in shapes])
