"""Copies of a parameter that disagree: all ranks raise the same error, or all leave it alone."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from normuon import MatrixView, NorMuon, param_groups
from tests.distributed.parity import (
    changed,
    differing,
    distributed,
    gradient,
    local,
    snapshot,
    spread,
    values,
    weights,
    whole,
)

SHAPES = [(256, 256), (256, 256), (24,)]


def groups_of(params):
    named = [(f"w{number}", param) for number, param in enumerate(params)]
    return [{"params": named[:2]}, {"params": named[2:], "algorithm": "adamw"}]


def copies(layout, **options):
    """Parameters of which ranks hold copies, their optimizer, and how gradients are spread."""
    if layout == "process_group":
        params = [nn.Parameter(start) for start in weights(SHAPES)]
        options["process_group"] = dist.group.WORLD

        def place(tensor):
            return tensor.clone()
    else:
        mesh = init_device_mesh("cpu", (2, 2) if layout == "hsdp" else (dist.get_world_size(),))
        placements = [Replicate(), Shard(0)] if layout == "hsdp" else [Replicate()]
        params = distributed(SHAPES, mesh, placements)

        def place(tensor):
            return spread(tensor, mesh, placements)

    return params, NorMuon(groups_of(params), lr=1e-2, **options), place


def a_copy_without_case(rank, world_size, layout, lacking, what):
    params, optimizer, place = copies(layout)
    for step in range(6):
        for number, param in enumerate(params):
            param.grad = place(gradient(param.shape, step, number))
        if step == 5 and rank == lacking:
            params[what].grad = None
        before = [snapshot(param, optimizer) for param in params]
        try:
            optimizer.step()
        except ValueError as error:
            kept = [changed(b, p, optimizer) for b, p in zip(before, params, strict=True)]
            return step, str(error), kept == [set()] * len(params)
    return "no error"


@pytest.mark.parametrize("what", [0, 2], ids=["normuon", "adamw"])
@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize(("layout", "world_size"), [("process_group", 2), ("hsdp", 4)])
def test_a_copy_without_a_gradient_stops_all_ranks(ranks, layout, world_size, lacking, what):
    """A copy that lacks what others have would drift from them without a word. Where the owner of
    the matrix was the one, the others once took its "no gradient" for a scale, and moved ten times
    too far, uphill."""
    first, *others = ranks.run(
        a_copy_without_case, world_size, layout=layout, lacking=lacking, what=what
    )
    assert all(other == first for other in others)
    step, message, untouched = first
    assert step == 5
    assert untouched
    assert f"w{what}" in message
    assert "some replicas have a gradient" in message
    assert "equal gradients" in message


def one_copy_nonfinite_case(rank, world_size, layout, odd, value):
    params, optimizer, place = copies(layout, skip_nonfinite=True)
    alone = [nn.Parameter(start) for start in weights(SHAPES)]
    one = NorMuon(groups_of(alone), lr=1e-2, skip_nonfinite=True)
    for step in range(4):
        for number, (a, b) in enumerate(zip(alone, params, strict=True)):
            a.grad = gradient(a.shape, step, number)
            b.grad = place(a.grad)
            if step == 2 and number != 1:
                a.grad[0].fill_(value)
                if rank == odd and local(b.grad).numel():
                    local(b.grad)[0].fill_(value)
        one.step()
        optimizer.step()
    counts = [whole(optimizer.state[b]["skipped_steps"]).tolist() for b in params]
    return counts, differing(values(alone, one), values(params, optimizer))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize(
    ("layout", "world_size"), [("process_group", 2), ("replicate", 3), ("hsdp", 4)]
)
def test_a_nonfinite_copy_is_skipped_by_all(ranks, layout, world_size, odd, value):
    """Equal to one process that skips it: neither a copy's momentum nor its second moments take
    what another's may not."""
    answers = ranks.run(one_copy_nonfinite_case, world_size, layout=layout, odd=odd, value=value)
    assert answers == [([[1], [0], [1]], [])] * world_size


