"""Proof that every rank drew up the same plan, before anything depends on it."""

from __future__ import annotations

import hashlib
from itertools import zip_longest
from typing import Protocol

import torch
import torch.distributed as dist

from normuon.distributed.canonical import first_difference


class FirstDifference(Protocol):
    """Says in one sentence where two texts differ first, given what to call the two."""

    def __call__(self, first: str, second: str, /, *, names: tuple[str, str]) -> str | None: ...


def first_different_line(first: str, second: str, /, *, names: tuple[str, str]) -> str | None:
    """Where two lists of lines differ first.

    Example:
        >>> first_different_line("a\\nb", "a", names=("rank 0", "rank 1"))
        "'b' in rank 0, nothing in rank 1"
    """
    for one, two in zip_longest(first.splitlines(), second.splitlines()):
        if one != two:
            shown = ["nothing" if line is None else repr(line) for line in (one, two)]
            return f"{shown[0]} in {names[0]}, {shown[1]} in {names[1]}"
    return None


def check_agreement(
    group: dist.ProcessGroup,
    text: str,
    *,
    device: torch.device,
    difference: FirstDifference = first_difference,
) -> None:
    """Compares a text across the ranks of a group; the same outcome on every rank.

    Digests of one size are compared first, so that ranks with different texts still issue the same
    collectives; only when they differ do the texts travel, to say where.

    Args:
        group: the ranks that must agree.
        text: everything they must agree on, a plan's `canonical()`.
        device: of the group's tensors.
        difference: finds the first difference between two such texts.

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
        f"{difference(texts[0], texts[other], names=names)}. Build the model and its param "
        "groups alike on every rank"
    )
