"""NorMuon under each of torch's learning-rate schedulers, and with tensor learning rates."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler as lrs
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing._internal.common_optimizers import TensorTracker

from normuon import NorMuon, param_groups
from tests.integration.optimizer_info import (
    DEVICES,
    INPUTS,
    KINDS,
    SCHEDULERS,
    TESTCASE,
    Problem,
    ascends,
    assert_bitwise,
    make_optimizer,
    optim_input,
)

each_device = pytest.mark.parametrize("device", DEVICES)


def advance(schedulers: list[Any], loss: Tensor) -> None:
    for scheduler in schedulers:
        plateau = isinstance(scheduler, lrs.ReduceLROnPlateau)
        scheduler.step(loss) if plateau else scheduler.step()


# Schedulers touch learning rates alone, so one input of each kind serves.
@pytest.mark.parametrize("schedule", SCHEDULERS)
@pytest.mark.parametrize("desc", KINDS)
def test_goes_in_the_right_direction_under_a_scheduler(desc: str, schedule: str) -> None:
    entry, problem = optim_input(desc), Problem()
    optimizer = make_optimizer(entry, problem.params)
    initial = problem.backward().item()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Such as "lr_scheduler.step() before optimizer.step()".
        schedulers = [make(optimizer) for make in SCHEDULERS[schedule]]
        for _ in range(20):
            optimizer.step()
            loss = problem.backward()
            advance(schedulers, loss.detach())
    assert (loss.item() > initial) == ascends(entry)


@pytest.mark.parametrize("schedule", SCHEDULERS)
@each_device
def test_groups_keep_their_own_learning_rates_under_a_scheduler(device: str, schedule: str) -> None:
    problem = Problem(device)
    groups = [{"params": [problem.tall]}, {"params": [problem.wide], "lr": 0.01}]
    optimizer = NorMuon(groups)
    schedulers = [make(optimizer) for make in SCHEDULERS[schedule]]
    initial = problem.backward().item()
    for _ in range(20):
        loss = optimizer.step(problem.backward)
        advance(schedulers, loss.detach())
    assert problem.loss().item() < initial
    assert [group["initial_lr"] for group in optimizer.param_groups if "initial_lr" in group] in (
        [],
        [0.001, 0.01],
        # Cyclic schedules set the learning rates of all groups themselves.
        [1e-4, 1e-4],
        [0.01 / 25, 0.01 / 25],
    )


@pytest.mark.parametrize("schedule", SCHEDULERS)
def test_schedulers_fill_a_tensor_learning_rate_in_place(schedule: str) -> None:
    """A compiled or captured step reads that tensor: another in its place would go unseen."""
    problem, reference = Problem(), Problem()
    lr = torch.tensor(2**-9)
    optimizer = NorMuon([{"params": problem.params[:3]}], lr=lr)
    plain = NorMuon([{"params": reference.params[:3]}], lr=2**-9)
    schedulers = [make(optimizer) for make in SCHEDULERS[schedule]]
    plain_schedulers = [make(plain) for make in SCHEDULERS[schedule]]
    for seed in range(12):
        problem.random_grads(seed), reference.random_grads(seed)
        optimizer.step(), plain.step()
        advance(schedulers, torch.tensor(1.0))
        advance(plain_schedulers, torch.tensor(1.0))
        assert optimizer.param_groups[0]["lr"] is lr
        # The tensor holds a float32 that is multiplied up to twelve times.
        assert lr.item() == pytest.approx(plain.param_groups[0]["lr"], rel=12 * 2**-24, abs=0)
    # Twelve steps of at most 0.02 whose learning rates agree to 12 * 2^-24, and their roundings.
    torch.testing.assert_close(problem.params, reference.params, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-dim", "1-dim"])
@pytest.mark.parametrize("desc", INPUTS)
@each_device
def test_tensor_lr_equals_float_lr(device: str, desc: str, shape: tuple[int, ...]) -> None:
    problem, reference = Problem(device), Problem(device)
    entry = optim_input(desc, device)
    # On the host, as torch's own schedulers and scripts make it.
    optimizer = make_optimizer(entry, problem.params, lr=torch.full(shape, 2**-10))
    plain = make_optimizer(entry, reference.params, lr=2**-10)
    # One rounding of 1 - lr wd and one of the step, on weights of magnitude up to 4.
    tracker = TensorTracker({"rtol": 2**-22, "atol": 2**-24})
    for _ in range(5):
        reference.backward()
        plain.step()
        for param in reference.params:
            tracker.add(param)
        problem.backward()
        optimizer.step()
        for param in problem.params:
            tracker.pop_check_set(param.detach(), TESTCASE)
    assert tracker.all_popped()


@pytest.mark.parametrize("schedule", [lrs.OneCycleLR, lrs.CyclicLR])
def test_cyclic_schedules_cycle_the_adamw_beta_and_leave_the_momentum(schedule: Any) -> None:
    """These two cycle ``betas`` wherever an optimizer's defaults have them, and else `momentum`.

    So they move `adamw` groups' beta1, in the groups of matrices ``betas`` is not read, and a
    cycled `momentum` is a group option that the user's own loop may set.
    """
    problem = Problem()
    optimizer = make_optimizer(optim_input("mixed"), problem.params)
    span = {"total_steps": 20} if schedule is lrs.OneCycleLR else {"base_lr": 1e-4}
    scheduler = schedule(
        optimizer, max_lr=0.01, base_momentum=0.7, max_momentum=0.92, cycle_momentum=True, **span
    )
    seen = []
    for seed in range(10):
        problem.random_grads(seed)
        optimizer.step()
        scheduler.step()
        seen.append([group["betas"][0] for group in optimizer.param_groups])
        assert {group["momentum"] for group in optimizer.param_groups} == {0.95}
    assert len({tuple(betas) for betas in seen}) > 1
    assert all(0.7 <= beta <= 0.92 for betas in seen for beta in betas)
    # The schedulers' bookkeeping keys travel with the groups.
    restored = make_optimizer(optim_input("mixed"), problem.copy().params)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["max_momentum"] == 0.92


def test_cyclic_schedules_need_not_cycle_anything() -> None:
    optimizer = make_optimizer(optim_input("mixed"), Problem().params)
    before = [group["betas"] for group in optimizer.param_groups]
    scheduler = lrs.OneCycleLR(optimizer, max_lr=0.01, total_steps=20, cycle_momentum=False)
    optimizer.step()
    scheduler.step()
    assert [group["betas"] for group in optimizer.param_groups] == before


def test_scheduled_momentum_and_other_options_are_read_at_every_step() -> None:
    problem, reference = Problem(), Problem()
    optimizer, plain = NorMuon([problem.tall]), NorMuon([reference.tall], momentum=0.5, beta2=0.5)
    changes = {"momentum": 0.5, "beta2": 0.5}
    optimizer.param_groups[0].update(changes)
    for seed in range(3):
        problem.random_grads(seed), reference.random_grads(seed)
        optimizer.step(), plain.step()
    assert_bitwise(problem.tall, reference.tall)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sequential", "one-cycle", "plateau"])
def test_training_resumes_with_its_scheduler(schedule: str) -> None:
    problem = Problem()
    optimizer = make_optimizer(optim_input("mixed"), problem.params)
    schedulers = [make(optimizer) for make in SCHEDULERS[schedule]]

    def train(
        problem: Problem, optimizer: NorMuon, schedulers: list[Any], seeds: range
    ) -> list[Tensor]:
        for seed in seeds:
            problem.random_grads(seed)
            optimizer.step()
            advance(schedulers, torch.tensor(1.0))
        return problem.params

    train(problem, optimizer, schedulers, range(5))
    resumed = problem.copy()
    other = make_optimizer(optim_input("mixed"), resumed.params)
    others = [make(other) for make in SCHEDULERS[schedule]]
    for scheduler, saved in zip(others, schedulers, strict=True):
        scheduler.load_state_dict(saved.state_dict())
    other.load_state_dict(optimizer.state_dict())
    rest = range(5, 15)
    assert_bitwise(train(resumed, other, others, rest), train(problem, optimizer, schedulers, rest))


@pytest.mark.parametrize("multi_avg_fn", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_weight_averaging_follows_the_trained_weights(multi_avg_fn: Any) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 4))
    optimizer = NorMuon(param_groups(model, overrides={"1.weight": "normuon"}))
    averaged = AveragedModel(model, multi_avg_fn=multi_avg_fn)
    trajectory = []
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        averaged.update_parameters(model)
        trajectory.append(model[0].weight.detach().clone())
    mean = torch.stack(trajectory).mean(0)
    if multi_avg_fn is not None:
        mean = trajectory[0]
        for weight in trajectory[1:]:
            mean = 0.5 * mean + 0.5 * weight
    # Running and plain means round differently, by an ulp of 1 a step.
    torch.testing.assert_close(averaged.module[0].weight, mean, rtol=0, atol=4 * 2**-23)
