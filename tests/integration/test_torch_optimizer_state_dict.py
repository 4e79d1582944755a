"""Saving, loading, copying and pickling, as torch's other optimizers do."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from normuon import NorMuon, param_groups
from tests.integration.optimizer_info import (
    DEVICES,
    INPUTS,
    KINDS,
    NORMUON,
    Problem,
    assert_bitwise,
    make_optimizer,
    optim_input,
)

StateDict = dict[str, Any]
each_input = pytest.mark.parametrize("desc", INPUTS)


def build(desc: str, problem: Problem, *, named: bool = False, **overrides: Any) -> NorMuon:
    params = problem.named if named else problem.params
    return make_optimizer(optim_input(desc), params, **overrides)


def train(problem: Problem, optimizer: Optimizer, seeds: range) -> list[Tensor]:
    for seed in seeds:
        problem.random_grads(seed)
        optimizer.step()
    return problem.params


def trained(desc: str = "mixed", *, named: bool = False) -> tuple[Problem, NorMuon]:
    problem = Problem()
    optimizer = build(desc, problem, named=named)
    train(problem, optimizer, range(5))
    return problem, optimizer


def without_names(state_dict: StateDict) -> StateDict:
    state_dict = deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group.pop("param_names", None)
    state_dict.pop("param_names", None)
    return state_dict


def through_file(value: Any, *, weights_only: bool = True) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@each_input
def test_restored_optimizer_goes_on_bitwise(desc: str) -> None:
    problem, optimizer = trained(desc)
    copy = problem.copy()
    restored = build(desc, copy)
    saved = deepcopy(optimizer.state_dict())
    untouched = deepcopy(saved)
    restored.load_state_dict(saved)
    rest = range(5, 15)
    assert_bitwise(train(copy, restored, rest), train(problem, optimizer, rest))
    # What was loaded is copied, not kept: ten steps later it is as it was.
    assert_bitwise(saved, untouched)
    assert_bitwise(restored.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("desc", KINDS)
@pytest.mark.parametrize("named_before", [False, True], ids=["from-unnamed", "from-named"])
@pytest.mark.parametrize("named_after", [False, True], ids=["to-unnamed", "to-named"])
def test_names_may_come_and_go_between_runs(
    desc: str, named_before: bool, named_after: bool
) -> None:
    _, optimizer = trained(desc, named=named_before)
    restored = build(desc, Problem(), named=named_after)
    restored.load_state_dict(optimizer.state_dict())
    saved = restored.state_dict()
    assert_bitwise(without_names(saved), without_names(optimizer.state_dict()))
    names = [name for of_group in saved.get("param_names", []) for name in of_group]
    known = named_before or named_after
    assert sorted(names) == (["bias", "tall", "twin", "wide"] if known else [])


def test_saved_names_win_over_the_live_ones() -> None:
    problem = Problem()
    optimizer = NorMuon([("saved", problem.tall)])
    restored = NorMuon([("live", problem.copy().tall)])
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["param_names"] == ["saved"]


@each_input
def test_state_dict_survives_a_weights_only_file(desc: str) -> None:
    _, optimizer = trained(desc, named=True)
    assert_bitwise(through_file(optimizer.state_dict()), optimizer.state_dict())


@each_input
def test_loading_its_own_state_dict_adds_and_drops_nothing(desc: str) -> None:
    _, optimizer = trained(desc)
    before = deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert_bitwise(optimizer.state_dict(), before)


@each_input
def test_state_dict_from_before_an_option_existed_loads(desc: str) -> None:
    problem, optimizer = trained(desc)
    old = deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in NORMUON.not_og_supported_flags:
            del group[flag]
    copy = problem.copy()
    restored = build(desc, copy)
    restored.load_state_dict(old)
    rest = range(5, 8)
    assert_bitwise(train(copy, restored, rest), train(problem, optimizer, rest))


@pytest.mark.parametrize("desc", ["adamw", "mixed"])
def test_step_may_be_a_plain_number(desc: str) -> None:
    problem, optimizer = trained(desc)
    saved = deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        if "step" in state:
            state["step"] = state["step"].item()
    copy = problem.copy()
    restored = build(desc, copy)
    restored.load_state_dict(saved)
    assert_bitwise(train(copy, restored, range(5, 8)), train(problem, optimizer, range(5, 8)))


def test_duplicate_parameter_keeps_its_state() -> None:
    param = torch.nn.Parameter(torch.randn(3, 4))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = NorMuon([param, param])
    param.grad = torch.randn(3, 4)
    optimizer.step()
    saved = deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert_bitwise(optimizer.state_dict()["state"], saved["state"])


def test_repeated_group_looks_the_same_in_a_state_dict() -> None:
    _, optimizer = trained()
    last = deepcopy(optimizer.state_dict()["param_groups"][-1])
    optimizer.param_groups.extend(optimizer.param_groups)
    assert_bitwise(optimizer.state_dict()["param_groups"][-1], last)


def test_state_of_the_users_own_is_kept() -> None:
    problem, optimizer = trained()
    optimizer.state["run"] = {"tokens": 7}
    optimizer.state[problem.tall]["note"] = torch.ones(2)
    restored = build("mixed", problem.copy())
    restored.load_state_dict(through_file(optimizer.state_dict()))
    assert restored.state["run"] == {"tokens": 7}
    assert_bitwise(restored.state_dict()["state"], optimizer.state_dict()["state"])


# Hooks


def add_state(optimizer: Optimizer) -> None:
    optimizer.state["test"] = 1


def move_state(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    return {**state_dict, "found": state_dict["state"].pop("test", None)}


@each_input
def test_state_dict_hooks(desc: str) -> None:
    optimizer = build(desc, Problem())
    post = optimizer.register_state_dict_post_hook(move_state)
    assert optimizer.state_dict()["found"] is None
    pre = optimizer.register_state_dict_pre_hook(add_state)
    assert optimizer.state_dict()["found"] == 1
    post.remove()
    assert optimizer.state_dict()["state"]["test"] == 1
    pre.remove()


@pytest.mark.parametrize("prepend", [False, True])
def test_state_dict_hooks_run_in_order(prepend: bool) -> None:
    optimizer, calls = build("mixed", Problem()), []
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("first"))
    optimizer.register_state_dict_pre_hook(lambda opt: calls.append("second"), prepend=prepend)
    optimizer.register_state_dict_post_hook(lambda opt, sd: calls.append("first"))
    optimizer.register_state_dict_post_hook(lambda opt, sd: calls.append("second"), prepend=prepend)
    optimizer.state_dict()
    assert calls == (["second", "first"] if prepend else ["first", "second"]) * 2


def set_lr(lr: float, *, copying: bool) -> Callable[[Optimizer, StateDict], StateDict | None]:
    def hook(optimizer: Optimizer, state_dict: StateDict) -> StateDict | None:
        returned = deepcopy(state_dict) if copying else state_dict
        returned["param_groups"][0]["lr"] = lr
        return returned if copying else None

    return hook


@each_input
def test_load_state_dict_pre_hooks_may_change_or_replace_the_dict(desc: str) -> None:
    optimizer = build(desc, Problem())
    state_dict = optimizer.state_dict()
    optimizer.register_load_state_dict_pre_hook(set_lr(0.002, copying=False))
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(set_lr(0.003, copying=True), prepend=True)
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.002
    optimizer.register_load_state_dict_pre_hook(set_lr(0.004, copying=True))
    optimizer.load_state_dict(state_dict)
    assert optimizer.param_groups[0]["lr"] == 0.004


def test_load_state_dict_post_hook_sees_what_was_loaded() -> None:
    optimizer = build("mixed", Problem())
    optimizer.register_load_state_dict_pre_hook(set_lr(0.003, copying=True))
    seen: list[float] = []
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(opt.param_groups[0]["lr"]))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(0), prepend=True)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0, 0.003]


# Dtypes and devices


@pytest.mark.parametrize("desc", ["default", "muon", "adamw", "mixed", "float64-momentum"])
def test_state_follows_the_parameters_dtype_and_back(desc: str) -> None:
    """Momenta take the parameter's dtype; second moments of neurons and steps keep float32."""
    _, optimizer = trained(desc)
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(257)  # One more than bfloat16 counts to.
    half = Problem(dtype=torch.bfloat16)
    halved = build(desc, half)
    halved.load_state_dict(optimizer.state_dict())
    for number, state in optimizer.state_dict()["state"].items():
        for key, loaded in halved.state_dict()["state"][number].items():
            kept = key in ("step", "second_momentum_buffer")
            kept |= key == "momentum_buffer" and desc == "float64-momentum"
            dtype = state[key].dtype if kept else torch.bfloat16
            assert loaded.dtype == dtype
            assert_bitwise(loaded, state[key].to(dtype))
    train(half, halved, range(5, 8))
    assert all(param.isfinite().all() for param in half.params)
    back = Problem()
    restored = build(desc, back)
    restored.load_state_dict(halved.state_dict())
    for number, state in restored.state_dict()["state"].items():
        assert_bitwise(
            state,
            {
                key: value.to(state[key].dtype)
                for key, value in halved.state_dict()["state"][number].items()
            },
        )
    train(back, restored, range(8, 11))