def own_experts(rank):
    return gradient((4, 8, 6), 500, rank), MatrixView.experts()


def trusted_case(rank, world_size, says_so):
    dense = nn.Parameter(gradient((12, 6), 999, 0))
    start, view = own_experts(rank)
    experts = nn.Parameter(start)
    group = {"params": [("experts", experts)], "view": view}
    if says_so:
        group["process_group"] = None
    optimizer = NorMuon(
        [{"params": [("dense", dense)]}, group], lr=1e-2, process_group=dist.group.WORLD
    )
    alone = [nn.Parameter(dense.detach().clone()), nn.Parameter(start.clone())]
    one = NorMuon([{"params": alone[:1]}, {"params": alone[1:], "view": view}], lr=1e-2)
    before = experts.detach().clone()
    for step in range(3):
        dense.grad = gradient((12, 6), step, 0)
        experts.grad = gradient((4, 8, 6), step, rank)
        for a, b in zip(alone, (dense, experts), strict=True):
            a.grad = b.grad.clone()
        try:
            optimizer.step()
        except ValueError as error:
            return str(error), torch.equal(before, experts)
        one.step()
    saved = optimizer.state_dict()["param_groups"]
    return differing(values(alone, one), values([dense, experts], optimizer)), [
        "process_group" in group for group in saved
    ]


def test_parameters_that_are_no_copies_are_found_before_the_first_step(ranks):
    """Every rank's own experts beside replicated weights once were taken for copies, one rank's
    result for all."""
    answers = ranks.run(trusted_case, 2, says_so=False)
    assert answers[0] == answers[1]
    message, untouched = answers[0]
    assert message.startswith("experts [4, 8, 6]: process_group means")
    assert "'process_group': None" in message
    assert untouched


def test_a_group_may_say_that_its_parameters_are_each_ranks_own(ranks):
    assert ranks.run(trusted_case, 2, says_so=True) == [([], [False, False])] * 2


def test_a_groups_process_group_is_checked():
    with pytest.raises(ValueError, match=r"process_group='world' must be"):
        NorMuon([{"params": [nn.Parameter(torch.ones(2, 2))], "process_group": "world"}])


def changed_options_case(rank, world_size, name, value):
    mesh = init_device_mesh("cpu", (world_size,))
    params = distributed(SHAPES, mesh, [Shard(0)])
    optimizer = NorMuon(groups_of(params), lr=1e-2)
    for step in range(3):
        for number, param in enumerate(params):
            param.grad = spread(gradient(param.shape, step, number), mesh, [Shard(0)])
        if step == 2 and rank == 1:
            optimizer.param_groups[0][name] = value
        before = [snapshot(param, optimizer) for param in params]
        try:
            optimizer.step()
        except ValueError as error:
            kept = [
                changed(b, p, optimizer) - {"skipped_steps"}
                for b, p in zip(before, params, strict=True)
                if set(b) == set(snapshot(p, optimizer))
            ]
            return step, str(error), all(not names for names in kept)
    return "no error"


@pytest.mark.parametrize(
    ("name", "value"), [("skip_nonfinite", True), ("lr", 2e-2), ("momentum", 0.9)]
)
def test_an_option_that_changes_on_one_rank_stops_all(ranks, name, value):
    """Turned on on one rank alone, `skip_nonfinite` once made it wait for an all-reduce that no
    other rank issued."""
    answers = ranks.run(changed_options_case, 2, name=name, value=value)
    assert answers[0] == answers[1]
    step, message, untouched = answers[0]
    assert step == 2
    assert untouched
    assert f"'{name}': {value}" in message


