"""Runs the programs of this rank's slabs side by side, and carries what they exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from normuon.distributed.exchange import exchange_tensors
from normuon.step.normalizer import Vectors
from normuon.step.slabs import Program, Swap

SlabUpdate = tuple[Tensor, Vectors, Vectors, Tensor | None]
"""A slab of O, and the new state, the summary and perhaps the figures of its matrix."""


@dataclass(slots=True)
class Part:
    """One slab on this rank.

    Args:
        program: from `slabs.update_slab`.
        ranks: the members of its team, in their order.
    """

    program: Program[SlabUpdate]
    ranks: Sequence[int]


def run_together(
    parts: Sequence[Part], num_swaps: int, *, group: dist.ProcessGroup, device: torch.device
) -> list[SlabUpdate]:
    """What the programs return.

    One all-to-all carries what all of them exchange at a time, so every rank of the group calls
    this, with nothing to run too.

    Args:
        parts: those of one bucket, its matrices in the same order on every rank.
        num_swaps: how often any rank's programs exchange.
        group: the ranks.
        device: of the tensors.
    """
    found: dict[int, SlabUpdate] = {}

    def resume(number: int) -> Swap | None:
        try:
            return next(parts[number].program)
        except StopIteration as end:
            found[number] = end.value
            return None

    swaps = {number: resume(number) for number in range(len(parts))}
    for _ in range(num_swaps):
        send: dict[int, list[Tensor]] = {}
        receive: dict[int, list[Tensor]] = {}
        for number, swap in swaps.items():
            for member, rank in enumerate(parts[number].ranks if swap else ()):
                assert swap is not None
                send.setdefault(rank, []).extend(swap.send[member])
                receive.setdefault(rank, []).extend(swap.receive[member])
        exchange_tensors(send, receive, group=group, device=device)
        swaps = {number: resume(number) for number, swap in swaps.items() if swap}
    assert len(found) == len(parts), "a plan counts all exchanges"
    return [found[number] for number in range(len(parts))]
