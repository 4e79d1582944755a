"""What every torch optimizer promises of construction, groups and steps, held against NorMuon."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_optimizers import ErrorOptimizerInput, OptimizerErrorEnum

from normuon import MatrixView, NorMuon
from tests.integration.optimizer_info import (
    DEVICES,
    INPUTS,
    NORMUON,
    Problem,
    ascends,
    assert_bitwise,
    make_optimizer,
    normuon_error_inputs,
    optim_input,
)

ERRORS = normuon_error_inputs("cpu", torch.float32)
each_input = pytest.mark.parametrize("desc", INPUTS)
each_device = pytest.mark.parametrize("device", DEVICES)


def values_of(optimizer: NorMuon) -> dict[str, Any]:
    """A copy of all that a step may write to."""
    return deepcopy(
        {
            "params": [p.detach() for g in optimizer.param_groups for p in g["params"]],
            "state": optimizer.state_dict()["state"],
        }
    )


def test_inputs_leave_the_implementation_flags_to_the_tests() -> None:
    for entry in NORMUON.optim_inputs_func(device="cpu"):
        assert not {"foreach", "fused", "differentiable"} & set(entry.kwargs)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.optimizer_error_input.desc)
def test_wrong_input_is_refused(error: ErrorOptimizerInput) -> None:
    entry = error.optimizer_error_input

    def build_and_step() -> None:
        optimizer = NorMuon(entry.params, **entry.kwargs)
        if error.error_on is OptimizerErrorEnum.STEP_ERROR:
            optimizer.step()

    if issubclass(error.error_type, Warning):
        with pytest.warns(error.error_type, match=error.error_regex):
            build_and_step()
    else:
        with pytest.raises(error.error_type, match=error.error_regex):
            build_and_step()


@pytest.mark.parametrize(
    "as_params",
    [list, tuple, iter, lambda ps: (p for p in ps), lambda ps: [{"params": iter(ps)}]],
    ids=["list", "tuple", "iterator", "generator", "generator-in-group"],
)
@pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
def test_params_may_be_any_iterable(as_params: Callable[[Any], Any], named: bool) -> None:
    problem = Problem()
    items = problem.named[:3] if named else problem.params[:3]
    group = NorMuon(as_params(items)).param_groups[0]
    assert all(a is b for a, b in zip(group["params"], problem.params, strict=False))
    assert group.get("param_names") == (["tall", "wide", "twin"] if named else None)


def test_duplicate_parameter_warns_once_and_is_stepped_as_listed() -> None:
    param = torch.nn.Parameter(torch.ones(3, 4))
    with pytest.warns(UserWarning, match="duplicate parameters") as caught:
        optimizer = NorMuon([param, param])
    assert len(caught) == 1
    param.grad = torch.randn(3, 4)
    optimizer.step()
    assert param.isfinite().all()


@each_input
@each_device
def test_goes_in_the_right_direction(desc: str, device: str) -> None:
    entry, problem = optim_input(desc, device), Problem(device)
    optimizer = make_optimizer(entry, problem.params)
    initial = problem.backward().item()
    for _ in range(20):
        optimizer.step()
        final = problem.backward().item()
    assert (final > initial) == ascends(entry)


@each_input
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.float16], ids=["float64", "bfloat16", "float16"]
)
def test_trains_parameters_of_every_dtype(desc: str, dtype: torch.dtype) -> None:
    # Half-precision weights of size 1 need steps above their spacing of 2^-8.
    entry, problem = optim_input(desc), Problem(dtype=dtype)
    optimizer = make_optimizer(entry, problem.params, lr=0.05, weight_decay=0.0)
    initial = problem.backward().item()
    for _ in range(20):
        optimizer.step()
        final = problem.backward().item()
    assert (final > initial) == ascends(entry)
    assert all(p.dtype == dtype for p in problem.params)


@each_input
def test_mixed_dtypes_in_a_group_equal_an_optimizer_each(desc: str) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float64)

    def params() -> list[Tensor]:
        return [Problem(dtype=dtype).tall for dtype in dtypes]

    entry, together, apart = optim_input(desc), params(), params()
    entry.params = entry.params and entry.params[:1]
    optimizers = [make_optimizer(entry, together), *(make_optimizer(entry, [p]) for p in apart)]
    for seed in range(3):
        for param in (*together, *apart):
            generator = torch.Generator().manual_seed(seed)
            param.grad = torch.randn(param.shape, generator=generator).to(param)
        for optimizer in optimizers:
            optimizer.step()
    assert_bitwise(together, apart)


@each_input
def test_results_do_not_depend_on_the_default_dtype(desc: str) -> None:
    """A scalar made into a tensor without a dtype would take the default's precision."""

    def train(default: torch.dtype) -> list[Tensor]:
        problem = Problem(dtype=torch.float64)
        torch.set_default_dtype(default)
        try:
            # Representable in float32 too: a tensor made of it is the same under both defaults.
            optimizer = make_optimizer(optim_input(desc), problem.params, lr=2**-10)
            for seed in range(3):
                problem.random_grads(seed)
                optimizer.step()
        finally:
            torch.set_default_dtype(torch.float32)
        return problem.params

    assert_bitwise(train(torch.float32), train(torch.float64))


