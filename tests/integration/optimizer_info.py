"""NorMuon as an entry of PyTorch's own optimizer inventory, and the problem its tests train.

An entry is an `OptimizerInfo`: constructor inputs, error inputs, schedulers. PyTorch's inventory
writes inputs without parameters; here ``OptimizerInput.params`` may hold group templates, dicts
without ``"params"``, over which `make_optimizer` deals the matrices out in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim import lr_scheduler as lrs
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    _get_optim_inputs_including_global_cliquey_kwargs,
    get_error_inputs_for_all_optims,
)
from torch.testing._internal.common_utils import TestCase

from normuon import NorMuon

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def polar_factor(x_BMN: Tensor) -> Tensor:
    """An orthogonaliser of the user's own; at module level, so that it pickles."""
    u, _, vh = torch.linalg.svd(x_BMN.float(), full_matrices=False)
    return (u @ vh).to(x_BMN.dtype)


def normuon_optim_inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """Every option of the constructor, and every algorithm, in the form PyTorch's tests take."""
    triple = (3.4445, -4.7750, 2.0315)
    options: dict[str, dict[str, Any]] = {
        "default": {},
        "lr": {"lr": 0.01},
        "tensor-lr": {"lr": torch.tensor(0.001)},
        "one-element-tensor-lr": {"lr": torch.tensor([0.001])},
        "no-weight-decay": {"weight_decay": 0.0},
        "large-weight-decay": {"weight_decay": 0.9},
        "no-nesterov": {"nesterov": False, "momentum": 0.8},
        "no-memory": {"momentum": 0.0, "beta2": 0.0},
        "original-scaling": {"adjust_lr_fn": "original", "lr": 0.02},
        "short-axis": {"neuron_axis": "short"},
        "polar-express": {"ns_coefficients": "polar_express", "ns_steps": 8},
        "one-triple": {"ns_coefficients": triple, "ns_steps": 6},
        "triple-per-step": {"ns_coefficients": (triple, triple), "ns_steps": 2},
        "callable-orthogonalizer": {"orthogonalizer": polar_factor},
        "ns-bfloat16": {"ns_dtype": torch.bfloat16},
        "ns-float32": {"ns_dtype": torch.float32},
        "ns-float64": {"ns_dtype": torch.float64},
        "bfloat16-momentum": {"momentum_dtype": torch.bfloat16},
        "float64-momentum": {"momentum_dtype": torch.float64},
        "equilibrated": {"equilibrate": True},
        "cautious": {"cautious_weight_decay": True},
        "skip-nonfinite": {"skip_nonfinite": True},
        "maximize": {"maximize": True},
        "kahan-sum": {"kahan_sum": True},
        "maximize-weight-decay": {"maximize": True, "weight_decay": 0.2},
        "one-matrix-at-a-time": {"max_scratch_bytes": 1},
    }
    templates: dict[str, list[dict[str, Any]]] = {
        "muon": [{"algorithm": "muon"}],
        "muon-original": [{"algorithm": "muon", "adjust_lr_fn": "original", "lr": 0.02}],
        "muon-skip-nonfinite": [{"algorithm": "muon", "skip_nonfinite": True}],
        "adamw": [{"algorithm": "adamw"}],
        "adamw-skip-nonfinite": [{"algorithm": "adamw", "skip_nonfinite": True}],
        "mixed": [
            {"algorithm": "normuon", "lr": 0.002},
            {"algorithm": "muon", "weight_decay": 0.0},
            {"algorithm": "adamw", "betas": (0.8, 0.9)},
        ],
    }
    inputs = [OptimizerInput(params=None, kwargs=kw, desc=desc) for desc, kw in options.items()]
    inputs += [OptimizerInput(params=t, kwargs={}, desc=desc) for desc, t in templates.items()]
    return inputs


