"""Matrices to plan, and what a plan sends, counted route by route."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from normuon.distributed.layout import Placement, Region, ShardLayout, layout_from_placements
from normuon.distributed.plan import Direction, Plan
from normuon.distributed.task import MatrixTask
from normuon.distributed.tiling import Route
from normuon.orthogonalize.flops import orthogonalize_flops

SHARD_ROWS: list[Placement] = [("shard", 0)]

NEURONS_ARE_ROWS = {"state_dims": ((0,),), "summary_dims": ((),)}
"""NorMuon's, for `nn.Linear`: second moments along the rows both ways, a scale on the way back."""


def place_of(name: str) -> tuple[int, int]:
    """A parameter's place in the optimizer: as the names, shorter ones first."""
    return (0, int.from_bytes(name.encode(), "big"))


def plain_flops(m: int, n: int) -> int:
    """FLOPs of five plain Newton-Schulz steps."""
    return orthogonalize_flops(m, n, segments=[1] * 5)


def matrix_of(
    layout: ShardLayout, name: str, region: Region | None = None, **options
) -> MatrixTask:
    """A rectangle of a parameter, by default all of it, whose rows are neurons."""
    region = Region.whole(layout.global_shape) if region is None else region
    rows, cols = region.shape[-2:]
    given = {
        "name": name,
        "param": place_of(name),
        "region": region,
        "rows": rows,
        "cols": cols,
        "layout": layout,
        "flops": plain_flops(rows, cols),
        **NEURONS_ARE_ROWS,
        **options,
    }
    return MatrixTask(**given)


def matrix(
    name: str,
    shape: Sequence[int],
    mesh_shape: Sequence[int],
    placements: Sequence[Placement],
    **options,
) -> MatrixTask:
    """A parameter that is one matrix, whose rows are neurons."""
    layout = layout_from_placements(shape, mesh_shape=mesh_shape, placements=placements)
    return matrix_of(layout, name, **options)


def experts(
    name: str, shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> list[MatrixTask]:
    """The matrices of a parameter [experts, m, n]."""
    layout = layout_from_placements(shape, mesh_shape=mesh_shape, placements=placements)
    return [
        matrix_of(
            layout,
            name,
            Region((e, 0, 0), (1, *shape[1:])),
            index=e,
            state_dims=((1,),),
        )
        for e in range(shape[0])
    ]


def every_route(plan: Plan, direction: Direction) -> list[Route]:
    """All routes of all buckets, local ones included."""
    return [
        route
        for bucket in range(len(plan.buckets))
        for rank in range(plan.world_size)
        for route in plan.sends(rank, bucket, direction)
    ]


def route_bytes(plan: Plan, route: Route) -> int:
    """What a route takes in a message."""
    task = plan.tasks[route.task]
    return route.numel * task.wire_bytes + sum(route.entries) * task.side_bytes


def bytes_sent(plan: Plan, direction: Direction) -> Counter[int]:
    """Bytes that each rank sends to others."""
    found: Counter[int] = Counter()
    for route in every_route(plan, direction):
        if not route.is_local:
            found[route.source] += route_bytes(plan, route)
    return found


def elements_by_peer(plan: Plan, rank: int, bucket: int, direction: Direction) -> list[int]:
    """Matrix elements that `rank` sends to each other rank."""
    found = [0] * plan.world_size
    for route in plan.sends(rank, bucket, direction):
        if not route.is_local:
            found[route.destination] += route.numel
    return found


def owned(plan: Plan, rank: int, bucket: int) -> list[int]:
    """The matrices of a bucket that `rank` owns."""
    return [index for index in plan.buckets[bucket] if rank in plan.owners[index]]
