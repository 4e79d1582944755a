"""Checkpoints that change world size and layout: training goes on with the same numbers.

Every run here is checked against one process that is never interrupted, whose steps the ranks
equal bit by bit, so a checkpoint may be written on one layout and read on any other.
"""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from normuon import NorMuon, param_groups
from tests.distributed.parity import (
    differing,
    distributed,
    gradient,
    local,
    spread,
    values,
    weights,
    whole,
)

# The third has fewer columns, and the fourth fewer rows, than ranks: some shards are empty.
SHAPES = [(17, 6), (6, 30), (9, 3), (3, 9), (8, 8), (13, 4), (10,)]
SAVED_AFTER, STEPS = 3, 6

LAYOUTS = {
    "1": ((1,), [Shard(0)]),
    "2 rows": ((2,), [Shard(0)]),
    "3 rows": ((3,), [Shard(0)]),
    "4 rows": ((4,), [Shard(0)]),
    "4 columns": ((4,), [Shard(1)]),
    "2x2 hsdp": ((2, 2), [Replicate(), Shard(0)]),
    "2x2 rows and columns": ((2, 2), [Shard(0), Shard(1)]),
    "8 columns": ((8,), [Shard(1)]),
}


def world_size_of(layout):
    mesh_shape, _ = LAYOUTS[layout]
    return mesh_shape[0] * (mesh_shape[1] if len(mesh_shape) == 2 else 1)


def groups_of(params):
    named = [(f"layer{number}.weight", param) for number, param in enumerate(params)]
    return [
        {"params": named[:4]},
        {"params": named[4:5], "algorithm": "muon"},
        {"params": named[5:], "algorithm": "adamw", "weight_decay": 0.02},
    ]


def optimizer_of(params, **options):
    return NorMuon(groups_of(params), lr=1e-2, bucket_bytes=2048, skip_nonfinite=True, **options)


def built(layout):
    """Parameters at their start and a new optimizer, on a layout."""
    mesh_shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    placements = list(placements)
    params = []
    for start in weights(SHAPES):
        # A vector has no columns: it lies as FSDP2 would lay it, by rows.
        own = [Shard(0) if p == Shard(1) and start.ndim == 1 else p for p in placements]
        params.append(nn.Parameter(spread(start, mesh, own)))
    return params, optimizer_of(params)