@each_input
@pytest.mark.parametrize("device", DEVICES)
def test_state_from_the_cpu_goes_to_the_parameters_device(desc: str, device: str) -> None:
    _, optimizer = trained(desc)
    problem = Problem(device)
    restored = make_optimizer(optim_input(desc, device), problem.params)
    saved = deepcopy(optimizer.state_dict())
    restored.load_state_dict(saved)
    assert_bitwise(saved, optimizer.state_dict())
    for param, state in restored.state.items():
        assert {value.device for value in state.values()} == {param.device}
    assert_bitwise(restored.state_dict()["state"], saved["state"])
    train(problem, restored, range(5, 8))
    assert all(param.isfinite().all() for param in problem.params)


# What does not fit


def drop_group(saved: StateDict) -> None:
    saved["param_groups"].pop()


def drop_param(saved: StateDict) -> None:
    saved["param_groups"][-1]["params"].pop()


def swap_algorithm(saved: StateDict) -> None:
    saved["param_groups"][0]["algorithm"] = "adamw"


def cut_momentum(saved: StateDict) -> None:
    saved["state"][3]["exp_avg"] = saved["state"][3]["exp_avg"][:-1]


def drop_momentum(saved: StateDict) -> None:
    del saved["state"][0]["momentum_buffer"]


