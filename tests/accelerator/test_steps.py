"""A step on an accelerator reads nothing, copies nothing from or to the host, and keeps nothing."""

from __future__ import annotations

import pytest
import torch

from normuon.step import adamw
from tests.accelerator import cases
from tests.accelerator.device import NAME, FakeDevices, autocast
from tests.accelerator.watch import Watch

BFLOAT16 = {"dtype": torch.bfloat16}

OPTIONS = [
    {"all_kinds": True, "ns_steps": 5},
    {"all_kinds": True, "skip_nonfinite": True, "neuron_axis": "short"},
    {"nesterov": False},
    {"equilibrate": True},
    {"cautious_weight_decay": True},
    {"skip_nonfinite": True},
    {"maximize": True},
    {"momentum_dtype": torch.bfloat16},
    {"momentum_dtype": torch.int8, "all_kinds": True},
    {**BFLOAT16, "momentum_dtype": torch.int8, "skip_nonfinite": True, "nesterov": False},
    {"neuron_axis": "short"},
    {"adjust_lr_fn": "original"},
    {"algorithm": "muon"},
    {"algorithm": "muon", "adjust_lr_fn": "original", "skip_nonfinite": True},
    {"orthogonalizer": "newton_schulz"},
    {"orthogonalizer": "gram", "ns_coefficients": "polar_express"},
    {"orthogonalizer": "callable"},
    {"ns_dtype": torch.bfloat16},
    {"ns_dtype": torch.float16},
    {"max_scratch_bytes": 1},
    {"fused": False},
    {**BFLOAT16, "kahan_sum": True},
    {**BFLOAT16, "kahan_sum": True, "skip_nonfinite": True},
    {**BFLOAT16, "momentum_dtype": torch.float32},
    {"dtype": torch.float16, "kahan_sum": True},
    {"dtype": torch.float64},
    {
        **BFLOAT16,
        "kahan_sum": True,
        "skip_nonfinite": True,
        "cautious_weight_decay": True,
        "equilibrate": True,
        "maximize": True,
        "nesterov": False,
        "neuron_axis": "short",
        "lr": "device",
        "weight_decay": "device",
    },
]

SIDES = [
    *((how, None) for how in ("device", "host")),
    *((how, how) for how in ("device", "device of one dim", "host")),
    *(("device", "host"), ("host", "device"), (None, "host")),
]
SKIPPING = {"skip_nonfinite": True, "cautious_weight_decay": True}
COMPENSATED = {**BFLOAT16, "kahan_sum": True, "algorithm": "muon"}
NUMBERS = [{"lr": lr, "weight_decay": decay} for lr, decay in SIDES]


@pytest.mark.parametrize("case", OPTIONS, ids=str)
def test_no_option_makes_a_step_wait(on_accelerator, case):
    on_accelerator(cases.step_optimizer, case)


@pytest.mark.parametrize(
    "case", [*NUMBERS, *({**case, **SKIPPING} for case in NUMBERS[2:6])], ids=str
)
def test_learning_rate_and_decay_may_be_tensors_on_either_side(on_accelerator, case):
    on_accelerator(cases.step_optimizer, case)


def test_a_learning_rate_on_the_host_may_have_a_dim(on_accelerator):
    on_accelerator(cases.step_optimizer, {"lr": "host of one dim"})


def step_with_kernels(kernels, case):
    """Steps with AdamW's kernels of other devices; the fake one's are torch's multi-tensor ones."""
    given = adamw._kernels_for
    adamw._kernels_for = lambda *_, **__: kernels
    try:
        cases.step_optimizer(case)
    finally:
        adamw._kernels_for = given


@pytest.mark.parametrize(
    "case",
    [{}, NUMBERS[3], {**NUMBERS[4], **SKIPPING}, {**NUMBERS[0], **COMPENSATED}],
    ids=str,
)
@pytest.mark.parametrize("kernels", ["fused", "own"])
def test_no_kernels_of_adamw_make_a_step_wait(on_accelerator, kernels, case):
    on_accelerator(step_with_kernels, kernels, case)


def kernels_of_devices():
    """AdamW's kernels by device type, of those that torch knows without having them."""
    found = {}
    with FakeDevices():
        for device in ("cpu", NAME, "cuda", "xpu", "mps", "maia", "vulkan"):
            param, step = torch.empty(4, 4, device=device), torch.empty((), device=device)
            state = {"step": step, "exp_avg": param, "exp_avg_sq": param}
            grads = {"alike": param, "turned": param.mT}
            found[device] = [
                adamw._kernels_for(param, grad, state, has_tensor_lr=False)
                for grad in grads.values()
            ]
    return found


def test_adamws_kernels_are_those_that_read_nothing(on_accelerator):
    """A gradient laid out otherwise takes what walks no memory linearly.

    torch lists every backend that is made elsewhere as one with a fused kernel, which it may lack.
    """
    assert on_accelerator(kernels_of_devices) == {
        "cpu": ["fused", "torch"],
        NAME: ["torch", "torch"],
        "cuda": ["fused", "torch"],
        "xpu": ["fused", "torch"],
        "mps": ["fused", "own"],
        "maia": ["own", "own"],
        "vulkan": ["own", "own"],
    }


def step_with_missing_gradients(case):
    with cases.built(**case) as optimizer:
        cases.watch_steps(optimizer, missing=[(0, 2), (), (0, 2), (1, 2, 3), ()])


@pytest.mark.parametrize("case", [{}, {"skip_nonfinite": True}], ids=str)
def test_gradients_come_and_go_without_a_wait(on_accelerator, case):
    on_accelerator(step_with_missing_gradients, case)


def products_under_autocast():
    """The dtypes of a step's products and of one beside it, under autocast."""
    with cases.built(ns_dtype=torch.float32) as optimizer, autocast():
        step = cases.watch_steps(optimizer)[-1].product_dtypes
        with Watch() as watch:
            matrix = torch.empty(4, 4, device=NAME)
            _ = matrix @ matrix
    return step, watch.product_dtypes


def test_autocast_rounds_no_product_of_a_step(on_accelerator):
    """A backend that has no autocast steps too: that is the fake device in all other tests."""
    step, beside = on_accelerator(products_under_autocast)
    assert step == {torch.float32}
    assert beside == {torch.bfloat16}