def equal_names_case(rank, world_size):
    """A generator and a discriminator whose parameters have the same names."""
    mesh = init_device_mesh("cpu", (world_size,))

    def two():
        made = []
        for seed in range(2):
            torch.manual_seed(seed)
            made.append(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6)))
        return made

    alone, shared = two(), two()
    for model in shared:
        for layer in model:
            for name, param in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(spread(param.detach(), mesh, [Shard(0)])))
    one, many = (
        NorMuon(param_groups(models[0]) + param_groups(models[1]), lr=1e-2)
        for models in (alone, shared)
    )
    ours = [p for model in alone for p in model.parameters()]
    theirs = [p for model in shared for p in model.parameters()]
    for step in range(3):
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = gradient(a.shape, step, number)
            b.grad = spread(a.grad, mesh, [Shard(0)])
        one.step()
        many.step()
    return differing(values(ours, one), values(theirs, many))


def test_parameters_of_two_models_may_have_equal_names(ranks):
    assert ranks.run(equal_names_case, 2) == [[], []]


def overlapping_case(rank, world_size):
    """Ranks that are in two sets of ranks, and list what these share in different orders."""
    every = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    pair = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("outer", "inner"))["inner"]
    (wide,) = distributed([(12, 8)], every, [Shard(0), Shard(1)])
    (narrow,) = distributed([(8, 12)], pair, [Shard(0)])
    listed = [("wide", wide), ("narrow", narrow)]
    optimizer = NorMuon(listed if rank % 2 else listed[::-1], lr=1e-2)
    alone = [nn.Parameter(start) for start in (*weights([(12, 8)]), *weights([(8, 12)]))]
    one = NorMuon(alone, lr=1e-2)
    for step in range(3):
        for number, (a, b) in enumerate(zip(alone, (wide, narrow), strict=True)):
            a.grad = gradient(a.shape, step, number)
            b.grad = spread(a.grad, b.device_mesh, b.placements)
        one.step()
        optimizer.step()
    return differing(values(alone, one), values([wide, narrow], optimizer))


def test_sets_of_ranks_are_taken_in_one_order(ranks):
    assert ranks.run(overlapping_case, 4) == [[]] * 4


def compiled_case(rank, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    pair = [distributed(SHAPES, mesh, [Shard(0)]) for _ in range(2)]
    eager, compiled = (NorMuon(groups_of(params), lr=1e-2) for params in pair)
    step_compiled = torch.compile(compiled.step, backend="eager")
    for step in range(3):
        for params in pair:
            for number, param in enumerate(params):
                param.grad = spread(gradient(param.shape, step, number), mesh, [Shard(0)])
        eager.step()
        step_compiled()
    return differing(values(pair[0], eager), values(pair[1], compiled))


def test_a_compiled_step_leaves_planning_and_exchanges_untraced(ranks):
    assert ranks.run(compiled_case, 2) == [[], []]


def stage_case(rank, world_size):
    """Two pipeline stages of two ranks each; the first has the embedding alone."""
    stages = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "data"))
    mesh = stages["data"]
    model: nn.Module = nn.Embedding(10, 6) if rank < 2 else nn.Linear(6, 10, bias=False)
    start = gradient((10, 6), 999, 0)
    alone, shared = nn.Parameter(start.clone()), nn.Parameter(spread(start, mesh, [Shard(0)]))
    model.weight = shared
    many = NorMuon(param_groups(model, hidden_required=False), lr=1e-2)
    algorithm = "adamw" if rank < 2 else "normuon"
    decay = many.param_groups[0]["weight_decay"]
    one = NorMuon([{"params": [alone], "algorithm": algorithm, "weight_decay": decay}], lr=1e-2)
    for step in range(3):
        alone.grad = gradient((10, 6), step, 0)
        shared.grad = spread(alone.grad, mesh, [Shard(0)])
        one.step()
        many.step()
    return differing(values([alone], one), values([shared], many))


def test_a_pipeline_stage_may_hold_no_hidden_matrix(ranks):
    assert ranks.run(stage_case, 4) == [[]] * 4
