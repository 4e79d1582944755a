"""Checks that all ranks of a group agree, before anything depends on it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import takewhile, zip_longest

import torch
import torch.distributed as dist

SHOWN_CHARACTERS = 160
"""How much of a long line a message shows."""


def first_different_line(first: str, second: str, *, names: tuple[str, str]) -> str:
    """Where two lists of lines differ first.

    Example:
        >>> first_different_line("a\\nb", "a", names=("rank 0", "rank 1"))
        "'b' on rank 0, nothing on rank 1"
    """
    for one, two in zip_longest(first.splitlines(), second.splitlines()):
        if one != two:
            shown = [
                "nothing" if line is None else repr(_cut(line, one, two)) for line in (one, two)
            ]
            return f"{shown[0]} on {names[0]}, {shown[1]} on {names[1]}"
    raise AssertionError("the texts are equal")


def _cut(line: str, one: str | None, two: str | None) -> str:
    """The stretch of a long line in which it differs from the other."""
    if len(line) <= SHOWN_CHARACTERS:
        return line
    pairs = zip(one or "", two or "", strict=False)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    start = min(max(0, same - 40), len(line) - SHOWN_CHARACTERS)
    end = start + SHOWN_CHARACTERS
    return ("..." if start else "") + line[start:end] + ("..." if end < len(line) else "")


def check_agreement(
    group: dist.ProcessGroup,
    lines: Iterable[str],
    *,
    device: torch.device,
    what: str = "optimizers",
) -> None:
    """Compares lines across the ranks of a group; the same outcome on every rank.

    Digests of one size are compared first, so that ranks with different lines still issue the same
    collectives. Where they differ, one rank sends its lines and one compares them.

    Args:
        group: the ranks that must agree.
        lines: everything they must agree on.
        device: of the group's tensors.
        what: what the lines describe, for the message.

    Raises:
        ValueError: on every rank, naming two ranks that differ and their first difference.
    """
    world_size = dist.get_world_size(group)
    if world_size == 1:
        return
    text = "\n".join(lines)
    digest = torch.frombuffer(
        bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8
    ).to(device)
    digests = [torch.empty_like(digest) for _ in range(world_size)]
    dist.all_gather(digests, digest, group=group)
    different = [r for r, theirs in enumerate(digests) if not torch.equal(theirs, digests[0])]
    if not different:
        return
    other = different[0]
    ranks = dist.get_process_group_ranks(group)
    names = (f"rank {ranks[0]}", f"rank {ranks[other]}")
    first = _broadcast(text, 0, group)
    found = ""
    if dist.get_rank(group) == other:
        found = first_different_line(first, text, names=names)
    found = _broadcast(found, other, group)
    raise ValueError(
        f"{names[0]} and {names[1]} built different {what}: {found}. Build the same model and "
        "param groups on every rank"
    )


def _broadcast(text: str, group_src: int, group: dist.ProcessGroup) -> str:
    texts = [text]
    dist.broadcast_object_list(texts, group=group, group_src=group_src)
    return texts[0]
