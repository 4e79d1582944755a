"""Ranks that disagree, and placements that cannot be stepped: one clear error, never a hang."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from normuon import MatrixView, NorMuon
from tests.distributed.parity import differing, distributed, gradient, spread, values, whole

SHAPES = [(17, 5), (6, 30), (8, 8)]


def set_gradients(params):
    for number, param in enumerate(params):
        grad = gradient(param.shape, 0, number)
        if isinstance(param, DTensor):
            grad = spread(grad, param.device_mesh, param.placements)
        param.grad = grad


def named(params, name="layer{}"):
    return [(name.format(number), param) for number, param in enumerate(params)]


DIFFERENCES = {
    # What differs, and what the message must name.
    "beta2": "'beta2': 0.9",
    "ns_steps": "'ns_steps': 4",
    "lr": "'lr': 0.02",
    "weight_decay": "'weight_decay': 0.3",
    "betas": "'betas': (0.8, 0.95)",
    "adamw_eps": "'adamw_eps': 1e-06",
    "bucket_bytes": "bucket_bytes",
    "balance": "balance",
    "shape": "layer2",
    "number": "layer3",
    "name": "other2",
    "algorithm": "layer2",
    "adamw_number": "bias1",
    "adamw_shape": "bias0",
}


def different_case(rank, world_size, what, plain):
    mesh = init_device_mesh("cpu", (world_size,))
    odd = rank == world_size - 1
    shapes = list(SHAPES)
    if odd and what == "shape":
        shapes[2] = (8, 9)
    if odd and what == "number":
        shapes.append((4, 4))
    options = {"lr": 1e-2}
    other = {
        "beta2": 0.9,
        "ns_steps": 4,
        "lr": 2e-2,
        "weight_decay": 0.3,
        "betas": (0.8, 0.95),
        "adamw_eps": 1e-6,
        "bucket_bytes": 12345,
        "balance": "paper",
    }
    if odd and what in other:
        options[what] = other[what]
    biases = [(9,), (7,)] if odd and what == "adamw_number" else [(9,)]
    if odd and what == "adamw_shape":
        biases = [(11,)]
    if plain:
        params = [nn.Parameter(gradient(shape, 0, 0)) for shape in shapes]
        vectors = [nn.Parameter(gradient(shape, 0, 0)) for shape in biases]
        options["process_group"] = dist.group.WORLD
    else:
        params = distributed(shapes, mesh, [Shard(0)])
        vectors = distributed(biases, mesh, [Shard(0)])
    pairs = named(params)
    if odd and what == "name":
        pairs[2] = ("other2", params[2])
    matrices, others = pairs, named(vectors, "bias{}")
    if odd and what == "algorithm":
        matrices, others = pairs[:2], [pairs[2], *others]
    groups = [{"params": others, "algorithm": "adamw"}, {"params": matrices}]
    optimizer = NorMuon(groups, **options)
    set_gradients([*params, *vectors])
    before = [whole(p).clone() if plain else p.to_local().clone() for p in (*params, *vectors)]
    try:
        optimizer.step()
    except ValueError as error:
        after = [whole(p) if plain else p.detach().to_local() for p in (*params, *vectors)]
        return str(error), all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return "no error", True


@pytest.mark.parametrize("plain", [False, True], ids=["dtensors", "ddp"])
@pytest.mark.parametrize("what", list(DIFFERENCES))
def test_ranks_that_built_different_optimizers_all_say_so(ranks, what, plain):
    """Before anything is stepped, AdamW's half included: its collectives would otherwise have
    different sizes on the ranks, which Gloo and NCCL answer by a crash, a hang or garbage."""
    first, second, third = ranks.run(different_case, 3, what=what, plain=plain)
    assert first == second == third
    message, untouched = first
    assert "rank 0 and rank 2 built different optimizers" in message
    assert DIFFERENCES[what] in message
    assert untouched


def partial_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    param = nn.Parameter(DTensor.from_local(torch.ones(4, 6), mesh, [Partial()]))
    optimizer = NorMuon([("layer.weight", param)], lr=1e-2)
    param.grad = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()])
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


def test_a_partial_parameter_is_refused(ranks):
    for message in ranks.run(partial_case, 2):
        assert message.startswith("layer.weight [4, 6]")
        assert "placement P(sum)" in message  # torch's own spelling of Partial
        assert "redistribute the parameter" in message


def gradient_placement_case(rank, world_size, algorithm, placement):
    mesh = init_device_mesh("cpu", (world_size,))
    start = Shard(0) if placement == "columns" else Replicate()
    alone = nn.Parameter(gradient((8, 8), 999, 0))
    (param,) = distributed([(8, 8)], mesh, [start])
    one, many = (
        NorMuon([{"params": [("layer.weight", p)], "algorithm": algorithm}], lr=1e-2)
        for p in (alone, param)
    )
    for step in range(3):
        grad = gradient((8, 8), step, 0)
        alone.grad = grad
        if placement == "partial":  # Of two ranks with halves of it.
            param.grad = DTensor.from_local(grad / 2, mesh, [Partial()])
        else:
            param.grad = spread(grad, mesh, [Shard(1)])
        given = param.grad.to_local().clone()
        one.step()
        many.step()
        assert torch.equal(param.grad.to_local(), given), "a gradient was written to"
    return differing(values([alone], one), values([param], many))


@pytest.mark.parametrize("placement", ["partial", "columns"])
@pytest.mark.parametrize("algorithm", ["normuon", "muon", "adamw"])
def test_a_gradient_placed_otherwise_is_redistributed(ranks, algorithm, placement):
    """Sequence parallelism leaves norms `Partial` gradients. torch's AdamW steps with them, by
    redistributing inside of its operations; a step with the local part would take the ranks apart.
    """
    found = ranks.run(gradient_placement_case, 2, algorithm=algorithm, placement=placement)
    assert found == [[], []]


def split_short_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    (param,) = distributed([(12, 8)], mesh, [Shard(0)])
    group = {"params": [("qkv", param)], "view": MatrixView(blocks=(4, 4, 4))}
    optimizer = NorMuon([group], lr=1e-2, neuron_axis="short")
    set_gradients([param])
    try:
        optimizer.step()
    except ValueError as error:
        return str(error)
    return "no error"


def test_short_axis_with_a_splitting_view_is_refused(ranks):
    for message in ranks.run(split_short_case, 2):
        assert message.startswith("qkv [12, 8]")
        assert "neuron_axis='row'" in message


def outside_mesh_case(rank, world_size):
    """A mesh of two of three ranks; the third holds no part of the parameter."""
    mesh = DeviceMesh("cpu", [0, 1])
    param = nn.Parameter(DTensor.from_local(torch.ones(2, 6), mesh, [Shard(0)], run_check=False))
    if rank == 2:
        try:
            optimizer = NorMuon([("layer.weight", param)], lr=1e-2)
            optimizer.step()
        except ValueError as error:
            return str(error)
        return "no error"
    optimizer = NorMuon([("layer.weight", param)], lr=1e-2)
    set_gradients([param])
    optimizer.step()
    return "stepped"


def test_a_rank_outside_the_mesh_is_told_so(ranks):
    *inside, outside = ranks.run(outside_mesh_case, 3)
    assert inside == ["stepped", "stepped"]
    assert "is not part of the parameter's mesh" in outside


def part_of_the_world_case(rank, world_size):
    """Two meshes side by side, each over half of the ranks, each with its own parameters."""
    names = ("pipeline", "data", "tensor")
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=names)["data", "tensor"]
    params = distributed(SHAPES, mesh, [Shard(0), Shard(1)])
    alone = [nn.Parameter(whole(param).clone()) for param in params]
    one, many = NorMuon(alone, lr=1e-2), NorMuon(params, lr=1e-2)
    set_gradients(alone)
    set_gradients(params)
    one.step()
    many.step()
    return all(
        torch.equal(a[key], b[key])
        for a, b in zip(values(alone, one), values(params, many), strict=True)
        for key in a
    )


@pytest.mark.parametrize("time", ["first", "second"])
def test_meshes_over_parts_of_the_world_in_one_process_group_after_another(ranks, time):
    """The group over a mesh's ranks is made once and kept, but not beyond the process group that
    it belongs to: after `destroy_process_group` and `init_process_group` the same ranks need a new
    one, as in an elastic restart inside a process."""
    assert ranks.run(part_of_the_world_case, 8) == [True] * 8
