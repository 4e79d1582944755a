"""Parameters on the host whose matrices are orthogonalised on another device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normuon import MatrixView, NorMuon
from normuon.step import local
from normuon.step.staging import Loan, Staging, bytes_of, cut
from tests.staged import ApartStaging, LateLoan, steps_are_staged

SHAPES = [(16, 32), (16, 32), (16, 32), (17, 5), (24, 24), (5, 8, 12), (16, 32), (7,)]


def trained(*, dtype=torch.float32, group_options=(), steps=4, **options):
    """Weights and state after some steps, one with a NaN and one with a missing gradient."""
    generator = torch.Generator().manual_seed(0)

    def random(shape) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    params = [nn.Parameter(random(shape)) for shape in SHAPES]
    groups = [
        {"params": params[:5]},
        {"params": params[5:6], "view": MatrixView.experts()},
        {"params": params[6:7], "algorithm": "muon"},
        {"params": params[7:], "algorithm": "adamw", "cautious_weight_decay": False},
    ]
    optimizer = NorMuon(groups, lr=1e-2, **options)
    for step in range(steps):
        for param in params:
            param.grad = random(param.shape)
        if options.get("skip_nonfinite") and step == 1:
            params[0].grad[0, 0] = params[5].grad[2, 0, 0] = float("nan")
        if step == 2:
            params[1].grad = params[7].grad = None
        optimizer.step()
    return [{"weight": param.detach(), **optimizer.state[param]} for param in params]


def differing(first, second) -> list[str]:
    return [
        f"{key} of parameter {number}"
        for number, (a, b) in enumerate(zip(first, second, strict=True))
        for key in a
        if not torch.equal(a[key], b[key])
    ]


OPTIONS = [
    {},
    {"skip_nonfinite": True},
    {"dtype": torch.bfloat16, "kahan_sum": True},
    {"dtype": torch.bfloat16, "kahan_sum": True, "skip_nonfinite": True},
    {"dtype": torch.float64, "ns_dtype": torch.float32},
    {"ns_dtype": torch.float16},
    {"momentum_dtype": torch.int8, "skip_nonfinite": True},
    {"ns_dtype": torch.bfloat16, "momentum_dtype": torch.bfloat16, "max_scratch_bytes": 1},
    {"neuron_axis": "short", "nesterov": False, "equilibrate": True},
    {"cautious_weight_decay": True, "maximize": True, "max_scratch_bytes": 1},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_step_by_way_of_another_device_is_the_same_bit_by_bit(options):
    here = trained(**options)
    with steps_are_staged() as stagings:
        there = trained(**options)
    assert differing(here, there) == []
    (staging,) = stagings
    assert staging.num_loans >= 4 * 2 * 4, "all batches went there and back, in every step"


def test_several_batches_are_on_the_way_at_once(monkeypatch):
    """Each of four equal matrices is a batch of its own: one goes up while the last computes."""
    monkeypatch.setattr(local, "MOST_STAGED_BYTES", 1)
    here, order = trained(), []

    class Noting(ApartStaging):
        def lend(self, name, sizes):
            order.append(name)
            return super().lend(name, sizes)

    with steps_are_staged(Noting):
        there = trained(steps=4)
    assert differing(here, there) == []
    first_group = ["whole up 0", "whole up 1", "whole home 0", "whole up 0", "whole home 1"]
    assert order[:5] == first_group


class Hasty(ApartStaging):
    """A fault: what comes down is read before it has arrived."""

    def lend(self, name, sizes):
        loan = super().lend(name, sizes)
        loan.wait = lambda: None
        return loan


class Forgetful(ApartStaging):
    """A fault: memory is used again while it is lent."""

    def lend(self, name, sizes):
        return super().lend(name.rstrip("01"), sizes)


def test_a_copy_that_is_not_waited_for_is_found():
    here = trained(steps=1)
    with steps_are_staged(Hasty):
        there = trained(steps=1)
    assert {name.split()[0] for name in differing(here, there)} >= {
        "weight",
        "second_momentum_buffer",
    }


def test_memory_that_is_used_twice_is_found(monkeypatch):
    monkeypatch.setattr(local, "MOST_STAGED_BYTES", 1)
    with pytest.raises(AssertionError, match="lent twice"), steps_are_staged(Forgetful):
        trained(steps=1)


def test_one_device_copies_nothing_and_holds_nothing():
    cpu = torch.device("cpu")
    staging = Staging(cpu, cpu)
    loan = staging.lend("any", [(3, torch.float32), (2, torch.int64)])
    assert not staging.is_needed
    assert loan.up(0) is loan.parts[0]
    assert [(part.numel(), part.dtype) for part in loan.parts] == [
        (3, torch.float32),
        (2, torch.int64),
    ]
    with staging.going_up() as leg:
        pass
    leg.join()
    loan.wait()
    loan.give_back()
    assert staging.num_bytes == 0


def test_a_plain_step_makes_no_staging(monkeypatch):
    monkeypatch.setattr("normuon.step.staging.Staging", None)
    trained(steps=1)


def test_memory_is_kept_and_grows():
    staging = Staging(torch.device("cpu"), torch.device("cpu", 0))
    large = staging.lend("a", [(40, torch.float32)])
    small = staging.lend("a", [(5, torch.bfloat16), (3, torch.uint8)])
    assert large.parts[0].data_ptr() == small.parts[0].data_ptr()
    assert small.parts[1].data_ptr() - small.parts[0].data_ptr() == 64
    assert staging.num_bytes == 192
    staging.lend("b", [(1000, torch.float64)])
    staging.lend("a", [(1000, torch.float64)])
    assert staging.num_bytes == 2 * 8000


def test_parts_do_not_overlap():
    sizes = [(3, torch.float32), (0, torch.float64), (5, torch.bool), (65, torch.bfloat16)]
    memory = torch.zeros(bytes_of(sizes), dtype=torch.uint8)
    for number, part in enumerate(cut(memory, sizes), start=1):
        part.view(torch.uint8).fill_(number)
    counts = [int((memory == number).sum()) for number in (1, 2, 3, 4)]
    assert counts == [12, 0, 5, 130]


# Which device.


def matrix() -> nn.Parameter:
    return nn.Parameter(torch.zeros(4, 3))


@pytest.mark.parametrize("given", ["gpu", "meta", 0, True, "cpu:x"])
def test_a_device_that_torch_does_not_know_is_refused(given):
    message = rf"compute_device={given!r} is not a device of torch"
    with pytest.raises(ValueError, match=message):
        NorMuon([matrix()], compute_device=given)


@pytest.mark.skipif(torch.cuda.is_available(), reason="it has one")
def test_a_device_that_is_not_there_is_named_before_anything_moves():
    first, param = matrix(), matrix()
    groups = [{"params": [("a", first)]}, {"params": [("w", param)], "compute_device": "cuda"}]
    optimizer = NorMuon(groups)
    first.grad = param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"w \[4, 3\]: its matrices .* 'cuda'.*does not find"):
        optimizer.step()
    assert not first.any()
    assert not optimizer.state[first]["momentum_buffer"].any()


@pytest.mark.parametrize("given", [None, "cpu", torch.device("cpu"), "cpu:0"])
def test_the_host_itself_is_no_other_device(given, monkeypatch):
    monkeypatch.setattr("normuon.step.staging.Staging", None)
    param = matrix()
    optimizer = NorMuon([param], compute_device=given)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert param.any()


def test_a_checkpoint_brings_no_device_of_another_machine():
    saved = NorMuon([matrix()], compute_device=torch.device("cuda:1")).state_dict()
    assert saved["param_groups"][0]["compute_device"] == "cuda:1"
    optimizer = NorMuon([matrix()])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["compute_device"] is None


def test_a_late_loan_is_a_loan():
    """What the tests above patch is what the step uses."""
    assert issubclass(LateLoan, Loan)