def train(params, optimizer, steps):
    for step in steps:
        for number, param in enumerate(params):
            grad = gradient(param.shape, step, number)
            if isinstance(param, DTensor):
                grad = spread(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()


def uninterrupted(steps):
    params = [nn.Parameter(start) for start in weights(SHAPES)]
    optimizer = optimizer_of(params)
    train(params, optimizer, range(steps))
    return params, optimizer


def content(params, optimizer):
    """What a checkpoint holds: nothing in it depends on which gradients have arrived."""
    state_dict = optimizer.state_dict()
    return {
        "weights": {f"layer{number}": param.detach() for number, param in enumerate(params)},
        "state": {str(key): value for key, value in state_dict["state"].items()},
        "param_groups": {
            f"{number}.{key}": value
            for number, group in enumerate(state_dict["param_groups"])
            for key, value in group.items()
        },
    }


def load_content(params, optimizer, found):
    with torch.no_grad():
        for number, param in enumerate(params):
            param.copy_(found["weights"][f"layer{number}"])
    state_dict = optimizer.state_dict()
    state_dict["state"] = {int(key): value for key, value in found["state"].items()}
    optimizer.load_state_dict(state_dict)


def saving_case(rank, world_size, layout, folder):
    params, optimizer = built(layout)
    train(params, optimizer, range(SAVED_AFTER))
    dcp.save(content(params, optimizer), checkpoint_id=folder)


def resuming_case(rank, world_size, layout, folder):
    params, optimizer = built(layout)
    found = content(params, optimizer)
    dcp.load(found, checkpoint_id=folder)
    load_content(params, optimizer, found)
    at_rest = differing(values(*uninterrupted(SAVED_AFTER)), values(params, optimizer))
    train(params, optimizer, range(SAVED_AFTER, STEPS))
    return at_rest + differing(values(*uninterrupted(STEPS)), values(params, optimizer))


@pytest.mark.parametrize(
    ("saved_on", "resumed_on"),
    [
        ("4 rows", "2 rows"),
        ("2 rows", "3 rows"),
        ("4 rows", "1"),
        ("1", "4 rows"),
        ("4 rows", "4 columns"),
        ("2x2 hsdp", "2 rows"),
        ("2x2 rows and columns", "3 rows"),
        ("8 columns", "2x2 rows and columns"),
    ],
)
def test_a_checkpoint_resumes_on_another_layout(ranks, tmp_path, saved_on, resumed_on):
    """Weights, momentum, second moments, AdamW's moments and counts, empty shards included."""
    folder = str(tmp_path / "checkpoint")
    ranks.run(saving_case, world_size_of(saved_on), layout=saved_on, folder=folder)
    num_ranks = world_size_of(resumed_on)
    found = ranks.run(resuming_case, num_ranks, layout=resumed_on, folder=folder)
    assert found == [[]] * num_ranks


def second_moments_case(rank, world_size, mesh_shape, placements, shape):
    mesh = init_device_mesh("cpu", mesh_shape)
    (param,) = distributed([shape], mesh, placements)
    optimizer = NorMuon([param], lr=1e-2)
    train([param], optimizer, range(3))
    return param.to_local().numel(), local(optimizer.state[param]["second_momentum_buffer"])


@pytest.mark.parametrize(
    ("mesh_shape", "placements", "shape"),
    [
        ((8,), [Shard(1)], (3, 9)),
        ((2, 4), [Shard(1), Shard(1)], (3, 4)),
        ((2, 4), [Shard(1), Shard(1)], (3, 5)),
        ((2, 3), [Replicate(), Shard(1)], (4, 2)),
        ((2, 3), [Shard(1), Replicate()], (4, 1)),
    ],
    ids=["more ranks", "nested", "nested uneven", "replicas", "copies"],
)
def test_ranks_without_columns_keep_the_same_second_moments(ranks, mesh_shape, placements, shape):
    """v is replicated where columns are split, so every rank holds a copy, even those without a
    column. A checkpoint may take any copy, so all must be equal.

    Two axes that split one dim in turn leave ranks empty that neither axis alone would: 4 columns
    over 2 are 2, and 2 over 4 leave two ranks empty, while 4 over 4 leave none.
    """
    num_ranks = mesh_shape[0] * mesh_shape[1] if len(mesh_shape) == 2 else mesh_shape[0]
    answers = ranks.run(
        second_moments_case, num_ranks, mesh_shape=mesh_shape, placements=placements, shape=shape
    )
    assert 0 in [numel for numel, _ in answers]
    _, first = answers[0]
    assert first.count_nonzero() == shape[0]
    assert all(torch.equal(v, first) for _, v in answers)


# A real module, through torch's own helpers, whose keys are parameter names.


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.up = nn.Linear(10, 22)
        self.down = nn.Linear(22, 10, bias=False)
        self.lm_head = nn.Linear(10, 11, bias=False)

    def forward(self, tokens):
        hidden = self.embed(tokens)
        return self.lm_head(hidden + self.down(self.up(hidden).relu()))


def tiny_under_fsdp(shape):
    torch.manual_seed(3)
    model = Tiny()
    names = ("replicate", "shard")[-len(shape) :]
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    fully_shard(model, mesh=mesh)
    return model, NorMuon(param_groups(model), lr=1e-2)


def train_tiny(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        tokens = torch.randint(11, (4, 7))  # The same on every rank: means are then exact.
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def module_values(model, optimizer):
    return values(list(model.parameters()), optimizer)


def saving_module_case(rank, world_size, shape, folder, full):
    model, optimizer = tiny_under_fsdp(shape)
    keys_before = sorted(get_optimizer_state_dict(model, optimizer)["state"])
    train_tiny(model, optimizer, range(SAVED_AFTER))
    options = StateDictOptions(full_state_dict=full, cpu_offload=full)
    found = {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }
    if full:
        if rank == 0:
            torch.save(found, f"{folder}.pt")
    else:
        assert sorted(found["optimizer"]["state"]) == keys_before
        dcp.save(found, checkpoint_id=folder)
    train_tiny(model, optimizer, range(SAVED_AFTER, STEPS))
    return module_values(model, optimizer)


def resuming_module_case(rank, world_size, shape, folder, full):
    model, optimizer = tiny_under_fsdp(shape)
    if full:
        options = StateDictOptions(full_state_dict=True)
        found = torch.load(f"{folder}.pt", weights_only=True)
    else:
        options = StateDictOptions()
        found = {
            "model": get_model_state_dict(model),
            "optimizer": get_optimizer_state_dict(model, optimizer),
        }
        dcp.load(found, checkpoint_id=folder)
    set_model_state_dict(model, found["model"], options=options)
    set_optimizer_state_dict(model, optimizer, found["optimizer"], options=options)
    train_tiny(model, optimizer, range(SAVED_AFTER, STEPS))
    return module_values(model, optimizer)


@pytest.mark.parametrize(
    ("saved_on", "resumed_on", "full"),
    [((4,), (2,), False), ((2, 2), (3,), False), ((2,), (4,), True)],
    ids=["4 to 2", "hsdp to 3", "full to 4"],
)
def test_a_module_resumes_through_torchs_state_dict_helpers(
    ranks, tmp_path, saved_on, resumed_on, full
):
    """The ranks' gradients are equal here, and a mean of equal numbers over 2 or 4 ranks is exact
    while one over 3 rounds (a sum of three times x divided by 3): 1e-5 covers three such steps,
    whose relative error of 6e-8 Newton-Schulz may multiply by a hundred."""
    folder = str(tmp_path / "checkpoint")
    sizes = [torch.Size(shape).numel() for shape in (saved_on, resumed_on)]
    expected = ranks.run(saving_module_case, sizes[0], shape=saved_on, folder=folder, full=full)[0]
    for found in ranks.run(
        resuming_module_case, sizes[1], shape=resumed_on, folder=folder, full=full
    ):
        for a, b in zip(expected, found, strict=True):
            assert set(a) == set(b)
            for key in a:
                torch.testing.assert_close(b[key], a[key], rtol=1e-5, atol=1e-5, msg=key)


def full_into_shards_case(rank, world_size):
    """A single process's whole tensors, loaded by every rank into its shards."""
    alone, one = uninterrupted(SAVED_AFTER)
    params, optimizer = built("3 rows")
    state_dict = copy.deepcopy(one.state_dict())
    with torch.no_grad():
        for param, start in zip(params, alone, strict=True):
            param.copy_(spread(start.detach(), param.device_mesh, param.placements))
    optimizer.load_state_dict(state_dict)
    train(params, optimizer, range(SAVED_AFTER, STEPS))
    return differing(values(*uninterrupted(STEPS)), values(params, optimizer))


def test_a_whole_state_dict_loads_into_shards(ranks):
    assert ranks.run(full_into_shards_case, 3) == [[]] * 3


def shards_in_memory_case(rank, world_size):
    """`state_dict` and `load_state_dict` alone, on one layout: no copies are sent."""
    params, optimizer = built("3 rows")
    train(params, optimizer, range(SAVED_AFTER))
    kept = copy.deepcopy([param.detach() for param in params])
    state_dict = copy.deepcopy(optimizer.state_dict())
    train(params, optimizer, range(10, 13))
    with torch.no_grad():
        for param, value in zip(params, kept, strict=True):
            param.copy_(value)
    optimizer.load_state_dict(state_dict)
    train(params, optimizer, range(SAVED_AFTER, STEPS))
    return differing(values(*uninterrupted(STEPS)), values(params, optimizer))


def test_a_state_dict_in_memory_takes_training_back(ranks):
    assert ranks.run(shards_in_memory_case, 3) == [[]] * 3


def keys_case(rank, world_size):
    """Keys and shapes of a new optimizer's state and of one that has stepped some matrices."""
    params, optimizer = built("3 rows")
    before = {
        number: {key: tuple(value.shape) for key, value in state.items()}
        for number, state in optimizer.state_dict()["state"].items()
    }
    train(params[1:], optimizer, range(2))
    after = {
        number: {key: tuple(value.shape) for key, value in state.items()}
        for number, state in optimizer.state_dict()["state"].items()
    }
    return before == after, sorted(before)


def test_a_checkpoints_keys_do_not_depend_on_gradients(ranks):
    assert ranks.run(keys_case, 3) == [(True, list(range(len(SHAPES))))] * 3


def ddp_case(rank, world_size):
    """Under DDP every rank's plain state_dict is whole, though each matrix had one owner."""
    params = [nn.Parameter(start) for start in weights(SHAPES)]
    optimizer = optimizer_of(params, process_group=dist.group.WORLD)
    train(params, optimizer, range(SAVED_AFTER))
    state_dict = copy.deepcopy(optimizer.state_dict())
    plain = not any(
        isinstance(value, DTensor)
        for state in state_dict["state"].values()
        for value in state.values()
    )
    # Only one rank's is kept; a process without any group goes on from it.
    resumed = [nn.Parameter(whole(param).clone()) for param in params]
    alone = optimizer_of(resumed)
    alone.load_state_dict(state_dict)
    train(resumed, alone, range(SAVED_AFTER, STEPS))
    return plain, differing(values(*uninterrupted(STEPS)), values(resumed, alone))


def test_any_ranks_state_dict_is_whole_under_ddp(ranks):
    assert ranks.run(ddp_case, 3) == [(True, [])] * 3


def uneven_case(rank, world_size, mesh_shape, num_rows):
    """FSDP2 over tensor parallelism on one dim that neither divides: who stores which rows is read
    off the weights, which count them."""
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("data", "tensor"))
    numbered = torch.arange(num_rows, dtype=torch.float32)[:, None] * torch.ones(1, 16)
    model = nn.Sequential(nn.Linear(16, num_rows, bias=False))
    model[0].weight = nn.Parameter(numbered.clone())
    parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel()}, src_data_rank=None)
    fully_shard(model, mesh=mesh["data"])
    weight = model[0].weight
    rows = weight.to_local()[:, 0].detach().long()
    found = []
    for algorithm in ("normuon", "adamw"):
        alone = nn.Parameter(numbered.clone())
        groups = [{"params": [("w", alone)], "algorithm": algorithm}]
        one = NorMuon(groups, lr=0.0)
        for step in range(3):
            alone.grad = gradient(alone.shape, step, 0)
            one.step()
        many = NorMuon([{"params": [("w", weight)], "algorithm": algorithm}], lr=0.0)
        many.load_state_dict(one.state_dict())
        for key, value in one.state[alone].items():
            if key != "step":
                same = torch.equal(many.state[weight][key].to_local(), value[rows])
                found += [] if same else [f"{algorithm} {key}"]
        for step in range(3, 5):
            alone.grad = gradient(alone.shape, step, 0)
            local_grad = alone.grad[rows]
            weight.grad = DTensor.from_local(
                local_grad,
                weight.device_mesh,
                weight.placements,
                run_check=False,
                shape=weight.shape,
                stride=weight.stride(),
            )
            one.step()
            many.step()
        for key, value in one.state[alone].items():
            if key != "step":
                local_value = many.state[weight][key].to_local()
                if not torch.allclose(local_value, value[rows], rtol=1e-6, atol=1e-7):
                    found.append(f"{algorithm} {key} after stepping")
    return found


