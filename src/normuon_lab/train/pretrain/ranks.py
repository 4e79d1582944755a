"""The processes of a run: who they are, how they are arranged, and how they agree.

One process is the case of one rank: nothing is started, and agreeing costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from normuon_lab.errors import InputError, RunsFailedError, require
from normuon_lab.train.pretrain.config import ParallelConfig

Result = TypeVar("Result")

# Tokenising a corpus, or checking a large checkpoint, on one rank keeps the others waiting.
_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all of the run.

    Attributes:
        rank: its number.
        world_size: how many there are.
        device: where it computes.
        mesh: axes dp_replicate, dp_shard and tp; None for a process alone.
    """

    rank: int
    world_size: int
    device: torch.device
    mesh: DeviceMesh | None

    @property
    def is_main(self) -> bool:
        """Whether it is the one that writes files and speaks."""
        return self.rank == 0

    @property
    def data_size(self) -> int:
        """Ranks that read different data."""
        if self.mesh is None:
            return 1
        return self.mesh["dp_replicate"].size() * self.mesh["dp_shard"].size()

    @property
    def data_rank(self) -> int:
        """This rank's number among those that read different data."""
        if self.mesh is None:
            return 0
        shard = self.mesh["dp_shard"]
        return self.mesh["dp_replicate"].get_local_rank() * shard.size() + shard.get_local_rank()

    def any(self, flag: bool) -> bool:
        """Whether any rank says yes; the same answer on all. Does not wait for the device."""
        if self.mesh is None:
            return flag
        flags = torch.tensor(flag, dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return bool(flags)

    def sum_over_data_(self, values: Tensor) -> Tensor:
        """Sum a tensor over the ranks that read different data, in place."""
        if self.mesh is not None:
            dist.all_reduce(values)
            # Ranks of one tensor-parallel group hold the same values.
            values /= self.mesh["tp"].size()
        return values

    def on_main(self, function: Callable[[], Result]) -> Result:
        """What `function` gives on rank 0, handed to all; an error of its is raised on all."""
        if self.mesh is None:
            return function()
        outcome: list[Result | Exception | None] = [None]
        if self.is_main:
            try:
                outcome = [function()]
            except (InputError, RunsFailedError) as error:
                outcome = [error]
        dist.broadcast_object_list(outcome, src=0, device=torch.device("cpu"))
        (found,) = outcome
        if isinstance(found, Exception):
            raise found
        return found  # type: ignore[return-value]

    def raise_together(self, error: Exception | None) -> None:
        """Raise on all ranks what any of them met, that of the lowest rank.

        Raises:
            RunsFailedError: with the text of the error.
        """
        texts: list[str | None] = [None] * self.world_size
        text = None if error is None else str(error)
        if self.mesh is None:
            texts = [text]
        else:
            dist.all_gather_object(texts, text)
        for found in texts:
            if found is not None:
                raise RunsFailedError(found) from error


@contextmanager
def joined(parallel: ParallelConfig) -> Iterator[Ranks]:
    """Take this process's place among those that torchrun started; leave it at the end.

    Raises:
        InputError: the sizes of the mesh do not fit the number of ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    shape = mesh_shape(parallel, world_size=world_size)
    has_cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=device, mesh=None)
        return
    _join(backend="cpu:gloo,cuda:nccl" if has_cuda else "gloo")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    yield Ranks(rank=dist.get_rank(), world_size=world_size, device=device, mesh=mesh)
    # Not after an exception: a rank that fails alone must not wait here for the others.
    dist.destroy_process_group()


def _join(*, backend: str) -> None:
    """Join the process group. Gloo besides NCCL: flags and checkpoints stay on the CPU.

    When torchrun starts its ranks again they share a store with those that failed, whose addresses
    are still in it (torch 2.13): names of each attempt are kept apart.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )


def mesh_shape(parallel: ParallelConfig, *, world_size: int) -> tuple[int, int, int]:
    """Sizes of dp_replicate, dp_shard and tp for so many ranks.

    Raises:
        InputError: their product is another number.

    Example:
        >>> mesh_shape(ParallelConfig(tp=2), world_size=8)
        (1, 4, 2)
    """
    fixed = parallel.dp_replicate * parallel.tp
    named = f"dp_replicate {parallel.dp_replicate} x tp {parallel.tp}"
    if parallel.dp_shard is None:
        require(
            world_size % fixed == 0,
            f"{named} does not divide the {world_size} ranks: start another number of them",
        )
        return (parallel.dp_replicate, world_size // fixed, parallel.tp)
    require(
        fixed * parallel.dp_shard == world_size,
        f"{named} x dp_shard {parallel.dp_shard} is {fixed * parallel.dp_shard}, but "
        f"{world_size} rank{'s were' if world_size > 1 else ' was'} started: use torchrun "
        f"--nproc-per-node, or other sizes",
    )
    return (parallel.dp_replicate, parallel.dp_shard, parallel.tp)
