"""`momentum_dtype=torch.int8`: the state it keeps, what it leaves alone, and ways in and out."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon, convert_state
from normuon.models.blocks import block_grid
from normuon.state import follow_param_
from normuon.step.int8 import decoded

INT8 = {"momentum_dtype": torch.int8}
KEYS = {"momentum_codes", "momentum_absmax", "momentum_roundings"}


def made(shapes=((24, 300), (130, 17)), *, dtype=torch.float32, group=(), **options):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    return params, NorMuon([{"params": params, **dict(group)}], lr=1e-2, **options)


def train(params, optimizer, steps):
    for step in steps:
        for number, param in enumerate(params):
            generator = torch.Generator().manual_seed(100 * step + number)
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def contents(params, optimizer):
    return [
        {"weight": p.detach().clone(), **{k: v.clone() for k, v in optimizer.state[p].items()}}
        for p in params
    ]


def equal(first, second):
    return all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(first, second, strict=True)
    )


def momentum_of(param, optimizer):
    state = optimizer.state[param]
    grid = block_grid(MatrixView.linear(), tuple(param.shape))
    return decoded(state["momentum_codes"], state["momentum_absmax"], grid)


def state_bytes(optimizer, param):
    tensors = optimizer.state[param].values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_a_quarter_of_the_memory():
    """A code each, four bytes for every 128 of them, four for every neuron and for the count."""
    (param,), optimizer = made([(256, 1024)], **INT8)
    assert state_bytes(optimizer, param) == 256 * 1024 * (1 + 4 / 128) + 256 * 4 + 4
    (other,), plain = made([(256, 1024)])
    assert state_bytes(plain, other) == 256 * 1024 * 4 + 256 * 4


@pytest.mark.parametrize("algorithm", ["normuon", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_first_steps_are_those_of_a_float_momentum(dtype, algorithm):
    """The first to rounding, since what is orthogonalised has not been coded yet."""
    # In bfloat16 one rounding of the direction would be 1% of a step.
    group = {"algorithm": algorithm, "ns_dtype": torch.promote_types(dtype, torch.float32)}
    plain, one = made(dtype=dtype, group=group, momentum_dtype=torch.float32)
    coded, two = made(dtype=dtype, group=group, **INT8)
    start = plain[0].detach().clone()
    train(plain, one, range(1))
    train(coded, two, range(1))
    torch.testing.assert_close(plain[0], coded[0], rtol=0, atol=1e-6)
    train(plain, one, range(1, 5))
    train(coded, two, range(1, 5))
    moved = (plain[0] - start).double().norm()
    # Roundings of 1% of a momentum's size, some of which small singular values magnify.
    assert (plain[0] - coded[0]).double().norm() < 0.15 * moved
    for param, other in zip(plain, coded, strict=True):
        held = one.state[param]["momentum_buffer"].double()
        error = (momentum_of(other, two).double() - held).norm() / held.norm()
        assert 1e-4 < error < 0.03


@pytest.mark.parametrize(
    "view",
    [None, MatrixView.transposed(), MatrixView.fused(12, 6, 6), MatrixView(heads=4)],
    ids=str,
)
def test_no_matrix_knows_of_the_others(view):
    """A parameter's matrices are coded as if each was a parameter."""
    shapes = [(24, 300), (24, 300)]
    both, optimizer = made(shapes, group={"view": view}, **INT8)
    train(both, optimizer, range(3))
    generator = torch.Generator().manual_seed(0)
    torch.randn(shapes[0], generator=generator)
    alone = nn.Parameter(torch.randn(shapes[1], generator=generator))
    single = NorMuon([{"params": [alone], "view": view}], lr=1e-2, **INT8)
    for step in range(3):
        grad = torch.randn(shapes[1], generator=torch.Generator().manual_seed(100 * step + 1))
        alone.grad = grad
        single.step()
    assert equal(contents([alone], single), contents(both[1:], optimizer))