@pytest.mark.parametrize(("mesh_shape", "num_rows"), [((4, 2), 17), ((3, 2), 13)], ids=str)
def test_a_whole_state_dict_into_uneven_fsdp2_over_tp(ranks, mesh_shape, num_rows):
    """torch cuts a whole tensor for `_StridedShard` in another order than `fully_shard` does, and
    `copy_` once broadcast what it got into shards of other shapes."""
    world_size = mesh_shape[0] * mesh_shape[1]
    found = ranks.run(uneven_case, world_size, mesh_shape=mesh_shape, num_rows=num_rows)
    assert found == [[]] * world_size


def pickled_case(rank, world_size, how):
    group = dist.group.WORLD
    param = nn.Parameter(gradient((8, 6), 999, 0))
    optimizer = NorMuon([param], lr=1e-2, process_group=group, balance="paper", bucket_bytes=4096)
    param.grad = gradient((8, 6), 0, 0)
    optimizer.step()
    copied = (
        copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    )
    (copy_of_param,) = copied.param_groups[0]["params"]
    copy_of_param.grad = gradient((8, 6), 1, 0)
    message = ""
    if how == "pickle":
        try:
            copied.step()
        except RuntimeError as error:
            message = str(error)
        copied.process_group = group
    copied.step()
    param.grad = gradient((8, 6), 1, 0)
    optimizer.step()
    plans = [o._planned_steps()[0].plan for o in (optimizer, copied)]
    return message, torch.equal(param, copy_of_param), plans[0].digest() == plans[1].digest()


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_and_pickles_keep_what_can_be_kept(ranks, how):
    """A process group cannot be pickled: the first step says that it is missing."""
    for message, same, same_plan in ranks.run(pickled_case, 2, how=how):
        assert ("set optimizer.process_group" in message) == (how == "pickle")
        assert same
        assert same_plan


