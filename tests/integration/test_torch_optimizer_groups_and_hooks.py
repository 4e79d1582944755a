"""Closures, step hooks, `add_param_group` and subclasses: NorMuon as torch's other optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from normuon import NorMuon
from tests.integration.optimizer_info import (
    INPUTS,
    Problem,
    assert_bitwise,
    make_optimizer,
    optim_input,
)

each_input = pytest.mark.parametrize("desc", INPUTS)


def mixed_optimizer(problem: Problem) -> NorMuon:
    return make_optimizer(optim_input("mixed"), problem.params)


@each_input
def test_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned(desc: str) -> None:
    problem = Problem()
    plain = problem.copy()
    optimizer = make_optimizer(optim_input(desc), problem.params)
    reference = make_optimizer(optim_input(desc), plain.params)
    losses: list[Tensor] = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        losses.append(problem.backward())
        return losses[-1]

    for num_steps in range(1, 4):
        with torch.no_grad():
            returned = optimizer.step(closure)
        assert returned is losses[-1]
        assert len(losses) == num_steps
        plain.backward()
        assert reference.step() is None
    assert_bitwise(problem.params, plain.params)


def test_closure_may_be_passed_by_name() -> None:
    problem = Problem()
    assert mixed_optimizer(problem).step(closure=lambda: 2.5) == 2.5


def test_closure_that_raises_leaves_parameters_and_state_alone() -> None:
    problem = Problem()
    optimizer = mixed_optimizer(problem)
    problem.random_grads(0)
    before = problem.copy().params

    def closure() -> float:
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure)
    assert_bitwise(problem.params, before)
    assert not any(v.any() for state in optimizer.state.values() for v in state.values())


@each_input
def test_step_hooks_run_until_removed(desc: str) -> None:
    optimizer = make_optimizer(optim_input(desc), Problem().params)
    calls: list[str] = []
    pre = optimizer.register_step_pre_hook(lambda opt, args, kwargs: calls.append("pre"))
    post = optimizer.register_step_post_hook(lambda opt, args, kwargs: calls.append("post"))
    optimizer.step()
    optimizer.step()
    assert calls == ["pre", "post"] * 2
    pre.remove()
    optimizer.step()
    post.remove()
    optimizer.step()
    assert calls == ["pre", "post"] * 2 + ["post"]


def test_global_hooks_wrap_an_optimizers_own() -> None:
    problem = Problem()
    optimizers: list[Optimizer] = [mixed_optimizer(problem), SGD(problem.params)]
    calls: list[str] = []

    def note(call: str) -> Callable[..., None]:
        return lambda opt, args, kwargs: calls.append(call)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
    ]
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(note("pre"))
        optimizer.register_step_post_hook(note("post"))
    try:
        for optimizer in optimizers:
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["global pre", "pre", "post", "global post"] * 2
    optimizers[0].step()
    assert calls[-2:] == ["pre", "post"]


def test_pre_hook_may_replace_the_arguments_of_step() -> None:
    optimizer = mixed_optimizer(Problem())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt, lambda: 7.0), {}))
    assert optimizer.step() == 7.0


def test_pre_hook_may_not_return_anything_else() -> None:
    optimizer = mixed_optimizer(Problem())
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: 1)
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


def test_hooks_see_gradients_before_and_parameters_after() -> None:
    problem = Problem()
    optimizer = NorMuon([problem.tall], weight_decay=0.0)
    problem.random_grads(0)
    before = problem.tall.detach().clone()
    seen: dict[str, Tensor] = {}

    def zero_gradients(opt: Optimizer, args: Any, kwargs: Any) -> None:
        seen["before"] = problem.tall.detach().clone()
        problem.tall.grad.zero_()

    def keep_parameters(opt: Optimizer, args: Any, kwargs: Any) -> None:
        seen["after"] = problem.tall.detach().clone()

    optimizer.register_step_post_hook(keep_parameters)
    optimizer.step()
    assert not torch.equal(seen["after"], before)
    optimizer = NorMuon([problem.tall], weight_decay=0.0)
    optimizer.register_step_pre_hook(zero_gradients)
    optimizer.step()
    assert_bitwise(problem.tall.detach(), seen["before"])


def test_profiler_shows_the_step_and_zero_grad_by_class_name() -> None:
    problem = Problem()
    optimizer = mixed_optimizer(problem)
    problem.random_grads(0)
    with torch.autograd.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.name for event in profile.function_events}
    assert {"Optimizer.step#NorMuon.step", "Optimizer.zero_grad#NorMuon.zero_grad"} <= names


@each_input
def test_group_added_mid_training_is_an_optimizer_of_its_own(desc: str) -> None:
    problem = Problem()
    alone, late = problem.copy(), problem.copy()
    entry = optim_input(desc)
    grown = make_optimizer(entry, [problem.tall])
    old, new = make_optimizer(entry, [alone.tall]), None
    template = {**(entry.params or [{}])[0], "weight_decay": 0.0, "lr": 0.003}
    for seed in range(6):
        if seed == 3:
            grown.add_param_group({**template, "params": problem.wide})
            new = make_optimizer(entry, [late.wide], weight_decay=0.0, lr=0.003)
            assert set(grown.state[problem.wide]) == set(new.state[late.wide])
        problem.random_grads(seed), alone.random_grads(seed), late.random_grads(seed)
        for optimizer in filter(None, (grown, old, new)):
            optimizer.step()
    assert_bitwise([problem.tall, problem.wide], [alone.tall, late.wide])
    defaults = set(grown.defaults)
    assert all(defaults <= set(group) for group in grown.param_groups)


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (lambda p: [p.wide], TypeError, "param_group must be a dict"),
        (lambda p: {"params": {p.wide}}, TypeError, "organized in ordered collections"),
        (lambda p: {"params": [p.tall]}, ValueError, "more than one parameter group"),
        (lambda p: {"params": [1.0]}, TypeError, "can only optimize Tensors"),
        (lambda p: {"params": [p.wide * 2]}, ValueError, "non-leaf"),
        (lambda p: {"params": [("wide", p.wide)]}, ValueError, "with/without names"),
        (lambda p: {"params": [("wide", p.wide), p.twin]}, ValueError, "with/without names"),
        (lambda p: {"params": [p.bias]}, ValueError, "'algorithm': 'adamw'"),
        (lambda p: {"params": [p.wide], "momentum": 2.0}, ValueError, "momentum=2.0"),
    ],
    ids=[
        "not-a-dict",
        "set",
        "twice",
        "not-a-tensor",
        "non-leaf",
        "named-to-unnamed",
        "half-named",
        "vector",
        "bad-option",
    ],
)
def test_refused_group_leaves_the_optimizer_as_it_was(
    group: Callable[[Problem], Any], error: type[Exception], message: str
) -> None:
    problem = Problem()
    optimizer = NorMuon([problem.tall])
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group(problem))
    assert [g["params"] for g in optimizer.param_groups] == [[problem.tall]]
    assert set(optimizer.state) == {problem.tall}


def test_half_named_params_are_refused_by_the_constructor_too() -> None:
    problem = Problem()
    named, unnamed = ("tall", problem.tall), problem.wide
    for params in ([named, unnamed], [unnamed, named], [{"params": [named]}, {"params": unnamed}]):
        with pytest.raises(ValueError, match="with/without names"):
            NorMuon(params)


class ScaledNorMuon(NorMuon):
    """A user's subclass: one more option, and a step that does something first."""

    def __init__(self, params: Any, scale: float = 1.0, **options: Any) -> None:
        self.scale = scale
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            for param in group["params"]:
                param.mul_(self.scale)
        return super().step(closure)


def test_subclass_may_extend_the_constructor_and_the_step() -> None:
    problem = Problem()
    plain = problem.copy()
    subclass = ScaledNorMuon(problem.params[:3], scale=0.5, lr=0.01)
    reference = NorMuon(plain.params[:3], lr=0.01)
    for seed in range(3):
        problem.random_grads(seed), plain.random_grads(seed)
        subclass.step()
        for param in plain.params[:3]:
            param.data.mul_(0.5)
        reference.step()
    assert_bitwise(problem.params, plain.params)
    assert repr(subclass).startswith("ScaledNorMuon (")
