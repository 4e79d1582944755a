"""Every option out of range and every parameter that cannot be trained: one clear message each."""

from __future__ import annotations

import io
import math
import re

import numpy as np
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
            "adjust_lr_fn='none' is not known; choose from 'match_rms_adamw', 'original', "
            "'spectral_unclamped'",
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


def stepped():
    """An optimizer of one matrix group and one `adamw` group after a step, gradients set anew."""
    params = [matrix(4, 3), matrix(3, 5), nn.Parameter(torch.zeros(3))]
    optimizer = NorMuon(
        [
            {"params": [("first", params[0])]},
            {"params": [("second", params[1])]},
            {"params": [("bias", params[2])], "algorithm": "adamw"},
        ],
        lr=0.01,
    )
    for _ in range(2):
        for number, param in enumerate(params):
            torch.manual_seed(number)
            param.grad = torch.randn(param.shape)
        if not optimizer.state[params[0]]["momentum_buffer"].any():
            optimizer.step()
    return params, optimizer


def held(params, optimizer):
    return [
        tensor.clone()
        for param in params
        for tensor in (param.detach(), *optimizer.state[param].values())
    ]


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (1, {"adjust_lr_fn": "Original"}, "adjust_lr_fn='Original' is not known"),
        (1, {"neuron_axis": "columns"}, "neuron_axis='columns' is not known"),
        (1, {"algorithm": "adam"}, "algorithm='adam' is not known"),
        (1, {"orthogonalizer": "svd"}, "orthogonalizer='svd' is not known"),
        (1, {"ns_backend": "fast"}, "ns_backend='fast' is not known"),
        (1, {"equilibrate": 1}, "equilibrate=1 must be True or False"),
        (1, {"momentum": 1.5}, "momentum=1.5 must be a number, at least 0 and below 1"),
        (1, {"beta2": None}, "beta2=None must be a number, at least 0 and below 1"),
        (1, {"lr": "fast"}, "lr='fast' must be a number, finite"),
        (1, {"lr": torch.ones(2)}, "Tensor lr must be 1-element, but it has 2 elements"),
        (1, {"ns_steps": 0}, "ns_steps=0 must be an integer from 1 to 99"),
        (1, {"ns_coefficients": "you", "ns_steps": 4}, "ns_coefficients='you' is a table for"),
        (1, {"view": "conv"}, "view='conv' must be a normuon.MatrixView"),
        (2, {"betas": (0.9,)}, "betas=(0.9,) must be two numbers"),
        (2, {"weight_decay": None}, "weight_decay=None must be a number"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_option_set_out_of_range_later_is_refused_before_anything_moves(
    number, options, message
):
    """Groups are read at every step; the group before the faulty one must not be stepped."""
    params, optimizer = stepped()
    optimizer.param_groups[number].update(options)
    before = held(params, optimizer)
    with pytest.raises(ValueError, match=rf"^param_groups\[{number}\]: {re.escape(message)}"):
        optimizer.step()
    assert all(map(torch.equal, before, held(params, optimizer)))


@pytest.mark.parametrize(
    ("number", "options", "message"),
    [
        (1, {"fused": True}, r"^second \[3, 5\]: fused=True, but Triton kernels run on CUDA"),
        (1, {"algorithm": "adamw"}, r"^second \[3, 5\]: its state has \['momentum_buffer', "),
        (2, {"algorithm": "normuon"}, r"^bias \[3\]: its state has \['exp_avg', "),
    ],
)
def test_an_option_that_a_parameter_cannot_follow_is_refused_before_anything_moves(
    number, options, message
):
    params, optimizer = stepped()
    optimizer.param_groups[number].update(options)
    before = held(params, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(map(torch.equal, before, held(params, optimizer)))


@pytest.mark.parametrize(
    ("number", "options"), [(0, {"adjust_lr_fn": "Original"}), (2, {"betas": None})]
)
def test_a_checkpoint_with_an_option_out_of_range_is_refused(number, options):
    params, optimizer = stepped()
    saved = optimizer.state_dict()
    saved["param_groups"][number].update(options)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    before = held(params, optimizer)
    with pytest.raises(ValueError, match=rf"^param_groups\[{number}\]: {next(iter(options))}="):
        optimizer.load_state_dict(saved)
    assert all(map(torch.equal, before, held(params, optimizer)))
    assert groups == [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def test_a_learning_rate_that_a_scheduler_rounds_below_zero_is_taken():
    params, optimizer = stepped()
    optimizer.param_groups[0]["lr"] = -1e-19
    optimizer.step()
    assert params[0].isfinite().all()


NUMBERS = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, "beta2": 0.5, "eps": 1e-8}


@pytest.mark.parametrize(
    "form",
    [
        lambda value: torch.tensor(value),
        lambda value: torch.tensor([value]),
        lambda value: nn.Parameter(torch.tensor(value)),
        np.float64,
        np.float32,
    ],
    ids=["tensor", "one element", "parameter", "float64", "float32"],
)
@pytest.mark.parametrize("name", [*NUMBERS, "adamw_eps", "betas"])
@pytest.mark.parametrize("later", [False, True])
def test_every_number_may_be_a_tensor_or_numpys(name, form, later):
    """A kernel that refused one would leave the momentum advanced and the weights unmoved."""
    value = (form(0.9), form(0.95)) if name == "betas" else form(NUMBERS.get(name, 1e-8))
    usual = {**NUMBERS, "adamw_eps": 1e-8, "betas": (0.9, 0.95)}
    expected, reference = setup_of(usual)
    params, optimizer = setup_of(usual if later else {**usual, name: value})
    for _ in range(2):
        if later:
            for group in optimizer.param_groups:
                group[name] = value
        reference.step()
        optimizer.step()
    for one, two in zip(params, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)  # float32(0.95) is not 0.95.
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def setup_of(options):
    params = [nn.Parameter(torch.arange(12.0).reshape(4, 3)), nn.Parameter(torch.ones(3))]
    groups = [{"params": params[:1]}, {"params": params[1:], "algorithm": "adamw"}]
    for param in params:
        param.grad = torch.sin(param.detach())
    return params, NorMuon(groups, **options)


def test_what_is_no_process_group_is_refused():
    with pytest.raises(ValueError, match=r"^process_group='world' must be a torch\.distributed"):
        NorMuon([matrix()], process_group="world")


def test_an_orthogonalizer_that_returns_nothing_is_named():
    param = matrix()
    param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=r"^orthogonalizer returned NoneType for an input of"):
        NorMuon([param], orthogonalizer=lambda x: None).step()
