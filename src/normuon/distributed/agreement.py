"""Proof that every rank drew up the same plan, before anything depends on it."""

from __future__ import annotations

import hashlib

import torch
import torch.distributed as dist

from normuon.distributed.canonical import first_difference


def check_agreement(group: dist.ProcessGroup, text: str, *, device: torch.device) -> None:
    """Compares a text across the ranks of a group; the same outcome on every rank.

    Digests of one size are compared first, so that ranks with different texts still issue the same
    collectives; only when they differ do the texts travel, to say where.

    Args:
        group: the ranks that must agree.
        text: everything they must agree on, a plan's `canonical()`.
        device: of the group's tensors.

    Raises:
        ValueError: on every rank, naming two ranks that differ and their first difference.
    """
    if dist.get_world_size(group) == 1:
        return
    digest = torch.frombuffer(
        bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8
    ).to(device)
    digests = [torch.empty_like(digest) for _ in range(dist.get_world_size(group))]
    dist.all_gather(digests, digest, group=group)
    if all(torch.equal(other, digest) for other in digests):
        return
    texts: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(texts, text, group=group)
    other = next(rank for rank, theirs in enumerate(texts) if theirs != texts[0])
    ranks = dist.get_process_group_ranks(group)
    names = (f"rank {ranks[0]}", f"rank {ranks[other]}")
    raise ValueError(
        f"{names[0]} and {names[1]} built different optimizers: "
        f"{first_difference(texts[0], texts[other], names=names)}. Build the model and its param "
        "groups alike on every rank"
    )