@pytest.mark.parametrize(
    "spoil", [drop_group, drop_param, swap_algorithm, cut_momentum, drop_momentum]
)
def test_state_dict_that_does_not_fit_changes_nothing(spoil: Callable[[StateDict], None]) -> None:
    _, other = trained()
    saved = deepcopy(other.state_dict())
    spoil(saved)
    optimizer = build("mixed", Problem(), lr=0.5)
    before = deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="checkpoint"):
        optimizer.load_state_dict(saved)
    assert_bitwise(optimizer.state_dict(), before)


# Copies


DUPLICATES = {
    "deepcopy": deepcopy,
    "pickle": lambda pair: pickle.loads(pickle.dumps(pair)),
    "torch.save": lambda pair: through_file(pair, weights_only=False),
}


@pytest.mark.parametrize(
    ("desc", "how"),
    [(desc, how) for desc in INPUTS for how in ("deepcopy", "pickle")] + [("mixed", "torch.save")],
)
def test_copied_optimizer_goes_on_bitwise(desc: str, how: str) -> None:
    problem, optimizer = trained(desc, named=True)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)  # Wraps `step`, which must not travel along.
    copy, copied = DUPLICATES[how]((problem, optimizer))
    assert_bitwise(copied.state_dict(), optimizer.state_dict())
    public = [{k for k in vars(o) if not k.startswith("_")} - {"step"} for o in (copied, optimizer)]
    assert public[0] == public[1]
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not mine & {id(p) for group in copied.param_groups for p in group["params"]}
    expected = deepcopy(problem.params)
    rest = range(5, 10)
    trajectory = deepcopy(train(copy, copied, rest))
    assert_bitwise(problem.params, expected)
    assert_bitwise(trajectory, train(problem, optimizer, rest))
    copied.add_param_group({"params": [("new", torch.ones(3, 4, requires_grad=True))]})


def test_pickled_state_is_the_base_classs() -> None:
    _, optimizer = trained()
    assert set(optimizer.__getstate__()) == {"defaults", "state", "param_groups"}


def test_copying_adds_no_option() -> None:
    _, optimizer = trained()
    copied = deepcopy(optimizer)
    assert [set(g) for g in copied.param_groups] == [set(g) for g in optimizer.param_groups]


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_state_dict_restores_by_name(flatten: bool) -> None:
    def model_and_optimizer() -> tuple[torch.nn.Module, NorMuon]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        return model, NorMuon(param_groups(model, overrides={"0.weight": "normuon"}), lr=0.01)

    def step(model: torch.nn.Module, optimizer: NorMuon) -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    model, optimizer = model_and_optimizer()
    step(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    saved = deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    if not flatten:
        assert set(saved["state"]) == {name for name, _ in model.named_parameters()}
    other, restored = model_and_optimizer()
    other.load_state_dict(model.state_dict())
    set_optimizer_state_dict(other, restored, saved, options=options)
    for pair in ((model, optimizer), (other, restored)):
        step(*pair)
    assert_bitwise(list(other.parameters()), list(model.parameters()))
