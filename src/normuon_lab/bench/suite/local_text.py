"""Bytes to train on where there is no network: the source of Python's own library."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT_EVERY = 10
"""Every tenth file is held out."""
APART = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True, slots=True)
class LocalText:
    """Bytes of whole files.

    Attributes:
        train: ``[n]`` uint8.
        held_out: ``[m]`` uint8, of other files.
        files: how many of each.
    """

    train: Tensor
    held_out: Tensor
    files: tuple[int, int]


def local_text(max_bytes: int, folder: Path | None = None) -> LocalText:
    """Reads .py files in the order of their paths until there are `max_bytes` bytes.

    Args:
        max_bytes: of both parts together, but for the last file.
        folder: where; by default the running Python's standard library.

    Raises:
        RuntimeError: fewer than two files can be read.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    contents = _contents(folder or Path(sysconfig.get_path("stdlib")))
    for number, content in enumerate(contents):
        parts[number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(content)
        total += len(content)
        if total >= max_bytes and parts[1]:
            break
    if not all(parts):
        raise RuntimeError(f"fewer than {HELD_OUT_EVERY} .py files to read")
    train, held_out = (
        torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts
    )
    return LocalText(train, held_out, (len(parts[0]), len(parts[1])))


def windows(text: Tensor, *, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``[count, length]``: stretches of a text that begin anywhere."""
    starts = torch.randint(len(text) - length + 1, (count, 1), generator=generator)
    return text[starts + torch.arange(length)]


def _contents(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*.py")):
        if APART.isdisjoint(path.relative_to(folder).parts):
            try:
                content = path.read_bytes()
            except OSError:
                continue
            if content:
                yield content
