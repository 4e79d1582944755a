"""Where two configurations differ, for runs that continue and for caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def first_difference(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> tuple[str, Any, Any] | None:
    """The first field, by dotted name, in which two nested configurations differ.

    >>> first_difference({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}})
    ('b.c', 2, 3)
    >>> first_difference({"a": 1}, {"a": 1}) is None
    True
    """
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found = first_difference(before, after, f"{prefix}{key}.")
            if found is not None:
                return found
        elif before != after:
            return f"{prefix}{key}", before, after
    return None
