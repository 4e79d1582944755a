"""What changes after an optimizer of sharded parameters was built, and who wraps it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from normuon import NorMuon, param_groups


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 3))


def train(model, optimizer, steps=3, dtype=torch.float32):
    for seed in range(steps):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        model(torch.randn(4, 6, dtype=dtype)).square().mean().backward()
        optimizer.step()


def full_values(model):
    return [
        (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for p in model.parameters()
    ]


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(full_values(one), full_values(two), strict=True))


def sharded(model, world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def optimizer_of(model, **options):
    return NorMuon(param_groups(model), lr=0.01, ns_dtype=torch.float32, **options)


def meta_case(rank, world_size):
    """Built and sharded on the meta device, the optimizer made before there are values."""
    alone = model_of()
    with torch.device("meta"):
        model = sharded(model_of(), world_size)
    optimizer = optimizer_of(model)
    model.to_empty(device="cpu")
    for param, value in zip(model.parameters(), alone.parameters(), strict=True):
        own = distribute_tensor(value.detach().clone(), param.device_mesh, param.placements)
        with torch.no_grad():
            param.to_local().copy_(own.to_local())
    train(model, optimizer)
    train(alone, optimizer_of(alone))
    return same(model, alone)


def test_a_model_sharded_on_the_meta_device_trains_once_it_has_values(ranks):
    assert ranks.run(meta_case, 2) == [True, True]


def dtype_case(rank, world_size):
    alone, model = model_of(), sharded(model_of(), world_size)
    pair = [(alone, optimizer_of(alone)), (model, optimizer_of(model))]
    for one, optimizer in pair:
        train(one, optimizer)
        one.bfloat16()
    for one, optimizer in pair:
        for number, param in enumerate(one.parameters()):
            torch.manual_seed(number)
            grad = torch.randn(param.shape).bfloat16()
            if isinstance(param, DTensor):
                grad = distribute_tensor(grad, param.device_mesh, param.placements)
            param.grad = grad
        optimizer.step()
    return same(model, alone), {p.dtype for p in model.parameters()}


def test_state_of_shards_follows_their_dtype(ranks):
    assert ranks.run(dtype_case, 2) == [(True, {torch.bfloat16})] * 2


def kahan_case(rank, world_size, skip_nonfinite):
    alone, model = model_of().bfloat16(), sharded(model_of().bfloat16(), world_size)
    options = {"kahan_sum": True, "skip_nonfinite": skip_nonfinite}
    pair = [(alone, optimizer_of(alone, **options)), (model, optimizer_of(model, **options))]
    for one, optimizer in pair:
        train(one, optimizer, dtype=torch.bfloat16)
    residuals = [[s["weight_residual"] for s in optimizer.state.values()] for _, optimizer in pair]
    equal = [torch.equal(a, b.full_tensor()) for a, b in zip(*residuals, strict=True)]
    return same(model, alone), all(equal)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_residuals_are_sharded_as_their_weights(ranks, skip_nonfinite):
    assert ranks.run(kahan_case, 2, skip_nonfinite=skip_nonfinite) == [(True, True)] * 2


def frozen_case(rank, world_size):
    model = sharded(model_of(), world_size)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    before = full_values(model)
    for param in model.parameters():
        param.requires_grad_(False)
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return all(torch.equal(a, b) for a, b in zip(before, full_values(model), strict=True))


def test_frozen_shards_do_not_move(ranks):
    assert ranks.run(frozen_case, 2) == [True, True]


def zero_case(rank, world_size):
    """Every rank steps its own parameters whole, and sends them to the others."""
    found = []
    for partitioned in (True, False):
        model = model_of()
        wrapped = DistributedDataParallel(model)
        matrices = [param for param in model.parameters() if param.ndim == 2]
        options = {"lr": 0.01, "ns_dtype": torch.float32}
        optimizer = (
            ZeroRedundancyOptimizer(matrices, optimizer_class=NorMuon, **options)
            if partitioned
            else NorMuon(matrices, **options)
        )
        train(wrapped, optimizer)
        found.append(model)
        if partitioned:
            optimizer.consolidate_state_dict(to=0)
            saved = optimizer.state_dict() if rank == 0 else None
            num_saved = len(saved["state"]) if saved else None
    dist.barrier()
    return same(*found), num_saved


def test_zero_redundancy_optimizer_steps_as_without_it(ranks):
    assert ranks.run(zero_case, 2) == [(True, 3), (True, None)]


def flattened_case(rank, world_size, layers):
    layer = {"up": nn.Linear(8, 8, bias=False), "down": nn.Linear(8, 8, bias=False)}
    model = nn.ModuleList(nn.ModuleDict(copy.deepcopy(layer)) for _ in range(layers))
    optimizer = NorMuon(param_groups(model, overrides={"*": "normuon"}))
    saved = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(flatten_optimizer_state_dict=True)
    )
    return sum(len(str(value)) for value in saved.values() if not torch.is_tensor(value))


def test_a_flattened_checkpoint_grows_as_its_parameters_do(ranks):
    small, large = (ranks.run(flattened_case, 1, layers=layers)[0] for layers in (10, 40))
    assert large == pytest.approx(4 * small, rel=0.01)


def replaced_states(optimizer):
    for param, state in list(optimizer.state.items()):
        optimizer.state[param] = {key: value.clone() for key, value in state.items()}


def replaced_groups(optimizer):
    optimizer.param_groups[:] = [
        {**group, "kahan_sum": True, "momentum": 0.5} for group in optimizer.param_groups
    ]


def fewer_params(optimizer):
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    optimizer.param_groups[0]["param_names"] = optimizer.param_groups[0]["param_names"][1:]


def only_first_rank_replaces(optimizer):
    """Its own state alone, which changes no plan: nothing is sent for it."""
    if dist.get_rank() == 0:
        replaced_states(optimizer)


CHANGES = {
    change.__name__: change
    for change in (replaced_states, replaced_groups, fewer_params, only_first_rank_replaces)
}


def replaced_case(rank, world_size, change, plain):
    """Steps of the same gradients on shards or replicas and alone, with a change in between."""
    dtype = torch.float32 if plain else torch.bfloat16
    alone, model = model_of().to(dtype), model_of().to(dtype)
    group = dist.group.WORLD if plain else None
    if not plain:
        sharded(model, world_size)
    pair = [
        (alone, optimizer_of(alone)),
        (model, optimizer_of(model, process_group=group, teams="off")),
    ]
    for one, optimizer in pair:
        for step in range(4):
            if step == 2:
                CHANGES[change](optimizer)
            for number, param in enumerate(one.parameters()):
                torch.manual_seed(100 * step + number)
                grad = torch.randn(param.shape).to(dtype)
                if isinstance(param, DTensor):
                    grad = distribute_tensor(grad, param.device_mesh, param.placements)
                param.grad = grad
            optimizer.record_statistics()
            optimizer.step()
    weights = [full_values(one) for one, _ in pair]
    close = {"rtol": 1e-6, "atol": 1e-6}  # torch's fused AdamW rounds a tensor's end otherwise.
    found = [
        name
        for (name, _), a, b in zip(alone.named_parameters(), *weights, strict=True)
        if not (torch.equal(a, b) if a.ndim == 2 else torch.allclose(a, b, **close))
    ]
    for a, b in zip(alone.parameters(), model.parameters(), strict=True):
        states = pair[0][1].state[a], pair[1][1].state[b]
        for key, value in states[0].items() if a.ndim == 2 else ():
            other = states[1][key]
            other = other.full_tensor() if isinstance(other, DTensor) else other
            found += [] if torch.equal(value, other) else [key]
    return found


@pytest.mark.parametrize("plain", [False, True], ids=["shards", "replicas"])
@pytest.mark.parametrize("change", list(CHANGES))
def test_what_was_replaced_between_steps_is_what_ranks_step(ranks, change, plain):
    assert ranks.run(replaced_case, 2, change=change, plain=plain) == [[], []]


def faulty_case(rank, world_size, everywhere):
    """An option out of range after the plan was made, on all ranks or on one."""
    model = sharded(model_of(), world_size)
    optimizer = optimizer_of(model)
    train(model, optimizer)
    if everywhere or rank == 1:
        optimizer.param_groups[0]["adjust_lr_fn"] = "Original"
    before = full_values(model)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    try:
        optimizer.step()
    except ValueError as error:
        moved = not all(map(torch.equal, before, full_values(model)))
        return str(error), moved
    return "no error", True


@pytest.mark.parametrize("everywhere", [True, False])
def test_an_option_set_out_of_range_is_refused_on_every_rank(ranks, everywhere):
    """Also by the ranks where it is right, which would wait for the others."""
    texts, moved = zip(*ranks.run(faulty_case, 2, everywhere=everywhere), strict=True)
    expected = "param_groups[0]: adjust_lr_fn='Original' is not known" if everywhere else "rank 0 a"
    assert all(text.startswith(expected) for text in texts), texts
    assert texts[0] == texts[1]
    assert moved == (False, False)
