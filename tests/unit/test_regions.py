"""Rectangles, layouts, and their agreement with what torch really stores."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from normuon.distributed.layout import (
    Region,
    Segment,
    ShardLayout,
    layout_from_placements,
    ranks_in,
)
from normuon.distributed.tiling import tiling_of
from tests.planned import matrix_of


def rows(start: int, end: int, num_cols: int = 4) -> Region:
    return Region((start, 0), (end - start, num_cols))


def pieces(layout: ShardLayout, region: Region) -> list[tuple[Region, tuple[int, ...]]]:
    """How a layout cuts a rectangle of a parameter, in the parameter's own indices."""
    tiling = tiling_of(matrix_of(layout, "w", region))
    return [(piece.region.shifted(region.offsets), piece.ranks) for piece in tiling.pieces]


class TestRegion:
    def test_counts_elements(self):
        assert Region((1, 2), (3, 4)).numel == 12
        assert Region((1, 2), (3, 0)).numel == 0
        assert Region((), ()).numel == 1

    def test_the_whole_of_a_tensor_begins_at_its_corner(self):
        assert Region.whole(torch.Size([3, 4])) == Region((0, 0), (3, 4))

    def test_slices_cut_the_region_out_of_a_tensor(self):
        x = torch.arange(20).view(4, 5)
        assert x[Region((1, 2), (2, 3)).slices()].tolist() == [[7, 8, 9], [12, 13, 14]]

    def test_shifted_moves_the_corner_alone(self):
        assert Region((1, 2), (3, 4)).shifted((10, 0)) == Region((11, 2), (3, 4))

    def test_along_projects_on_chosen_dims(self):
        assert Region((1, 2, 3), (4, 5, 6)).along((2, 0)) == Region((3, 1), (6, 4))


def test_ranks_in_a_mask_ascend():
    assert ranks_in(0) == ()
    assert ranks_in(1 << 1023 | 1 << 70 | 1) == (0, 70, 1023)


COLUMNS = ((0, 4),)


class TestShardLayout:
    def test_a_layout_equals_itself_alone(self):
        """Layouts are keys of what is computed once for each, so they are compared by identity."""
        make = lambda: ShardLayout(  # noqa: E731
            (3, 4), ((((0, 2),), COLUMNS), (((2, 3),), COLUMNS)), (0, 0)
        )
        assert make() != make()

    def test_what_is_remembered_is_computed_once(self):
        layout = layout_from_placements((7, 4), mesh_shape=(2,), placements=[("shard", 0)])
        calls = []
        for _ in range(2):
            assert layout.remember(("test", 1), lambda: calls.append(1) or "value") == "value"
        assert calls == [1]

    def test_empty_shards_are_neither_holders_nor_pieces(self):
        layout = ShardLayout((3, 4), ((((0, 3),), COLUMNS), ((), COLUMNS)), (0, 0))
        assert layout.storing_ranks == (0,)
        assert list(layout.regions(1)) == []
        assert layout.local_shape(1) == (0, 4)
        assert pieces(layout, Region.whole((3, 4))) == [(rows(0, 3), (0,))]

    def test_pieces_of_a_fused_block_cross_shard_borders(self):
        layout = layout_from_placements((12, 4), mesh_shape=(5,), placements=[("shard", 0)])
        assert pieces(layout, rows(4, 8)) == [(rows(4, 6), (1,)), (rows(6, 8), (2,))]

    def test_pieces_count_from_the_corner_of_their_matrix(self):
        layout = layout_from_placements((12, 4), mesh_shape=(5,), placements=[("shard", 0)])
        tiling = tiling_of(matrix_of(layout, "w", rows(4, 8)))
        assert [piece.region for piece in tiling.pieces] == [rows(0, 2), rows(2, 4)]

    def test_segments_are_cut_where_a_shard_begins_or_ends(self):
        layout = layout_from_placements((12, 4), mesh_shape=(5,), placements=[("shard", 0)])
        assert layout.segments(0, 4, 8) == (Segment(0, 2, 0b10), Segment(2, 4, 0b100))
        assert layout.segments(1, 1, 3) == (Segment(0, 2, 0b11111),)

    def test_replicas_are_holders_of_one_piece(self):
        layout = layout_from_placements(
            (4, 4), mesh_shape=(3, 2), placements=[("replicate",), ("shard", 0)]
        )
        assert [ranks for _, ranks in pieces(layout, rows(0, 4))] == [(0, 2, 4), (1, 3, 5)]
        assert layout.replicas == (0, 0, 1, 1, 2, 2)
        assert layout.full_replicas == (0, 1, 2)
        assert ranks_in(layout.replica_masks[1]) == (2, 3)

    def test_local_regions_lie_side_by_side(self):
        layout = layout_from_placements(
            (12, 4), mesh_shape=(2,), placements=[("strided_shard", 0, 2)], strided_order="dtensor"
        )
        assert list(layout.regions(1)) == [rows(3, 6), rows(9, 12)]
        assert layout.local_shape(1) == (6, 4)
        assert layout.local_slices(1, rows(3, 6)) == rows(0, 3).slices()
        assert layout.local_slices(1, rows(9, 12)) == rows(3, 6).slices()
        assert layout.local_slices(1, rows(10, 11)) == rows(4, 5).slices()

    def test_a_region_that_a_rank_does_not_store_has_no_place_there(self):
        layout = layout_from_placements((12, 4), mesh_shape=(2,), placements=[("shard", 0)])
        with pytest.raises(AssertionError, match="rank 1 does not store"):
            layout.local_slices(1, rows(5, 7))


SPELLINGS = {1: lambda p: Replicate(), 2: lambda p: Shard(p[1]), 3: lambda p: _strided(p)}