def staged_case(rank, world_size):
    """A flattened checkpoint of two pipeline stages, each an optimizer of its own, into one."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    model = nn.ModuleDict({"0": nn.Linear(6, 8, bias=False), "1": nn.Linear(8, 6, bias=False)})
    saved, matrices = {}, {"*": "normuon"}
    for name in model:
        stage = nn.ModuleDict({name: model[name]})
        optimizer = NorMuon(param_groups(stage, overrides=matrices), lr=1e-2)
        for number, param in enumerate(stage.parameters()):
            param.grad = gradient(param.shape, int(name), number)
        optimizer.step()
        saved |= get_optimizer_state_dict(stage, optimizer, options=options)
    whole_optimizer = NorMuon(param_groups(model, overrides=matrices), lr=1e-2)
    set_optimizer_state_dict(model, whole_optimizer, saved, options=options)
    names = whole_optimizer.param_groups[0]["param_names"]
    for number, param in enumerate(model.parameters()):
        param.grad = gradient(param.shape, 5, number)
    whole_optimizer.step()
    sizes = [len(str(value)) for key, value in saved.items() if key.endswith(".reasons")]
    return names, sizes


def test_a_flattened_checkpoint_of_two_stages_keeps_the_live_names(ranks):
    """Every parameter's entry lists its own stage's names; once they took the place of the live
    ones, which are more."""
    assert ranks.run(staged_case, 1) == [(["0.weight", "1.weight"], [0, 0])]