def strided(param: Tensor) -> Tensor:
    """The same values in every other element of a larger tensor."""
    return param.detach().repeat_interleave(2, -1)[..., ::2]


def transposed(param: Tensor) -> Tensor:
    """The same values with the dims' strides in reverse, without gaps."""
    return param.detach().mT.contiguous().mT


@each_input
@pytest.mark.parametrize("layout", [strided, transposed], ids=["strided", "transposed"])
@pytest.mark.parametrize("grad_layout", ["contiguous-grad", "grad-like-param"])
def test_memory_layout_does_not_change_the_step(
    desc: str, layout: Callable[[Tensor], Tensor], grad_layout: str
) -> None:
    """A kernel that walks memory linearly would pair the wrong elements, or leave the tensor."""
    problem, reference = Problem(), Problem()
    for name, param in problem.named[:3]:
        setattr(problem, name, torch.nn.Parameter(layout(param)))
    optimizer = make_optimizer(optim_input(desc), problem.params)
    expected = make_optimizer(optim_input(desc), reference.params)
    for seed in range(3):
        problem.random_grads(seed), reference.random_grads(seed)
        if grad_layout == "contiguous-grad":
            for param in problem.params:
                param.grad = param.grad.contiguous()
        else:
            for param in problem.params:
                param.grad = torch.empty_strided(param.shape, param.stride()).copy_(param.grad)
        optimizer.step(), expected.step()
    # Torch's AdamW kernels for different layouts round differently, by an ulp of 1 a step.
    atol = 5e-7 if "adamw" in desc or desc == "mixed" else 0
    torch.testing.assert_close(problem.params, reference.params, rtol=0, atol=atol)


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize("algorithm", ["normuon", "muon", "adamw"])
def test_step_writes_nothing_between_the_elements_of_a_strided_parameter(
    algorithm: str, skip_nonfinite: bool
) -> None:
    storage = torch.randn(6, 5, 2)
    gaps = storage[..., 1].clone()
    param = storage[..., 0].requires_grad_()
    group = {"params": [param], "algorithm": algorithm}
    optimizer = NorMuon([group], skip_nonfinite=skip_nonfinite)
    param.grad = torch.randn(6, 5)
    optimizer.step()
    assert_bitwise(storage[..., 1], gaps)


@each_input
def test_gradients_are_never_modified(desc: str) -> None:
    problem = Problem()
    optimizer = make_optimizer(optim_input(desc), problem.params)
    for seed in range(3):
        problem.random_grads(seed)
        grads = [p.grad for p in problem.params]
        copies, versions = deepcopy(grads), [g._version for g in grads]
        optimizer.step()
        assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
        assert [g._version for g in grads] == versions
        assert_bitwise(grads, copies)


@each_input
@each_device
def test_step_without_gradients_changes_nothing(desc: str, device: str) -> None:
    problem = Problem(device)
    optimizer = make_optimizer(optim_input(desc, device), problem.params)
    before = values_of(optimizer)
    assert optimizer.step(lambda: torch.tensor([1.0])) == 1.0
    assert_bitwise(values_of(optimizer), before)


@each_input
def test_zero_gradients_move_nothing_without_weight_decay(desc: str) -> None:
    problem = Problem()
    optimizer = make_optimizer(optim_input(desc), problem.params, weight_decay=0.0)
    before = deepcopy(problem.params)
    for param in problem.params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert_bitwise(problem.params, before)