def normuon_error_inputs(device: str, dtype: torch.dtype) -> list[ErrorOptimizerInput]:
    """The errors PyTorch asks of every optimizer, and this one's own."""
    wrong_options: list[tuple[dict[str, Any], str]] = [
        ({"lr": -1e-3}, "lr=-0.001 must be a number, at least 0"),
        ({"lr": float("nan")}, "lr=nan must be a number"),
        ({"weight_decay": -1}, "weight_decay=-1 must be"),
        ({"momentum": 1.0}, "momentum=1.0 must be a number, at least 0 and below 1"),
        ({"momentum": -0.5}, "momentum=-0.5 must be"),
        ({"beta2": 1.0}, "beta2=1.0 must be"),
        ({"betas": (1.0, 0.0)}, r"betas\[0\]=1.0 must be"),
        ({"betas": 0.9}, "betas=0.9 must be two numbers"),
        ({"eps": -1e-8}, "eps=-1e-08 must be"),
        ({"adamw_eps": -1e-8}, "adamw_eps=-1e-08 must be"),
        ({"ns_steps": 0}, "ns_steps=0 must be an integer"),
        ({"ns_steps": 100}, "ns_steps=100 must be an integer"),
        ({"ns_coefficients": "newton"}, "ns_coefficients='newton' is not a known table"),
        ({"ns_coefficients": "you", "ns_steps": 3}, "is a table for ns_steps=5, not 3"),
        ({"adjust_lr_fn": "arbitrary"}, "adjust_lr_fn='arbitrary' is not known"),
        ({"neuron_axis": "long"}, "neuron_axis='long' is not known"),
        ({"orthogonalizer": "magic"}, "orthogonalizer='magic' is not known"),
        ({"ns_dtype": torch.int32}, "ns_dtype=torch.int32 is not known"),
        ({"momentum_dtype": torch.int32}, "momentum_dtype=torch.int32 is not known"),
        ({"maximize": 1}, "maximize=1 must be True or False"),
        ({"max_scratch_bytes": 0}, "max_scratch_bytes=0 must be"),
    ]
    matrix = torch.ones(2, 3, device=device, dtype=dtype)
    wrong_params: list[tuple[str, Any, str]] = [
        ("no params", [], "empty parameter list"),
        ("1-D", [torch.ones(3, device=device)], "put it in a group with 'algorithm': 'adamw'"),
        ("3-D without a view", [torch.ones(2, 3, 4, device=device)], "MatrixView.conv"),
        ("complex", [matrix.to(torch.complex64)], "complex parameters are not supported"),
        ("integer", [matrix.int()], "torch.int32 parameters cannot be optimised"),
        ("sparse", [matrix.to_sparse()], "sparse parameters"),
        ("non-leaf", [matrix.clone().requires_grad_() * 2], "can't optimize a non-leaf Tensor"),
        ("algorithm", [{"params": [matrix], "algorithm": "sgd"}], "algorithm='sgd' is not known"),
        ("view", [{"params": [matrix], "view": "conv"}], "must be a normuon.MatrixView"),
    ]
    sparse_grad = torch.ones(2, 3, device=device, dtype=dtype, requires_grad=True)
    sparse_grad.grad = torch.ones_like(sparse_grad).to_sparse()
    return [
        *get_error_inputs_for_all_optims(device, dtype),
        *(
            ErrorOptimizerInput(
                OptimizerInput(params=None, kwargs=kwargs, desc=str(kwargs)),
                error_type=ValueError,
                error_regex=regex,
            )
            for kwargs, regex in wrong_options
        ),
        *(
            ErrorOptimizerInput(
                OptimizerInput(params=params, kwargs={}, desc=desc),
                error_type=ValueError,
                error_regex=regex,
            )
            for desc, params, regex in wrong_params
        ),
        ErrorOptimizerInput(
            OptimizerInput(params=[sparse_grad], kwargs={}, desc="sparse gradient"),
            error_on=OptimizerErrorEnum.STEP_ERROR,
            error_type=RuntimeError,
            error_regex="sparse gradients are not supported",
        ),
    ]


SCHEDULERS: dict[str, list[Callable[[Optimizer], Any]]] = {
    "step": [lambda opt: lrs.StepLR(opt, gamma=0.9, step_size=10)],
    "multi-step": [lambda opt: lrs.MultiStepLR(opt, milestones=[3, 9], gamma=0.5)],
    "multiplicative": [lambda opt: lrs.MultiplicativeLR(opt, lambda epoch: 0.97)],
    "lambda": [lambda opt: lrs.LambdaLR(opt, lambda epoch: 0.95**epoch)],
    "constant": [lambda opt: lrs.ConstantLR(opt, factor=0.4, total_iters=4)],
    "linear": [lambda opt: lrs.LinearLR(opt, start_factor=0.4, total_iters=4)],
    "exponential": [lambda opt: lrs.ExponentialLR(opt, gamma=0.9)],
    "polynomial": [lambda opt: lrs.PolynomialLR(opt, total_iters=30, power=0.9)],
    "cosine": [lambda opt: lrs.CosineAnnealingLR(opt, T_max=30)],
    "cosine-restarts": [lambda opt: lrs.CosineAnnealingWarmRestarts(opt, T_0=7)],
    "plateau": [lambda opt: lrs.ReduceLROnPlateau(opt, patience=1)],
    "one-cycle": [lambda opt: lrs.OneCycleLR(opt, max_lr=0.01, total_steps=30)],
    "cyclic": [lambda opt: lrs.CyclicLR(opt, base_lr=1e-4, max_lr=0.01, step_size_up=5)],
    "sequential": [
        lambda opt: lrs.SequentialLR(
            opt,
            [lrs.LinearLR(opt, total_iters=5), lrs.CosineAnnealingLR(opt, T_max=25)],
            milestones=[5],
        )
    ],
    "chained": [
        lambda opt: lrs.ChainedScheduler(
            [lrs.ConstantLR(opt, total_iters=4), lrs.ExponentialLR(opt, gamma=0.9)]
        )
    ],
    "swa": [lambda opt: torch.optim.swa_utils.SWALR(opt, swa_lr=5e-4, anneal_epochs=5)],
    "step-and-plateau": [
        lambda opt: lrs.StepLR(opt, gamma=0.9, step_size=10),
        lambda opt: lrs.ReduceLROnPlateau(opt),
    ],
}

