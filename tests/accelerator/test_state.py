"""Checkpoints and conversions of state on an accelerator: nothing is read or leaves it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import normuon
from tests.accelerator import cases
from tests.accelerator.device import NAME, FakeDevices
from tests.accelerator.watch import Watch

OPTIONS = {"skip_nonfinite": True, "kahan_sum": True, "dtype": torch.bfloat16}


def state_tensors(optimizer) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(dict(optimizer.state)) if isinstance(leaf, Tensor)]


def save_and_load(*, mesh_sizes, by_way_of_host):
    """Saves one optimizer's state and loads it into itself, then steps on."""
    with cases.built(mesh_sizes=mesh_sizes, all_kinds=True, **OPTIONS) as optimizer:
        cases.set_gradients(optimizer)
        optimizer.step()
        with Watch():
            saved = optimizer.state_dict()
        for state in saved["state"].values():
            if by_way_of_host:
                state.update({key: torch.empty(t.shape, dtype=t.dtype) for key, t in state.items()})
            if "exp_avg" in state and not mesh_sizes:
                state["step"] = 3  # As older releases of torch kept it.
        with Watch(may_copy_from_host=by_way_of_host) as watch:
            optimizer.load_state_dict(saved)
        assert bool(watch.host_copies) == by_way_of_host
        loaded = state_tensors(optimizer)
        assert len(loaded) >= 3 * len(cases.all_params(optimizer))
        assert {tensor.device.type for tensor in loaded} == {NAME}
        cases.watch_steps(optimizer, is_sharded=bool(mesh_sizes))


@pytest.mark.parametrize("by_way_of_host", [False, True])
def test_a_checkpoint_comes_back_to_the_device(on_accelerator, by_way_of_host):
    on_accelerator(save_and_load, mesh_sizes=(), by_way_of_host=by_way_of_host)


def test_a_sharded_checkpoint_stays_on_the_device(on_accelerator):
    on_accelerator(save_and_load, mesh_sizes=(4,), by_way_of_host=False)


def step_with_offloaded_state():
    """Steps with state that has been put on the host in the meantime."""
    with cases.built(**OPTIONS) as optimizer:
        for state in optimizer.state.values():
            state.update({key: tensor.cpu() for key, tensor in state.items()})
        cases.set_gradients(optimizer)
        optimizer.step()
        assert {tensor.device.type for tensor in state_tensors(optimizer)} == {NAME}
        cases.watch_steps(optimizer)


def test_state_follows_its_parameters_to_the_device(on_accelerator):
    on_accelerator(step_with_offloaded_state)


def convert(kind, *, lr):
    """Converts the state of another optimizer, and steps on with it."""
    with FakeDevices():
        matrices = [torch.nn.Parameter(torch.empty(shape, device=NAME)) for shape in cases.MATRICES]
        vectors = [torch.nn.Parameter(torch.empty(shape, device=NAME)) for shape in cases.VECTORS]
        sources = old_optimizers(kind, matrices, vectors, lr=cases.number(1e-3, lr))
        groups = [{"params": matrices}, {"params": vectors, "algorithm": "adamw"}]
        optimizer = normuon.NorMuon(groups, lr=1e-3)
        with Watch():
            state = normuon.convert_state(*sources, to=optimizer, quiet=True)
            optimizer.load_state_dict(state)
        assert {tensor.device.type for tensor in state_tensors(optimizer)} == {NAME}
        cases.watch_steps(optimizer)


def old_optimizers(kind, matrices, vectors, *, lr):
    """Optimizers with the state that some steps have left, on the device."""
    if kind == "AdamW":
        sources = [torch.optim.AdamW([*matrices, *vectors], capturable=True)]
    else:
        sources = [torch.optim.AdamW(vectors, capturable=True), torch.optim.Muon(matrices)]
    for source in sources:
        source.param_groups[0]["lr"] = lr  # Its constructor would read a tensor.
        for param in source.param_groups[0]["params"]:
            moments = ("exp_avg", "exp_avg_sq") if "betas" in source.defaults else ()
            for key in moments or ("momentum_buffer",):
                source.state[param][key] = torch.zeros_like(param)
            if moments:
                source.state[param]["step"] = torch.zeros((), device=NAME)
    return sources


@pytest.mark.parametrize("lr", [None, "device"])
@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_another_optimizers_state_is_converted_on_the_device(on_accelerator, kind, lr):
    """A learning rate that is a tensor is read for the advice that is printed, and only then."""
    on_accelerator(convert, kind, lr=lr)
