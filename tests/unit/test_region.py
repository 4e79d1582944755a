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

from normuon.distributed.mesh_layout import layout_from_placements
from normuon.distributed.region import Region, ShardLayout


def rows(start: int, end: int, num_cols: int = 4) -> Region:
    return Region((start, 0), (end - start, num_cols))


class TestRegion:
    def test_counts_elements_and_knows_when_it_is_empty(self):
        assert Region((1, 2), (3, 4)).numel == 12
        assert Region((1, 2), (3, 0)).is_empty
        assert not Region((), ()).is_empty

    def test_disjoint_regions_intersect_in_an_empty_region(self):
        common = Region((0, 0), (2, 2)).intersect(Region((2, 0), (2, 2)))
        assert common.is_empty

    def test_contains_is_about_every_dim(self):
        outer = Region((1, 1), (3, 3))
        assert outer.contains(Region((2, 1), (2, 3)))
        assert not outer.contains(Region((2, 2), (2, 3)))
        assert outer.contains(Region((9, 9), (0, 3)))

    def test_slices_cut_the_region_out_of_a_tensor(self):
        x = torch.arange(20).view(4, 5)
        assert x[Region((1, 2), (2, 3)).slices()].tolist() == [[7, 8, 9], [12, 13, 14]]

    def test_relative_to_refuses_a_region_that_is_not_inside(self):
        with pytest.raises(ValueError, match="does not lie in"):
            Region((0, 0), (2, 2)).relative_to(Region((1, 0), (2, 2)))

    def test_along_projects_on_chosen_dims(self):
        assert Region((1, 2, 3), (4, 5, 6)).along((2, 0)) == Region((3, 1), (6, 4))

    @pytest.mark.parametrize(("offsets", "shape"), [((0,), (1, 1)), ((-1,), (1,)), ((0,), (-1,))])
    def test_malformed_regions_are_refused(self, offsets, shape):
        with pytest.raises(ValueError, match="offsets"):
            Region(offsets, shape)


class TestShardLayout:
    def test_equal_layouts_are_equal_and_hash_alike(self):
        make = lambda: ShardLayout((3, 4), ((rows(0, 2),), (rows(2, 3),)))  # noqa: E731
        assert make() == make()
        assert hash(make()) == hash(make())

    def test_empty_shards_are_neither_holders_nor_pieces(self):
        layout = ShardLayout((3, 4), ((rows(0, 3),), (rows(3, 3),), ()))
        assert layout.storing_ranks == (0,)
        assert [piece.ranks for piece in layout.pieces(Region.whole((3, 4)))] == [(0,)]

    def test_pieces_of_a_fused_block_cross_shard_borders(self):
        layout = layout_from_placements((12, 4), mesh_shape=(5,), placements=[("shard", 0)])
        second_third = layout.pieces(rows(4, 8))
        assert [(p.region, p.ranks) for p in second_third] == [
            (rows(4, 6), (1,)),
            (rows(6, 8), (2,)),
        ]

    def test_replicas_are_holders_of_one_piece(self):
        layout = layout_from_placements(
            (4, 4), mesh_shape=(3, 2), placements=[("replicate",), ("shard", 0)]
        )
        assert [p.ranks for p in layout.pieces(rows(0, 4))] == [(0, 2, 4), (1, 3, 5)]
        assert layout.replicas == (0, 0, 1, 1, 2, 2)
        assert layout.full_replicas == (0, 1, 2)
        assert layout.ranks_of_replica(1) == (2, 3)

    def test_replicas_are_inferred_from_who_stores_what(self):
        given = layout_from_placements(
            (4, 4), mesh_shape=(3, 2), placements=[("replicate",), ("shard", 0)]
        )
        assert ShardLayout((4, 4), given.regions_by_rank).replicas == given.replicas

    def test_irregular_copies_make_one_replica(self):
        layout = ShardLayout((4, 4), ((rows(0, 2),), (rows(0, 2), rows(2, 4)), (rows(2, 4),)))
        layout.validate("w")
        assert layout.replicas == (0, 0, 0)

    @pytest.mark.parametrize(
        ("regions_by_rank", "message"),
        [
            (((rows(0, 2),), (rows(3, 4),)), r"cover 12 of 16 elements"),
            (((rows(0, 3),), (rows(2, 4),)), r"overlap without being equal"),
            (((rows(0, 2),), (rows(2, 5),)), r"leaves the tensor"),
        ],
    )
    def test_a_layout_that_is_no_tiling_is_refused_by_name(self, regions_by_rank, message):
        layout = ShardLayout((4, 4), regions_by_rank)
        with pytest.raises(ValueError, match=rf"blocks\.0\.w \[4, 4\]: .*{message}"):
            layout.validate("blocks.0.w")

    def test_a_replica_that_lacks_a_piece_is_refused(self):
        layout = ShardLayout((4, 4), ((rows(0, 2),), (rows(2, 4),), (rows(0, 2),)), (0, 0, 1))
        with pytest.raises(ValueError, match=r"replica 1 stores .* 0 times"):
            layout.validate("w")

    def test_local_regions_lie_side_by_side(self):
        layout = layout_from_placements(
            (12, 4), mesh_shape=(2,), placements=[("strided_shard", 0, 2)], strided_order="dtensor"
        )
        assert layout.regions_by_rank[1] == (rows(3, 6), rows(9, 12))
        assert layout.local_regions(1) == (rows(0, 3), rows(3, 6))