def _strided(placement):
    return _StridedShard(placement[1], split_factor=placement[2])


def as_torch(placements):
    return [SPELLINGS[len(p)](p) for p in placements]


def numel_on(layout: ShardLayout, rank: int) -> int:
    return sum(region.numel for region in layout.regions(rank))


def gathered(tensor: torch.Tensor, layout: ShardLayout, rank: int) -> torch.Tensor:
    """The local tensor that the layout says `rank` stores."""
    local = tensor.new_full(layout.local_shape(rank), -1)
    for region in layout.regions(rank):
        local[layout.local_slices(rank, region)] = tensor[region.slices()]
    return local


SHAPES = [(17, 5), (18, 40), (72, 24), (1, 9), (9, 1), (6, 5, 7)]
MESHES = [
    ((4,), [("shard", 0)]),
    ((8,), [("shard", 0)]),
    ((16,), [("shard", 0)]),
    ((8,), [("shard", 1)]),
    ((2, 3), [("replicate",), ("shard", 0)]),
    ((3, 2), [("shard", 1), ("replicate",)]),
    ((2, 4), [("shard", 0), ("shard", 1)]),
    ((2, 3), [("shard", 0), ("shard", 0)]),
    ((4, 2), [("strided_shard", 0, 2), ("shard", 0)]),
    ((2, 2, 2), [("replicate",), ("strided_shard", 0, 2), ("shard", 0)]),
    ((2, 2, 2), [("strided_shard", 1, 2), ("shard", 0), ("shard", 1)]),
    ((2, 3), [("shard", 0), ("strided_shard", 0, 2)]),
]


@pytest.fixture
def fake_ranks():
    """Calls the body once per rank of a world in which collectives do nothing."""

    def each_rank(world_size):
        for rank in range(world_size):
            dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
            try:
                yield rank
            finally:
                dist.destroy_process_group()

    return each_rank


@pytest.mark.parametrize(("mesh_shape", "placements"), MESHES, ids=str)
def test_layouts_are_what_distribute_tensor_stores(mesh_shape, placements, fake_ranks):
    world_size = torch.Size(mesh_shape).numel()
    for rank in fake_ranks(world_size):
        mesh = init_device_mesh("cpu", mesh_shape)
        for shape in SHAPES:
            x = torch.arange(torch.Size(shape).numel()).view(shape)
            real = distribute_tensor(x, mesh, as_torch(placements), src_data_rank=None).to_local()
            layout = layout_from_placements(
                shape, mesh_shape=mesh_shape, placements=placements, strided_order="dtensor"
            )
            ours = gathered(x, layout, rank)
            assert real.numel() == numel_on(layout, rank)
            if real.numel():
                assert torch.equal(real, ours), (shape, rank)


@pytest.mark.parametrize(("mesh_shape", "placements"), MESHES, ids=str)
def test_layouts_start_where_dtensor_says(mesh_shape, placements):
    coordinates = itertools.product(*map(range, mesh_shape))
    for rank, coordinate in enumerate(coordinates):
        for shape in SHAPES:
            local_shape, offset = _compute_local_shape_and_global_offset(
                shape, mesh_shape, list(coordinate), as_torch(placements)
            )
            layout = layout_from_placements(
                shape, mesh_shape=mesh_shape, placements=placements, strided_order="dtensor"
            )
            assert numel_on(layout, rank) == torch.Size(local_shape).numel()
            if numel_on(layout, rank):
                assert next(layout.regions(rank)).offsets == tuple(offset)


@pytest.mark.parametrize("num_rows", [16, 17, 18, 3])
def test_fsdp2_over_tp_stores_parts_of_tps_chunk(num_rows, fake_ranks):
    """FSDP2 splits what TP left on the rank; DTensor's reading of its own placements can differ.

    With 17 rows on a 4 x 2 mesh rank 6 stores nothing, while the DTensor's metadata gives it a row.
    """
    x = torch.arange(num_rows * 3.0).view(num_rows, 3)
    layout = layout_from_placements(
        (num_rows, 3), mesh_shape=(4, 2), placements=[("strided_shard", 0, 2), ("shard", 0)]
    )
    stored = torch.zeros(num_rows, 3)
    for rank in range(8):
        for region in layout.regions(rank):
            stored[region.slices()] += 1
    assert torch.equal(stored, torch.ones(num_rows, 3))
    for rank in fake_ranks(8):
        mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
        linear = torch.nn.Linear(3, num_rows, bias=False)
        over_tp = distribute_tensor(x, mesh["tp"], [Shard(0)], src_data_rank=None)
        linear.weight = torch.nn.Parameter(over_tp)
        fully_shard(linear, mesh=mesh["dp"])
        assert linear.weight.placements == (_StridedShard(0, split_factor=2), Shard(0))
        local = linear.weight.to_local().detach()
        assert local.numel() == numel_on(layout, rank)
        if local.numel():
            assert torch.equal(local, gathered(x, layout, rank))


class TestLayoutFromPlacements:
    def test_equal_arguments_share_one_layout(self):
        make = lambda shape: layout_from_placements(  # noqa: E731
            shape, mesh_shape=[4], placements=[("shard", -2)]
        )
        assert make([8, 4]) is make((8, 4))

    @pytest.mark.parametrize(
        ("placements", "message"),
        [
            ([("shard", 0), ("shard", 0)], "mesh"),
            ([("partial",)], "pass"),
            ([("shard", 2)], "2 dims"),
            ([("strided_shard", 0, 0)], "split_factor"),
        ],
    )
    def test_bad_placements_are_refused(self, placements, message):
        with pytest.raises(ValueError, match=message):
            layout_from_placements((4, 4), mesh_shape=(2,), placements=placements)
