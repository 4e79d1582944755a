"""Plans of any mesh, shapes, vectors and rates, for properties that hold whatever these are."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from normuon.distributed.cost import CostModel
from normuon.distributed.layout import Region, layout_from_placements
from normuon.distributed.plan import make_plan
from normuon.distributed.task import MatrixTask
from tests.planned import place_of, plain_flops


@st.composite
def placements_on(draw, mesh_shape, num_dims):
    """Drawn from the last axis to the first, so that some are what FSDP2 over TP makes."""
    placements = []
    later_shards = [1] * num_dims
    for size in reversed(mesh_shape):
        dim = draw(st.integers(0, num_dims - 1))
        fsdp2 = ("strided_shard", dim, later_shards[dim])
        other = ("strided_shard", dim, draw(st.integers(1, 3)))
        placement = draw(st.sampled_from([("replicate",), ("shard", dim), fsdp2, other]))
        if placement != ("replicate",):
            later_shards[dim] *= size
        placements.insert(0, placement)
    return placements


@st.composite
def parameters(draw, mesh_shape, name):
    """The matrices of one parameter: whole, transposed, fused blocks, experts or a convolution."""
    kind = draw(st.sampled_from(["whole", "transposed", "fused", "experts", "conv"]))
    rows, cols = draw(st.integers(1, 9)), draw(st.integers(1, 7))
    number = draw(st.integers(1, 4)) if kind in ("fused", "experts") else 1
    shape = {
        "fused": (number * rows, cols),
        "experts": (number, rows, cols),
        "conv": (rows, cols, 2, 1),
    }.get(kind, (rows, cols))
    layout = layout_from_placements(
        shape,
        mesh_shape=mesh_shape,
        placements=draw(placements_on(mesh_shape, len(shape))),
        strided_order=draw(st.sampled_from(["fsdp2", "dtensor"])),
    )
    regions = {
        "fused": [Region((i * rows, 0), (rows, cols)) for i in range(number)],
        "experts": [Region((i, 0, 0), (1, rows, cols)) for i in range(number)],
    }.get(kind, [Region.whole(shape)])
    of_rows, of_cols = {
        "transposed": ((1,), (0,)),
        "experts": ((1,), (2,)),
        "conv": ((0,), (1, 2, 3)),
    }.get(kind, ((0,), (1,)))
    # NorMuon's vectors as often as not; else any number of any.
    normuon = ((of_rows,), ((),))
    lying = st.lists(st.sampled_from([of_rows, of_cols, ()]), max_size=2).map(tuple)
    state_dims, summary_dims = draw(st.one_of(st.just(normuon), st.tuples(lying, lying)))
    m = regions[0].shape[1] if kind == "transposed" else rows
    wire_bytes, side_bytes = draw(st.sampled_from([(2, 4), (2, 4), (4, 4), (4, 8)]))
    return [
        MatrixTask(
            name=name,
            param=place_of(name),
            index=index,
            region=region,
            rows=m,
            cols=region.numel // m,
            layout=layout,
            flops=plain_flops(m, region.numel // m),
            key=f"{state_dims} {summary_dims}",
            state_dims=state_dims,
            summary_dims=summary_dims,
            wire_bytes=wire_bytes,
            side_bytes=side_bytes,
        )
        for index, region in enumerate(regions)
    ]


@st.composite
def plans(draw):
    mesh_shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)))
    world_size = math.prod(mesh_shape)
    names = [f"w{i}" for i in range(draw(st.integers(1, 4)))]
    tasks = [task for name in names for task in draw(parameters(mesh_shape, name))]
    model = CostModel(
        flops_per_second=draw(st.sampled_from([1e3, 1e9, 1e15])),
        bytes_per_second=draw(st.sampled_from([1e3, 1e9])),
        replica_bytes_per_second=draw(st.sampled_from([None, 1e2])),
        latency_seconds=draw(st.sampled_from([0.0, 1e-5])),
    )
    return make_plan(
        tasks,
        world_size=world_size,
        cost_model=model,
        balance=draw(st.sampled_from(["flops", "flops", "paper"])),
        bucket_bytes=draw(st.sampled_from([1, 200, 1000, 10**6])),
    )