@each_input
def test_zero_gradients_leave_weight_decay_alone_to_act(desc: str) -> None:
    problem = Problem()
    optimizer = make_optimizer(optim_input(desc), problem.params, lr=0.5, weight_decay=0.25)
    before = deepcopy(problem.params)
    for param in problem.params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for after, old in zip(problem.params, before, strict=True):
        # 1 - lr wd = 0.875 is exact in binary, so only the product is rounded.
        torch.testing.assert_close(after, old * 0.875, rtol=2**-23, atol=0)


@each_input
def test_maximize_is_minimising_the_negative(desc: str) -> None:
    problem = Problem()
    mirrored = problem.copy()
    up = make_optimizer(optim_input(desc), problem.params, maximize=True)
    down = make_optimizer(optim_input(desc), mirrored.params, maximize=False)
    for seed in range(5):
        problem.random_grads(seed)
        for param, other in zip(problem.params, mirrored.params, strict=True):
            other.grad = -param.grad
        up.step(), down.step()
    assert_bitwise(problem.params, mirrored.params)


@each_input
def test_param_groups_equal_several_optimizers(desc: str) -> None:
    """Learning rate, weight decay and every other option act within their group alone."""
    problem = Problem()
    alone = problem.copy()
    entry = optim_input(desc)
    options = [{"lr": 0.01, "weight_decay": 0.0}, {"lr": 0.003, "weight_decay": 0.5}, {}]
    template = {**(entry.params or [{}])[0], **entry.kwargs}
    algorithm = template.pop("algorithm", "normuon")
    together = NorMuon(
        [
            {"algorithm": algorithm, **template, **own, "params": [param]}
            for own, param in zip(options, problem.params, strict=False)
        ]
    )
    apart = [
        NorMuon([{"algorithm": algorithm, "params": [param]}], **{**template, **own})
        for own, param in zip(options, alone.params, strict=False)
    ]
    for seed in range(3):
        problem.random_grads(seed), alone.random_grads(seed)
        for optimizer in (together, *apart):
            optimizer.step()
    assert_bitwise(problem.params, alone.params)


@each_input
def test_group_with_a_tiny_learning_rate_stays(desc: str) -> None:
    problem = Problem()
    entry = optim_input(desc)
    template = {**(entry.params or [{}])[0], **entry.kwargs}
    before = problem.wide.detach().clone()
    optimizer = NorMuon(
        [{"lr": 1e-3, **template, "params": [problem.tall]}, {"params": [problem.wide]}], lr=1e-28
    )
    initial = problem.backward().item()
    for _ in range(20):
        problem.backward()
        optimizer.step()
    assert_bitwise(problem.wide.detach(), before)
    assert (problem.loss().item() > initial) == ascends(entry)


@each_input
def test_can_be_printed(desc: str) -> None:
    optimizer = make_optimizer(optim_input(desc), Problem().named)
    text = repr(optimizer)
    assert text.startswith("NorMuon (\nParameter Group 0\n")
    assert f"neuron_axis: {optimizer.param_groups[0]['neuron_axis']}" in text


@each_input
def test_state_exists_before_and_after_a_step(desc: str) -> None:
    problem = Problem()
    optimizer = make_optimizer(optim_input(desc), problem.params)
    keys = {param: set(state) for param, state in optimizer.state.items()}
    assert set(keys) == set(problem.params)
    assert all(keys.values())
    problem.random_grads(0)
    optimizer.step()
    assert {param: set(state) for param, state in optimizer.state.items()} == keys


@each_input
@each_device
def test_state_lives_beside_its_parameter(desc: str, device: str) -> None:
    problem = Problem(device)
    optimizer = make_optimizer(optim_input(desc, device), problem.params)
    problem.random_grads(0)
    optimizer.step()
    for param, state in optimizer.state.items():
        assert {value.device for value in state.values()} == {param.device}
        assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    problem = Problem()
    optimizer = make_optimizer(optim_input("mixed"), problem.params)
    problem.random_grads(0)
    optimizer.zero_grad(set_to_none=set_to_none)
    for param in problem.params:
        assert param.grad is None if set_to_none else not param.grad.any()


def test_view_in_a_group_serves_convolutions() -> None:
    weight = torch.nn.Parameter(torch.randn(8, 3, 3, 3))
    optimizer = NorMuon([{"params": [weight], "view": MatrixView.conv()}])
    weight.grad = torch.randn_like(weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert weight.isfinite().all()
