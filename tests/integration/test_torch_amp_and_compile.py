"""NorMuon under `torch.amp.GradScaler`, autocast and `torch.compile`."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing._internal.common_optimizers import TensorTracker

from normuon import NorMuon
from tests.integration.optimizer_info import (
    DEVICES,
    INPUTS,
    KINDS,
    TESTCASE,
    Problem,
    ascends,
    assert_bitwise,
    make_optimizer,
    optim_input,
)

each_input = pytest.mark.parametrize("desc", INPUTS)
each_device = pytest.mark.parametrize("device", DEVICES)


# GradScaler


@each_input
@each_device
def test_scaled_training_equals_unscaled_training(desc: str, device: str) -> None:
    problem, reference = Problem(device), Problem(device)
    optimizer = make_optimizer(optim_input(desc, device), problem.params)
    plain = make_optimizer(optim_input(desc, device), reference.params)
    # Powers of two scale gradients without rounding.
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, growth_interval=2)
    for _ in range(5):
        optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        scaler.step(optimizer)
        scaler.update()
        reference.backward()
        plain.step()
    assert_bitwise(problem.params, reference.params)
    assert scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("desc", KINDS)
@each_device
@pytest.mark.parametrize("bad", [float("inf"), float("nan")], ids=["inf", "nan"])
def test_scaler_skips_the_step_of_a_nonfinite_gradient(desc: str, device: str, bad: float) -> None:
    problem = Problem(device)
    optimizer = make_optimizer(optim_input(desc, device), problem.params)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    scaler.scale(problem.loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    before = deepcopy([[p.detach() for p in problem.params], optimizer.state_dict()])
    optimizer.zero_grad()
    scaler.scale(problem.loss()).backward()
    problem.wide.grad[0, 0] = bad
    scaler.step(optimizer)
    scaler.update()
    assert_bitwise([[p.detach() for p in problem.params], optimizer.state_dict()], before)
    assert scaler.get_scale() == 2.0**9
    optimizer.zero_grad()
    scaler.scale(problem.loss()).backward()
    scaler.step(optimizer)
    assert not any(torch.equal(p, old) for p, old in zip(problem.params, before[0], strict=True))


@each_device
def test_gradients_may_be_unscaled_and_clipped_before_the_step(device: str) -> None:
    problem, reference = Problem(device), Problem(device)
    optimizer = make_optimizer(optim_input("mixed", device), problem.params)
    plain = make_optimizer(optim_input("mixed", device), reference.params)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    for _ in range(3):
        optimizer.zero_grad()
        scaler.scale(problem.loss()).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(problem.params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        reference.backward()
        torch.nn.utils.clip_grad_norm_(reference.params, 1.0)
        plain.step()
    assert_bitwise(problem.params, reference.params)


@each_input
@each_device
def test_trains_under_autocast(desc: str, device: str) -> None:
    entry, problem = optim_input(desc, device), Problem(device)
    optimizer = make_optimizer(entry, problem.params)
    reference = Problem(device)
    outside = make_optimizer(optim_input(desc, device), reference.params)
    initial = problem.loss().item()
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16):
            problem.loss().backward()
            optimizer.step()  # Which autocast must not round.
        for param, other in zip(problem.params, reference.params, strict=True):
            other.grad = param.grad.clone()
        outside.step()
    assert (problem.loss().item() > initial) == ascends(entry)
    assert_bitwise(problem.params, reference.params)


# torch.compile


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


compiled = pytest.mark.usefixtures("_fresh_compiler")

# Inputs that trace differently, and whether one graph holds the step: torch's fused AdamW kernels
# are never traced, and only they can skip a step without waiting for the device.
TRACED = {
    "one-element-tensor-lr": True,
    "no-nesterov": True,
    "original-scaling": True,
    "short-axis": True,
    "polar-express": True,
    "callable-orthogonalizer": True,
    "float64-momentum": True,
    "cautious": True,
    "skip-nonfinite": True,
    "maximize": True,
    "muon": True,
    "adamw": True,
    "adamw-skip-nonfinite": False,
    "mixed": True,
}


@pytest.mark.parametrize("desc", TRACED)
@compiled
def test_compiled_step_equals_the_eager_one(desc: str) -> None:
    problem, reference = Problem(), Problem()
    optimizer = make_optimizer(optim_input(desc), problem.params[:3])
    eager = make_optimizer(optim_input(desc), reference.params[:3])
    step = torch.compile(optimizer.step, backend="eager", fullgraph=TRACED[desc])
    # The eager backend runs the same kernels, but torch's AdamW takes others when it is traced,
    # which round differently by an ulp or two of the weights (up to 4).
    tracker = TensorTracker({"rtol": 2**-22, "atol": 2**-24})
    for seed in range(3):
        reference.random_grads(seed), problem.random_grads(seed)
        eager.step()
        for param in reference.params[:3]:
            tracker.add(param)
        step()
        for param in problem.params[:3]:
            tracker.pop_check_set(param.detach(), TESTCASE)
    assert tracker.all_popped()


@compiled
@pytest.mark.parametrize("algorithm", ["normuon", "muon", "adamw"])
@pytest.mark.parametrize(("lr", "num_graphs"), [("tensor", 1), ("float", 2)])
def test_scheduled_learning_rates_do_not_recompile(
    algorithm: str, lr: str, num_graphs: int
) -> None:
    """A tensor is an input of the graph; a float becomes one when it is first seen to change."""
    param = torch.nn.Parameter(torch.randn(6, 4))
    group = {"params": [param], "algorithm": algorithm}
    optimizer = NorMuon([group], lr=torch.tensor(0.01) if lr == "tensor" else 0.01)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(optimizer.step, backend=counter)
    for seed in range(8):
        param.grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        step()
        scheduler.step()
    assert counter.frame_count == num_graphs


@compiled
def test_float_learning_rate_may_change_under_a_compiled_step_of_mixed_groups() -> None:
    problem, reference = Problem(), Problem()
    optimizer = make_optimizer(optim_input("mixed"), problem.params)
    eager = make_optimizer(optim_input("mixed"), reference.params)
    step = torch.compile(optimizer.step, backend="eager")
    for seed in range(4):
        problem.random_grads(seed), reference.random_grads(seed)
        step()
        eager.step()
        for group in optimizer.param_groups + eager.param_groups:
            group["lr"] *= 0.9
    # Gradients do not depend on the weights here: the roundings of four steps on weights up to 4.
    torch.testing.assert_close(problem.params, reference.params, rtol=0, atol=4 * 2**-21)


@compiled
def test_compiled_step_takes_gradients_as_they_come() -> None:
    """A parameter without a gradient is skipped, and stepped again once it has one."""
    problem, reference = Problem(), Problem()
    optimizer, eager = NorMuon(problem.params[:3]), NorMuon(reference.params[:3])
    step = torch.compile(optimizer.step, backend="eager")
    for seed, missing in enumerate(["wide", None, "tall", None]):
        problem.random_grads(seed), reference.random_grads(seed)
        if missing is not None:
            getattr(problem, missing).grad = getattr(reference, missing).grad = None
        step()
        eager.step()
    assert_bitwise(problem.params, reference.params)


@compiled
def test_compiled_step_runs_closures_and_hooks() -> None:
    problem, reference = Problem(), Problem()
    optimizer, eager = NorMuon(problem.params[:3]), NorMuon(reference.params[:3])
    calls: list[str] = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("post"))
    step = torch.compile(optimizer.step, backend="eager")
    for num_steps in range(1, 3):
        assert_bitwise(step(problem.backward), eager.step(reference.backward))
        assert calls == ["post"] * num_steps
    assert_bitwise(problem.params, reference.params)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("desc", ["tensor-lr", "mixed"])
@each_device
def test_inductor_step_equals_the_eager_one(desc: str, device: str) -> None:
    problem, reference = Problem(device), Problem(device)
    options = {"ns_dtype": torch.float32}
    optimizer = make_optimizer(optim_input(desc, device), problem.params, **options)
    eager = make_optimizer(optim_input(desc, device), reference.params, **options)
    step = torch.compile(optimizer.step)
    for seed in range(3):
        problem.random_grads(seed), reference.random_grads(seed)
        step()
        eager.step()
    # Fused reductions round elsewhere; Newton-Schulz multiplies that by up to 3.4^5 ~ 500, so the
    # three steps of at most 0.006 an entry differ by 3 * 0.006 * 500 * 2^-24, and roundings on 4.
    torch.testing.assert_close(problem.params, reference.params, rtol=0, atol=3e-6)
