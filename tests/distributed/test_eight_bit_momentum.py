"""8-bit momentum on ranks: the codes, their blocks' maxima and the step of one process, bit by bit.

Blocks have 128 elements of the whole parameter, so that most of these shards cut some.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from normuon import MatrixView, NorMuon, convert_state
from tests.distributed.parity import (
    PLACEMENTS,
    changed,
    differing,
    distributed,
    gradient,
    snapshot,
    spread,
    values,
    weights,
)
from tests.distributed.test_checkpoints import (
    LAYOUTS,
    content,
    load_content,
    train,
    world_size_of,
)
from tests.distributed.test_same_step_on_every_layout import differences, one_group

INT8 = {"momentum_dtype": torch.int8}
# Blocks that end with a shard, that shards cut, one block only; and fewer rows or columns than
# ranks, so that some shards are empty.
SHAPES = [(17, 300), (12, 512), (300, 17), (18, 40), (1, 200), (200, 1), (130, 130), (2, 3)]


def flat_case(rank, world_size, placement, options, dtype="float32"):
    mesh = init_device_mesh("cpu", (world_size,))
    options = {**INT8, **options}
    placements = [PLACEMENTS[placement]]
    return differences(
        SHAPES, mesh, placements, one_group, options, dtype=getattr(torch, dtype), steps=5
    )


@pytest.mark.parametrize("placement", list(PLACEMENTS))
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_number_of_ranks(ranks, world_size, placement):
    found = ranks.run(flat_case, world_size, placement=placement, options={})
    assert found == [[]] * world_size


@pytest.mark.parametrize("placement", ["shard_rows", "shard_columns"])
@pytest.mark.parametrize(
    "options",
    [
        {"nesterov": False, "maximize": True},
        {"skip_nonfinite": True, "neuron_axis": "short"},
        {"teams": "auto", "ns_dtype": torch.float64},
        {"balance": "paper", "ns_dtype": torch.bfloat16, "equilibrate": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_every_option(ranks, placement, options):
    found = ranks.run(flat_case, 3, placement=placement, options=options)
    assert found == [[]] * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
@pytest.mark.parametrize("placement", ["shard_rows", "shard_columns"])
def test_other_parameter_dtypes(ranks, placement, dtype):
    options = {"kahan_sum": True} if dtype == "bfloat16" else {}
    found = ranks.run(flat_case, 3, placement=placement, options=options, dtype=dtype)
    assert found == [[]] * 3


MESHES = {
    "hsdp_rows": [Replicate(), Shard(0)],
    "hsdp_columns": [Replicate(), Shard(1)],
    "rows_and_columns": [Shard(0), Shard(1)],
    "columns_twice": [Shard(1), Shard(1)],
}


def mesh_case(rank, world_size, placements):
    mesh = init_device_mesh("cpu", (2, 2))
    return differences(SHAPES, mesh, MESHES[placements], one_group, INT8, steps=4)


@pytest.mark.parametrize("placements", list(MESHES))
def test_two_dimensional_meshes(ranks, placements):
    assert ranks.run(mesh_case, 4, placements=placements) == [[]] * 4


VIEWS = {
    "conv1d": (MatrixView.transposed(), (150, 140)),
    "conv": (MatrixView.conv(), (10, 20, 3, 3)),
    "conv_transposed": (MatrixView.transposed(), (20, 10, 3, 3)),
    "experts": (MatrixView.experts(), (5, 8, 140)),
    "experts_transposed": (MatrixView.experts(transposed=True), (5, 12, 140)),
    "fused_qkv": (MatrixView.fused(14, 5, 5), (24, 130)),
    "fused_conv1d": (MatrixView.fused(140, 40, 40, neuron_dim=1), (18, 220)),
    "heads": (MatrixView(heads=6), (18, 140)),
    "heads_conv1d": (MatrixView(neuron_dim=1, heads=4), (18, 560)),
}


def view_case(rank, world_size, dim, mesh_shape):
    mesh = init_device_mesh("cpu", mesh_shape)
    placements = [Shard(dim)] if len(mesh_shape) == 1 else [Shard(dim), Shard(1 - dim)]
    found = []
    for name, (view, shape) in VIEWS.items():

        def groups_of(params, view=view):
            return [{"params": params, "view": view}]

        texts = differences([shape, shape], mesh, placements, groups_of, INT8, steps=3)
        found += [f"{name}: {text}" for text in texts]
    return found


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("mesh_shape", [(4,), (2, 2)], ids=str)
def test_views(ranks, mesh_shape, dim):
    """Fused QKV, heads, experts, convolutions and transposed weights."""
    found = ranks.run(view_case, 4, dim=dim, mesh_shape=mesh_shape)
    assert found == [[]] * 4


def copies_case(rank, world_size):
    """Plain copies under DDP: `process_group=` splits the work and changes no bit."""
    both = []
    for group in (None, dist.group.WORLD):
        params = [nn.Parameter(start) for start in weights(SHAPES)]
        optimizer = NorMuon(params, lr=1e-2, process_group=group, **INT8)
        train(params, optimizer, range(4))
        both.append(values(params, optimizer))
    return differing(*both)


def test_copies_that_share_the_work(ranks):
    assert ranks.run(copies_case, 2) == [[]] * 2


def poisoned_case(rank, world_size, placement):
    """A matrix with a NaN on one rank and one whose gradient is missing keep all their state."""
    mesh = init_device_mesh("cpu", (world_size,))
    params = distributed([(17, 300), (12, 512), (5, 200)], mesh, [PLACEMENTS[placement]])
    optimizer = NorMuon(params, lr=1e-2, skip_nonfinite=True, **INT8)
    train(params, optimizer, range(2))
    before = [snapshot(param, optimizer) for param in params]
    for number, param in enumerate(params):
        grad = gradient(param.shape, 2, number)
        if number == 0:
            grad[3, 7] = float("nan")
        param.grad = None if number == 1 else spread(grad, mesh, [PLACEMENTS[placement]])
    optimizer.step()
    return [changed(kept, param, optimizer) for kept, param in zip(before, params, strict=True)]


@pytest.mark.parametrize("placement", list(PLACEMENTS))
def test_what_is_not_stepped_keeps_its_codes(ranks, placement):
    for poisoned, without, stepped in ranks.run(poisoned_case, 2, placement=placement):
        assert poisoned == {"skipped_steps"}
        assert without == set()
        assert stepped >= {"weight", "momentum_codes", "momentum_absmax", "momentum_roundings"}


def missing_case(rank, world_size):
    """A gradient that one of two column shards lacks counts as zero there, as in one process."""
    mesh = init_device_mesh("cpu", (world_size,))
    (sharded,) = distributed([(4, 300)], mesh, [Shard(1)])
    (alone,) = (nn.Parameter(start) for start in weights([(4, 300)]))
    many, one = (NorMuon([param], lr=1e-2, **INT8) for param in (sharded, alone))
    for step in range(3):
        alone.grad = gradient((4, 300), step, 0)
        if step == 1:
            alone.grad[:, 150:] = 0.0
        sharded.grad = spread(alone.grad, mesh, [Shard(1)])
        if step == 1 and rank == 1:
            sharded.grad = None
        one.step()
        many.step()
    return differing(values([alone], one), values([sharded], many))


def test_a_missing_shard_of_the_gradient_is_zero(ranks):
    assert ranks.run(missing_case, 2) == [[]] * 2


# Checkpoints.

STATE_SHAPES = [(17, 300), (6, 140), (3, 200), (9, 9), (10,)]


def groups_of(params):
    named = [(f"layer{number}.weight", param) for number, param in enumerate(params)]
    return [{"params": named[:4]}, {"params": named[4:], "algorithm": "adamw"}]


def optimizer_of(params, **options):
    return NorMuon(groups_of(params), lr=1e-2, bucket_bytes=4096, **options)


def built(layout, **options):
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    params = []
    for start in weights(STATE_SHAPES):
        own = [Shard(0) if p == Shard(1) and start.ndim == 1 else p for p in placements]
        params.append(nn.Parameter(spread(start, mesh, own)))
    return params, optimizer_of(params, **options)


def uninterrupted(steps):
    params = [nn.Parameter(start) for start in weights(STATE_SHAPES)]
    optimizer = optimizer_of(params, **INT8)
    train(params, optimizer, range(steps))
    return values(params, optimizer)


def saving_case(rank, world_size, layout, folder):
    params, optimizer = built(layout, **INT8)
    train(params, optimizer, range(3))
    dcp.save(content(params, optimizer), checkpoint_id=folder)


def resuming_case(rank, world_size, layout, folder):
    params, optimizer = built(layout, **INT8)
    found = content(params, optimizer)
    dcp.load(found, checkpoint_id=folder)
    load_content(params, optimizer, found)
    at_rest = differing(uninterrupted(3), values(params, optimizer))
    train(params, optimizer, range(3, 6))
    return at_rest + differing(uninterrupted(6), values(params, optimizer))


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        ("4 rows", "3 rows"),
        ("4 rows", "4 columns"),
        ("8 columns", "2x2 rows and columns"),
        ("2x2 hsdp", "1"),
    ],
)
def test_a_checkpoint_resumes_on_another_layout(ranks, tmp_path, saved_on, resumed_on):
    """Codes, maxima and counts, so that the next rounding is the one it would have been."""
    folder = str(tmp_path / "checkpoint")
    ranks.run(saving_case, world_size_of(saved_on), layout=saved_on, folder=folder)
    num_ranks = world_size_of(resumed_on)
    found = ranks.run(resuming_case, num_ranks, layout=resumed_on, folder=folder)
    assert found == [[]] * num_ranks


def converting_case(rank, world_size, layout):
    """Numbers to codes and back, on ranks and on one process: where the two differ."""
    found = []
    everywhere = []
    for sharded in (False, True):
        if sharded:
            params, optimizer = built(layout)
        else:
            params = [nn.Parameter(start) for start in weights(STATE_SHAPES)]
            optimizer = optimizer_of(params)
        kept = []
        for options in ({}, INT8, {}):
            new = optimizer_of(params, **options)
            if kept:
                new.load_state_dict(convert_state(optimizer, to=new, quiet=True))
                kept.append(values(params, new))
            train(params, new, range(3))
            optimizer = new
            kept.append(values(params, new))
        everywhere.append(kept)
    for place, (one, many) in enumerate(zip(*everywhere, strict=True)):
        found += [f"stage {place}: {text}" for text in differing(one, many)]
    return found


@pytest.mark.parametrize("layout", ["2 rows", "4 columns", "2x2 rows and columns"])
def test_a_run_turns_to_codes_and_back(ranks, layout):
    num_ranks = world_size_of(layout)
    assert ranks.run(converting_case, num_ranks, layout=layout) == [[]] * num_ranks


def switching_case(rank, world_size):
    params, optimizer = built("2 rows")
    train(params, optimizer, range(1))
    before = [snapshot(param, optimizer) for param in params]
    optimizer.param_groups[0]["momentum_dtype"] = torch.int8
    try:
        train(params, optimizer, range(1, 2))
    except ValueError as error:
        pairs = zip(before, params, strict=True)
        return str(error), [changed(kept, param, optimizer) for kept, param in pairs]
    return "no error", []


def test_a_sharded_momentum_cannot_turn_to_codes_in_place(ranks):
    for message, moved in ranks.run(switching_case, 2):
        assert message.startswith(
            "layer0.weight [17, 300]: momentum_dtype has become torch.int8, which a sharded "
            "momentum cannot follow during a run; build a NorMuon with it"
        )
        assert moved == [set()] * len(STATE_SHAPES)