SPELLINGS = {1: lambda p: Replicate(), 2: lambda p: Shard(p[1]), 3: lambda p: _strided(p)}


def _strided(placement):
    return _StridedShard(placement[1], split_factor=placement[2])


def as_torch(placements):
    return [SPELLINGS[len(p)](p) for p in placements]


def gathered(tensor: torch.Tensor, layout: ShardLayout, rank: int) -> torch.Tensor:
    """The local tensor that the layout says `rank` stores."""
    regions, places = layout.regions_by_rank[rank], layout.local_regions(rank)
    if not regions:
        return tensor.new_empty(0)
    ends = [place.ends for place in places]
    local = tensor.new_full([max(e[d] for e in ends) for d in range(tensor.ndim)], -1)
    for region, place in zip(regions, places, strict=True):
        local[place.slices()] = tensor[region.slices()]
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
            assert real.numel() == layout.numel_on(rank)
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
            assert layout.numel_on(rank) == torch.Size(local_shape).numel()
            if layout.numel_on(rank):
                assert layout.regions_by_rank[rank][0].offsets == tuple(offset)


@pytest.mark.parametrize("num_rows", [16, 17, 18, 3])
def test_fsdp2_over_tp_stores_parts_of_tps_chunk(num_rows, fake_ranks):
    """FSDP2 splits what TP left on the rank; DTensor's reading of its own placements can differ.

    With 17 rows on a 4 x 2 mesh rank 6 stores nothing, while the DTensor's metadata gives it a row.
    """
    x = torch.arange(num_rows * 3.0).view(num_rows, 3)
    layout = layout_from_placements(
        (num_rows, 3), mesh_shape=(4, 2), placements=[("strided_shard", 0, 2), ("shard", 0)]
    )
    layout.validate("w")
    for rank in fake_ranks(8):
        mesh = init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
        linear = torch.nn.Linear(3, num_rows, bias=False)
        over_tp = distribute_tensor(x, mesh["tp"], [Shard(0)], src_data_rank=None)
        linear.weight = torch.nn.Parameter(over_tp)
        fully_shard(linear, mesh=mesh["dp"])
        assert linear.weight.placements == (_StridedShard(0, split_factor=2), Shard(0))
        local = linear.weight.to_local().detach()
        assert local.numel() == layout.numel_on(rank)
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
