"""One text for all that ranks must agree on, and one sentence for where two such texts differ.

Holds integers and names only, no seconds and no sentences, so equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from itertools import takewhile
from typing import Any

from normuon.distributed.plan_record import PlanRecord
from normuon.distributed.region import ShardLayout

SHOWN_CHARACTERS = 120
"""How much of a long text a message shows."""

FORMAT = 1
"""Raised whenever the text of an unchanged plan changes."""


def canonical_text(plan: PlanRecord) -> str:
    """The plan as compact JSON with a fixed order of everything.

    Layouts are listed once, by first use; matrices refer to them by place.
    """
    places: dict[ShardLayout, int] = {}
    matrices = []
    for index, task in enumerate(plan.tasks):
        place = places.setdefault(task.layout, len(places))
        matrices.append(
            {
                "name": task.name,
                "index": task.index,
                "offsets": task.region.offsets,
                "shape": task.region.shape,
                "rows": task.rows,
                "cols": task.cols,
                "key": task.key,
                "neuron_dims": task.neuron_dims,
                "wire_dtype": task.wire_dtype,
                "neuron_dtype": task.neuron_dtype,
                "layout": place,
                "flops": plan.flops_by_matrix[index],
                "owners": "all" if _is_everywhere(plan, index) else plan.owners[index],
            }
        )
    content = {
        "format": FORMAT,
        "world_size": plan.world_size,
        "balance": plan.balance,
        "bucket_bytes": plan.bucket_bytes,
        "layouts": [_layout_content(layout) for layout in places],
        "matrices": matrices,
        "buckets": [bucket.tasks for bucket in plan.buckets],
    }
    return json.dumps(content, separators=(",", ":"))


def _is_everywhere(plan: PlanRecord, task: int) -> bool:
    return len(plan.owners[task]) == plan.world_size > 1


def _layout_content(layout: ShardLayout) -> dict[str, Any]:
    content: dict[str, Any] = layout.remember(
        "canonical",
        lambda: {
            "global_shape": layout.global_shape,
            "replicas": layout.replicas,
            "regions_by_rank": [
                [(region.offsets, region.shape) for region in regions]
                for regions in layout.regions_by_rank
            ],
        },
    )
    return content


def first_difference(
    first: str, second: str, *, names: tuple[str, str] = ("this plan", "the other")
) -> str | None:
    """Say in one sentence where two canonical texts differ first.

    Args:
        first: a plan's `canonical()`.
        second: another's.
        names: what to call the two, such as ("rank 0", "rank 3").

    Returns:
        The sentence, or None when the texts say the same.

    Example:
        >>> a = '{"format":1,"world_size":2,"balance":"flops","bucket_bytes":8}'
        >>> first_difference(a, a.replace(":2", ":4"), names=("rank 0", "rank 1"))
        'world_size: 2 in rank 0, 4 in rank 1'
    """
    if first == second:
        return None
    one, two = json.loads(first), json.loads(second)
    for key in ("format", "world_size", "balance", "bucket_bytes"):
        if one.get(key) != two.get(key):
            return _differ(key, one.get(key), two.get(key), names)
    for place, (mine, theirs) in enumerate(zip(one["matrices"], two["matrices"], strict=False)):
        sentence = _matrix_difference(place, mine, theirs, one, two, names)
        if sentence is not None:
            return sentence
    if len(one["matrices"]) != len(two["matrices"]):
        fewer = min(len(one["matrices"]), len(two["matrices"]))
        longer = one if len(one["matrices"]) > fewer else two
        extra = _label(longer["matrices"][fewer])
        numbers = _differ("number of matrices", len(one["matrices"]), len(two["matrices"]), names)
        return f"{numbers}; the first that only one has is {extra}"
    for place, (mine, theirs) in enumerate(zip(one["buckets"], two["buckets"], strict=False)):
        if mine != theirs:
            return _differ(f"bucket {place}", mine, theirs, names)
    return _differ("number of buckets", len(one["buckets"]), len(two["buckets"]), names)


def _matrix_difference(
    place: int,
    mine: dict[str, Any],
    theirs: dict[str, Any],
    one: dict[str, Any],
    two: dict[str, Any],
    names: tuple[str, str],
) -> str | None:
    where = f"matrix {place}"
    if (mine["name"], mine["index"]) != (theirs["name"], theirs["index"]):
        return _differ(where, _label(mine), _label(theirs), names)
    where = f"{where}, {_label(mine)}"
    for key in mine:
        if key not in ("layout", "owners") and mine[key] != theirs[key]:
            return _differ(f"{where}: {key}", mine[key], theirs[key], names)
    layouts = one["layouts"][mine["layout"]], two["layouts"][theirs["layout"]]
    for key in ("global_shape", "replicas"):
        if layouts[0][key] != layouts[1][key]:
            return _differ(f"{where}: {key}", layouts[0][key], layouts[1][key], names)
    stored = layouts[0]["regions_by_rank"], layouts[1]["regions_by_rank"]
    for rank, (here, there) in enumerate(zip(*stored, strict=False)):
        if here != there:
            return _differ(f"{where}: (offsets, shape) stored on rank {rank}", here, there, names)
    if mine["owners"] != theirs["owners"]:
        return _differ(f"{where}: owners", mine["owners"], theirs["owners"], names)
    return None


def _label(matrix: dict[str, Any]) -> str:
    return f"{matrix['name']}[{matrix['index']}]"


def _differ(what: str, first: object, second: object, names: tuple[str, str]) -> str:
    texts = [str(first), str(second)]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))

    def short(text: str) -> str:
        if len(text) <= SHOWN_CHARACTERS:
            return text
        start = min(max(0, same - 40), len(text) - SHOWN_CHARACTERS)  # Where they differ is shown.
        end = start + SHOWN_CHARACTERS
        before, after = "..." if start else "", "..." if end < len(text) else ""
        return before + text[start:end] + after

    return f"{what}: {short(texts[0])} in {names[0]}, {short(texts[1])} in {names[1]}"
