"""The watch finds each kind of fault, planted into a step, and names the operation and the line."""

from __future__ import annotations

import re
from importlib import import_module

import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tests.accelerator import cases
from tests.accelerator.device import NAME, FakeDevices
from tests.accelerator.watch import Fault, Watch

KEPT = []


def item(batch):
    batch.momenta()[0].sum().item()


def truth(batch):
    if batch.momenta()[0].sum() > 0:
        batch.momenta()


def to_list(batch):
    batch.momenta()[0].sum(0).tolist()


def equal(batch):
    torch.equal(*batch.momenta()[:2])


def nonzero(batch):
    batch.momenta()[0].nonzero()


def boolean_index(batch):
    momentum = batch.momenta()[0]
    momentum[momentum > 0]


def to_host(batch):
    batch.momenta()[0].to("cpu")


def copied_to_host(batch):
    momentum = batch.momenta()[0]
    torch.empty(momentum.shape).copy_(momentum)


def host_scalar(batch):
    batch.momenta()[0].mul_(torch.tensor(2.0))


def host_scalar_chosen(batch):
    momentum = batch.momenta()[0]
    torch.where(momentum > 0, momentum, torch.tensor(0.0))


def made_from_numbers(batch):
    torch.tensor([0.5, 0.25], device=batch.first.param.device)


def copied_from_host(batch):
    momentum = batch.momenta()[0]
    momentum.copy_(torch.zeros(momentum.shape))


def kept(batch):
    KEPT.append(batch.momenta()[0] + 1)


def kept_on_host(batch):
    KEPT.append(torch.zeros(1, device="cpu"))


PLANTED = {
    item: "aten._local_scalar_dense.default reads a value on the host",
    truth: "aten.is_nonzero.default|aten._local_scalar_dense.default reads a value",
    to_list: "aten._to_copy.default copies to the host|aten._local_scalar_dense.default reads",
    equal: "aten.equal.default reads a value on the host",
    nonzero: "aten.nonzero.default reads a value on the host",
    boolean_index: "aten.index.Tensor counts booleans",
    to_host: "aten._to_copy.default copies to the host and waits",
    copied_to_host: "aten.copy_.default copies to the host and waits",
    host_scalar: r"aten.mul_.Tensor takes a tensor of the host, \[\], among",
    host_scalar_chosen: r"aten.where.self takes a tensor of the host, \[\], among",
    made_from_numbers: "aten._to_copy.default copies a tensor of the host to the device",
    copied_from_host: "aten.copy_.default copies a tensor of the host to the device",
    kept: r"new tensor\(s\) kept after the step: aten.add.Tensor",
    kept_on_host: r"new tensor\(s\) kept after the step: aten.zeros.default",
}


def plant(fault, module_name, case):
    """Steps with something more in line 2."""
    module = import_module(module_name)
    given = module.advance_

    def advance_(batch, *args, **kwargs):
        if isinstance(_get_current_dispatch_mode(), Watch):
            fault(batch)
        return given(batch, *args, **kwargs)

    module.advance_ = advance_
    try:
        cases.step_optimizer(case)
    finally:
        module.advance_ = given
        KEPT.clear()


@pytest.mark.parametrize("fault", PLANTED, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(on_accelerator, fault):
    with pytest.raises(Fault, match=PLANTED[fault]) as found:
        on_accelerator(plant, fault, "normuon.step.local", {})
    place = rf"at tests/accelerator/test_planted_faults.py:\d+ in {fault.__name__}$"
    assert re.search(place, str(found.value))


@pytest.mark.parametrize("fault", [item, host_scalar, kept], ids=lambda fault: fault.__name__)
def test_a_fault_planted_into_a_sharded_step_is_found(on_accelerator, fault):
    with pytest.raises(Fault, match=PLANTED[fault]):
        on_accelerator(plant, fault, "normuon.step.sharded", {"mesh_sizes": (4,)})


def step_torchs_adamw():
    with FakeDevices():
        param = torch.nn.Parameter(torch.empty(4, 4, device=NAME))
        param.grad = torch.empty_like(param).detach()
        step = torch.zeros((), device=NAME)
        optimizer = torch.optim.AdamW([param], foreach=True)
        moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[param] = {"step": step, **moments}
        with Watch():
            optimizer.step()


def test_torchs_own_adamw_is_found_to_read_its_step(on_accelerator):
    """By default it is not capturable, and asks a `step` on the device for its value."""
    with pytest.raises(Fault, match=r"aten._local_scalar_dense.default reads a value"):
        on_accelerator(step_torchs_adamw)