def test_a_split_view_codes_as_separate_parameters_do():
    view, sizes = MatrixView.fused(140, 40, 40, neuron_dim=1), (140, 40, 40)
    (fused,), optimizer = made([(18, 220)], group={"view": view}, **INT8)
    parts = [nn.Parameter(part.clone()) for part in fused.detach().split(sizes, 1)]
    apart = NorMuon([{"params": parts, "view": MatrixView.transposed()}], lr=1e-2, **INT8)
    for step in range(3):
        fused.grad = torch.randn(18, 220, generator=torch.Generator().manual_seed(step))
        for part, grad in zip(parts, fused.grad.split(sizes, 1), strict=True):
            part.grad = grad.contiguous()
        optimizer.step()
        apart.step()
    assert torch.equal(fused, torch.cat(parts, 1))
    codes = torch.cat([apart.state[part]["momentum_codes"] for part in parts], 1)
    assert torch.equal(optimizer.state[fused]["momentum_codes"], codes)
    maxima = torch.cat([apart.state[part]["momentum_absmax"] for part in parts], 1)
    assert torch.equal(optimizer.state[fused]["momentum_absmax"], maxima)


def test_maximize_is_the_step_of_the_negative_gradient():
    up, one = made(maximize=True, weight_decay=0.0, **INT8)
    down, two = made(weight_decay=0.0, **INT8)
    for step in range(3):
        for a, b in zip(up, down, strict=True):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(step))
            b.grad = -a.grad
        one.step()
        two.step()
    assert equal(contents(up, one), contents(down, two))


def test_a_poisoned_expert_keeps_its_codes_and_stops_no_other():
    experts = {"view": MatrixView.experts()}
    (param,), optimizer = made([(3, 8, 140)], group=experts, skip_nonfinite=True, **INT8)
    train([param], optimizer, range(2))
    before = contents([param], optimizer)[0]
    param.grad = torch.randn(param.shape)
    param.grad[1, 0, 0] = float("nan")
    optimizer.step()
    after = contents([param], optimizer)[0]
    for key in ("weight", "momentum_codes", "momentum_absmax", "momentum_roundings"):
        assert torch.equal(before[key][1], after[key][1]), key
        assert not torch.equal(before[key][0], after[key][0]), key
    assert after["momentum_roundings"].tolist() == [3, 2, 3]


def test_without_skipping_what_is_not_finite_shows():
    (param,), optimizer = made([(4, 300)], **INT8)
    train([param], optimizer, range(1))
    param.grad[0, 0] = float("inf")
    optimizer.step()
    assert not torch.isfinite(param).all()
    assert not torch.isfinite(momentum_of(param, optimizer)).all()


def test_a_zero_gradient_is_a_zero_step():
    (param,), optimizer = made([(4, 300)], weight_decay=0.0, **INT8)
    before = param.detach().clone()
    for _ in range(3):
        param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(param, before)


@pytest.mark.parametrize("scratch", [1, 10**6])
def test_scratch_changes_no_bit(scratch):
    params, optimizer = made([(24, 300)] * 3, **INT8)
    others, other = made([(24, 300)] * 3, max_scratch_bytes=scratch, **INT8)
    train(params, optimizer, range(3))
    train(others, other, range(3))
    codes = zip(contents(params, optimizer), contents(others, other), strict=True)
    assert all(torch.equal(a["momentum_codes"], b["momentum_codes"]) for a, b in codes)


# In and out.


