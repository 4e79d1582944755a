"""Every option out of range and every parameter that cannot be trained: one clear message each."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(
        torch.zeros(shape or (4, 3), dtype=dtype), requires_grad=dtype.is_floating_point
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr=-0.001 must be a number, at least 0 and finite"),
        ({"lr": math.nan}, "lr=nan must be a number, at least 0 and finite"),
        ({"lr": math.inf}, "lr=inf must be a number, at least 0 and finite"),
        ({"lr": "fast"}, "lr='fast' must be a number, at least 0 and finite"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element, but it has 2 elements"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be a number, at least 0 and finite"),
        ({"momentum": 1.0}, "momentum=1.0 must be a number, at least 0 and below 1"),
        ({"momentum": -0.1}, "momentum=-0.1 must be a number, at least 0 and below 1"),
        ({"beta2": 1.5}, "beta2=1.5 must be a number, at least 0 and below 1"),
        ({"eps": -1e-8}, "eps=-1e-08 must be a number, at least 0 and finite"),
        ({"adamw_eps": None}, "adamw_eps=None must be a number, at least 0 and finite"),
        ({"betas": (0.9,)}, "betas=(0.9,) must be two numbers, AdamW's (beta1, beta2)"),
        ({"betas": (0.9, 1.0)}, "betas[1]=1.0 must be a number, at least 0 and below 1"),
        ({"ns_steps": 0}, "ns_steps=0 must be an integer from 1 to 99"),
        ({"ns_steps": 5.0}, "ns_steps=5.0 must be an integer from 1 to 99"),
        ({"ns_steps": 100}, "ns_steps=100 must be an integer from 1 to 99"),
        (
            {"ns_coefficients": "you", "ns_steps": 4},
            "ns_coefficients='you' is a table for ns_steps=5, not 4",
        ),
        (
            {"ns_coefficients": "svd"},
            "ns_coefficients='svd' is not a known table; choose from 'jordan', 'polar_express', "
            "'you', 'cans'",
        ),
        (
            {"adjust_lr_fn": "none"},
            "adjust_lr_fn='none' is not known; choose from 'match_rms_adamw', 'original'",
        ),
        (
            {"neuron_axis": "column"},
            "neuron_axis='column' is not known; choose from 'row', 'short'",
        ),
        (
            {"orthogonalizer": "svd"},
            "orthogonalizer='svd' is not known; choose from 'auto', 'newton_schulz', 'gram' or a "
            "callable",
        ),
        (
            {"ns_dtype": torch.int8},
            "ns_dtype=torch.int8 is not known; choose from torch.bfloat16, torch.float16, "
            "torch.float32, torch.float64 or None",
        ),
        (
            {"momentum_dtype": "bf16"},
            "momentum_dtype='bf16' is not known; choose from torch.bfloat16, torch.float16, "
            "torch.float32, torch.float64, torch.int8 or None",
        ),
        ({"nesterov": 1}, "nesterov=1 must be True or False"),
        ({"equilibrate": "rows"}, "equilibrate='rows' must be True or False"),
        ({"skip_nonfinite": "yes"}, "skip_nonfinite='yes' must be True or False"),
        ({"max_scratch_bytes": 0}, "max_scratch_bytes=0 must be a number, at least 1 and finite"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("where", ["constructor", "group"])
def test_an_option_out_of_range_is_refused(options, message, where):
    """The message names the option, its value and what is allowed."""
    group = {} if where == "constructor" else options
    everywhere = options if where == "constructor" else {}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        NorMuon([{"params": [matrix()], **group}], **everywhere)


@pytest.mark.parametrize(
    ("param", "group", "message"),
    [
        (
            matrix(5),
            {},
            "w [5]: a 'normuon' group takes matrices, but this parameter has 1 dim(s); put it in a "
            "group with 'algorithm': 'adamw', or let normuon.param_groups(model) decide",
        ),
        (
            nn.Parameter(torch.zeros(())),
            {"algorithm": "muon"},
            "w []: a 'muon' group takes matrices, but this parameter has 0 dim(s); put it in a "
            "group with 'algorithm': 'adamw', or let normuon.param_groups(model) decide",
        ),
        (
            matrix(4, 3, 5, 5),
            {},
            "w [4, 3, 5, 5]: 4 dims may be a convolution or a batch of experts; put 'view': "
            "MatrixView.conv() or MatrixView.experts() into its group, or let "
            "normuon.param_groups(model) decide",
        ),
        (
            matrix(9, 4),
            {"view": MatrixView.fused(4, 4)},
            "w [9, 4]: the group's view does not fit: blocks=(4, 4) sum to 8, but dim 0 has 9",
        ),
        (matrix(), {"view": "conv"}, "view='conv' must be a normuon.MatrixView"),
        (
            matrix(),
            {"algorithm": "sgd"},
            "algorithm='sgd' is not known; choose from 'normuon', 'muon', 'adamw'",
        ),
        (
            nn.Parameter(torch.zeros(4, 3, dtype=torch.complex64)),
            {},
            "w [4, 3]: complex parameters are not supported; optimise torch.view_as_real of it "
            "with another optimizer",
        ),
        (
            matrix(dtype=torch.int32),
            {"algorithm": "adamw"},
            "w [4, 3]: torch.int32 parameters cannot be optimised",
        ),
        (
            torch.zeros(4, 3).to_sparse().requires_grad_(),
            {},
            "w [4, 3]: sparse parameters (torch.sparse_coo) are not supported",
        ),
    ],
)
def test_a_parameter_its_group_cannot_train_is_refused(param, group, message):
    """The message names the parameter, its shape and the mend; nothing is added."""
    optimizer = NorMuon([("first", matrix())])
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        optimizer.add_param_group({"params": [("w", param)], **group})
    assert len(optimizer.param_groups) == 1
    assert len(optimizer.state) == 1


def test_a_parameter_without_a_name_is_named_by_its_place():
    with pytest.raises(ValueError, match=r"^params\[1\] of a 'normuon' group \[7\]: a 'normuon'"):
        NorMuon([matrix(), matrix(7)])


def test_sparse_gradients_are_refused_by_name():
    embedding = nn.Embedding(9, 4, sparse=True)
    optimizer = NorMuon([{"params": [("table", embedding.weight)], "algorithm": "adamw"}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"^table \[9, 4\]: sparse gradients are not supported"):
        optimizer.step()


def test_an_option_that_shapes_the_state_cannot_change_later():
    weight = matrix(3, 5)
    optimizer = NorMuon([("w", weight)])
    optimizer.param_groups[0]["neuron_axis"] = "short"
    weight.grad = torch.ones(3, 5)
    message = r"^w \[3, 5\]: its 'second_momentum_buffer' has shape \[3\], but neuron_axis='short'"
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("algorithm", "options", "message"),
    [
        ("adamw", {"eps": 1e-6}, "'eps' does nothing in a group .*; use 'adamw_eps' there"),
        ("adamw", {"momentum": 0.9}, "'momentum' does nothing .*; use 'betas' there"),
        ("adamw", {"amsgrad": True}, "amsgrad is not supported: leave it out"),
        ("normuon", {"betas": (0.9, 0.99)}, "'betas' does nothing .*; use 'beta2' there"),
        ("normuon", {"learning_rate": 1e-3}, "'learning_rate' .*; did you mean 'lr'"),
        ("muon", {"wd": 0.1}, "'wd' .*; did you mean 'weight_decay'"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        NorMuon([{"params": [matrix()], "algorithm": algorithm, **options}])


def test_keys_of_schedulers_and_frameworks_are_allowed():
    keys = {"initial_lr": 1e-3, "max_lr": 1, "min_lr": 0, "name": "hidden", "amsgrad": False}
    NorMuon([{"params": [matrix()], **keys, "fused": None, "max_momentum": 0.95}])