NORMUON = OptimizerInfo(
    NorMuon,
    optim_inputs_func=normuon_optim_inputs,
    optim_error_inputs_func=normuon_error_inputs,
    scheduler_inputs=tuple(SCHEDULERS.values()),
    supported_impls=(),
    not_og_supported_flags=("maximize", "skip_nonfinite", "momentum_dtype", "neuron_axis"),
    supports_complex=False,
)

TESTCASE = TestCase("run")
"""PyTorch's own comparisons: of state dicts with texts and dtypes in them, of tensor trackers."""

INPUTS = [entry.desc for entry in normuon_optim_inputs("cpu")]

KINDS = ["default", "tensor-lr", "maximize", "skip-nonfinite", "muon", "adamw", "mixed"]
"""One input of each kind, for what depends on no other option."""


def optim_input(desc: str, device: str = "cpu") -> OptimizerInput:
    """The input of this name, afresh: schedulers write into tensor learning rates."""
    inputs = _get_optim_inputs_including_global_cliquey_kwargs(device, None, NORMUON)
    return next(entry for entry in inputs if entry.desc == desc)


class Problem:
    """Two tall matrices, a wide one and a bias on convex quadratics, ``|W x + b|^2``."""

    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(1)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        self.tall, self.twin = Parameter(normal(10, 5)), Parameter(normal(10, 5))
        self.wide, self.bias = Parameter(normal(5, 10)), Parameter(normal(10))
        self.inputs_5, self.inputs_10 = normal(5), normal(10)

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """The parameters and their names, in order."""
        return [(name, getattr(self, name)) for name in ("tall", "wide", "twin", "bias")]

    @property
    def params(self) -> list[Tensor]:
        """The parameters, in order."""
        return [param for _, param in self.named]

    def copy(self) -> Problem:
        """The same values in new tensors, without gradients."""
        other = deepcopy(self)
        for param in other.params:
            param.grad = None
        return other

    def loss(self) -> Tensor:
        """What there is to minimise."""
        tall, twin = self.tall.mv(self.inputs_5) + self.bias, self.twin.mv(self.inputs_5)
        return tall.square().sum() + twin.square().sum() + self.wide.mv(self.inputs_10).norm() ** 2

    def backward(self) -> Tensor:
        """Fresh gradients, and the loss."""
        for param in self.params:
            param.grad = None
        loss = self.loss()
        loss.backward()
        return loss

    def random_grads(self, seed: int) -> None:
        """Gradients of full rank from a seed."""
        generator = torch.Generator().manual_seed(seed)
        for param in self.params:
            grad = torch.randn(param.shape, generator=generator, dtype=torch.float32)
            param.grad = grad.to(param)


def make_optimizer(
    entry: OptimizerInput,
    params: Sequence[Tensor] | Sequence[tuple[str, Tensor]],
    **overrides: Any,
) -> NorMuon:
    """Builds NorMuon on any parameters: vectors go to an `adamw` group, matrices to the others."""
    templates = [{**template, **overrides} for template in entry.params or [{}]]
    groups: list[list[Any]] = [[] for _ in templates]
    vectors: list[Any] = []
    for item in params:
        tensor = item[1] if isinstance(item, tuple) else item
        dealt = sum(map(len, groups))
        (groups[dealt % len(groups)] if tensor.ndim > 1 else vectors).append(item)
    param_groups = [{**t, "params": g} for t, g in zip(templates, groups, strict=True) if g]
    if vectors:
        adamw = {"algorithm": "adamw", "cautious_weight_decay": False, "params": vectors}
        param_groups.append({**templates[-1], **adamw})
    return NorMuon(param_groups, **{**entry.kwargs, **overrides})


def ascends(entry: OptimizerInput) -> bool:
    """Whether the input maximises."""
    return bool(entry.kwargs.get("maximize", False))


def assert_bitwise(actual: Any, expected: Any) -> None:
    """Asserts equal values without any tolerance, in nested containers of any types too."""
    TESTCASE.assertEqual(actual, expected, rtol=0, atol=0)  # noqa: PT009
