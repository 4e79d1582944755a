"""Which layer of a model a parameter belongs to, by its name."""

from __future__ import annotations

import re
from collections.abc import Iterable


def layer_of(name: str) -> int | None:
    """The layer that a parameter's name puts it in: its first number; None without one.

    Example:
        >>> layer_of("transformer.h.11.attn.c_attn.weight"), layer_of("lm_head.weight")
        (11, None)
    """
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def layer_numbers(names: Iterable[str]) -> list[int]:
    """Every layer that some parameter belongs to, ascending.

    Example:
        >>> layer_numbers(["h.2.mlp.weight", "lm_head.weight", "h.0.mlp.weight", "h.2.attn.weight"])
        [0, 2]
    """
    return sorted({layer for name in names if (layer := layer_of(name)) is not None})
