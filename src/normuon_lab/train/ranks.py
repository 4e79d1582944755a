"""The processes of a run: their ranks, their mesh, and how they agree.

One process is one rank: nothing is started, and agreeing costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from normuon_lab.errors import InputError, RunsFailedError

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among all of the run; `Ranks()` is a process alone, on the CPU.

    The mesh has the axes dp_replicate, dp_shard and tp; a process alone has none.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mesh: DeviceMesh | None = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
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
        """The result of `function` on rank 0, sent to all; its error is raised on all."""
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
        """Raise an error of any rank on all ranks; the lowest rank's, if there are several.

        Raises:
            RunsFailedError: with the text of the error.
        """
        texts = [None if error is None else str(error)] * self.world_size
        if self.mesh is not None:
            dist.all_gather_object(texts, texts[0])
        for found in texts:
            if found is not None:
                raise RunsFailedError(found) from error