def test_a_saved_run_goes_on_bit_by_bit():
    params, optimizer = made(**INT8)
    train(params, optimizer, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    weights = [param.detach().clone() for param in params]
    train(params, optimizer, range(3, 6))
    file.seek(0)
    others, other = made(**INT8)
    other.load_state_dict(torch.load(file, weights_only=True))
    with torch.no_grad():
        for param, weight in zip(others, weights, strict=True):
            param.copy_(weight)
    assert other.param_groups[0]["momentum_dtype"] == torch.int8
    train(others, other, range(3, 6))
    assert equal(contents(params, optimizer), contents(others, other))


def test_a_copy_steps_as_the_original():
    params, optimizer = made(**INT8)
    train(params, optimizer, range(2))
    copies, copied = copy.deepcopy((params, optimizer))
    train(params, optimizer, range(2, 4))
    train(copies, copied, range(2, 4))
    assert equal(contents(params, optimizer), contents(copies, copied))


@pytest.mark.parametrize("way", ["convert_state", "set in place", "load_state_dict"])
def test_a_run_turns_to_codes_and_back(way):
    params, optimizer = made()
    train(params, optimizer, range(3))
    exact = optimizer.state[params[0]]["momentum_buffer"].clone()
    v = optimizer.state[params[0]]["second_momentum_buffer"].clone()
    for dtype in (torch.int8, None):
        if way == "set in place":
            optimizer.param_groups[0]["momentum_dtype"] = dtype
            for param in params:
                assert follow_param_(optimizer.state[param], param, optimizer.param_groups[0])
            new = optimizer
        else:
            new = NorMuon(params, lr=1e-2, momentum_dtype=dtype)
            saved = convert_state(optimizer, to=new, quiet=True)
            if way == "load_state_dict":
                saved = optimizer.state_dict()
                del saved["param_groups"][0]["momentum_dtype"]
            new.load_state_dict(saved)
        state = new.state[params[0]]
        assert torch.equal(state["second_momentum_buffer"], v)
        assert (KEYS & state.keys()) == (KEYS if dtype else set())
        assert ("momentum_buffer" in state) == (dtype is None)
        kept = momentum_of(params[0], new) if dtype else state["momentum_buffer"]
        # To the nearest: half of a 127th of a block's largest, for which the whole's stands.
        assert (kept - exact).abs().max() <= exact.abs().max() / 253
        optimizer = new
    train(params, optimizer, range(3, 4))


def test_a_saved_momentum_dtype_wins_as_every_saved_option_does():
    params, optimizer = made()
    train(params, optimizer, range(1))
    _, coded = made(**INT8)
    coded.load_state_dict(optimizer.state_dict())
    assert coded.param_groups[0]["momentum_dtype"] is None
    assert "momentum_buffer" in coded.state[coded.param_groups[0]["params"][0]]


def test_codes_of_another_shape_are_refused():
    _, optimizer = made([(24, 300)], **INT8)
    saved = optimizer.state_dict()
    _, other = made([(24, 200)], **INT8)
    with pytest.raises(ValueError, match=r"'momentum_codes' has shape \[24, 300\], but this"):
        other.load_state_dict(saved)


def test_from_adamw_to_codes():
    param = nn.Parameter(torch.randn(24, 300))
    adamw = torch.optim.AdamW([param])
    param.grad = torch.randn(24, 300)
    adamw.step()
    optimizer = NorMuon([param], **INT8)
    optimizer.load_state_dict(convert_state(adamw, to=optimizer, params=[param], quiet=True))
    kept, exact = momentum_of(param, optimizer), adamw.state[param]["exp_avg"]
    assert (kept - exact).abs().max() <= exact.abs().max() / 253


def test_a_compiled_step_is_the_step_but_for_roundings():
    params, optimizer = made([(24, 300)], **INT8)
    others, other = made([(24, 300)], **INT8)
    step = torch.compile(other.step, backend="eager")
    for number in range(3):
        for param, same in zip(params, others, strict=True):
            param.grad = torch.randn(24, 300, generator=torch.Generator().manual_seed(number))
            same.grad = param.grad.clone()
        optimizer.step()
        step()
    assert equal(contents(params, optimizer), contents(others, other))


@pytest.mark.parametrize("name", ["momentum_bits", "optim_bits"])
def test_other_libraries_names_lead_here(name):
    with pytest.raises(ValueError, match="did you mean 'momentum_dtype'"):
        NorMuon([{"params": [nn.Parameter(torch.ones(2, 2))], name: 8}])
