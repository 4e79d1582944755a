"""What must hold of 8-bit codes for any values: bounds, means, and no dependence on what is cut."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from normuon import NorMuon
from normuon.models.blocks import BLOCK
from normuon.step.int8 import Blocks, decode_, encode_, round_stochastically_, salts

relaxed = settings(max_examples=40, deadline=None)
seeds = st.integers(0, 2**16)
exponents = st.integers(-100, 100)


def drawn(seed: int, *shape: int) -> torch.Tensor:
    """Values over some decades, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(1, generator=generator))
    return x * (torch.rand(shape, generator=generator) > 0.2)


def codes_of(x_KAB, absmax_KAN, blocks, count):
    salt_K = salts(torch.full((len(x_KAB),), count, dtype=torch.int32))
    codes = torch.empty(x_KAB.shape, dtype=torch.int8)
    encode_(codes, x_KAB, absmax_KAN, blocks=blocks, salt_K=salt_K)
    return codes


@relaxed
@given(lines=st.integers(1, 4), length=st.integers(1, 400), seed=seeds, exponent=exponents)
def test_every_value_is_within_a_127th_of_its_blocks_largest(lines, length, seed, exponent):
    x = drawn(seed, 2, lines, length) * 2.0**exponent
    blocks = Blocks.regular(length)
    absmax = blocks.absmax(x)
    codes = codes_of(x, absmax, blocks, seed)
    values = decode_(torch.empty_like(x), codes, absmax, blocks=blocks)
    for start in range(0, length, BLOCK):
        part = (..., slice(start, start + BLOCK))
        largest = x[part].abs().amax(-1)
        assert torch.equal(largest, absmax[..., start // BLOCK])
        error = (values[part] - x[part]).abs().amax(-1)
        # 1e-5: of the division by 127 and the product with it, each rounded to 2^-24.
        assert (error <= largest / 127 * (1 + 1e-5)).all()


@relaxed
@given(value=st.floats(0, 127, width=32), first=st.integers(0, 2**30))
def test_the_mean_over_roundings_is_the_value(value, first):
    count = 4096
    salt = salts(torch.arange(first, first + count, dtype=torch.int32))
    rounded = round_stochastically_(torch.full((count,), value), salt)
    part = value - math.floor(value)
    # Six standard deviations of a mean of independent roundings, and the 2^-17 of their grain.
    allowed = 6 * math.sqrt(part * (1 - part) / count) + 2**-17 + 6 / count * (part > 0)
    assert abs(float(rounded.double().mean()) - value) <= allowed
    assert {*rounded.tolist()} <= {math.floor(value), math.ceil(value)}


@relaxed
@given(seed=seeds, count=st.integers(0, 2**30))
def test_different_values_are_rounded_independently(seed, count):
    """The mean over many values is right at every single step, so that errors do not add up."""
    y = torch.rand(20_000, generator=torch.Generator().manual_seed(seed)) * 127
    rounded = round_stochastically_(y.clone(), salts(torch.tensor([count], dtype=torch.int32)))
    # A rounding's variance is 1/6 on average; six standard deviations of the mean.
    assert abs(float((rounded - y).double().mean())) <= 6 * math.sqrt(1 / 6 / 20_000)


@relaxed
@given(length=st.integers(2, 400), data=st.data(), seed=seeds)
def test_where_a_line_is_cut_changes_no_code(length, data, seed):
    x = drawn(seed, 1, 3, length)
    whole = Blocks.regular(length)
    absmax = whole.absmax(x)
    codes = codes_of(x, absmax, whole, seed)
    cut = data.draw(st.integers(1, length - 1))
    maxima = []
    for start, stop in ((0, cut), (cut, length)):
        ids = [index // BLOCK for index in range(start, stop)]
        part = Blocks([ids], num_blocks=whole.num_blocks)
        maxima.append(part.absmax(x[..., start:stop]))
        assert torch.equal(codes_of(x[..., start:stop], absmax, part, seed), codes[..., start:stop])
    assert torch.equal(torch.maximum(*maxima), absmax)


@settings(max_examples=10, deadline=None)
@given(seed=seeds, ratio=st.sampled_from([300, 3000]))
def test_small_gradients_survive_beside_large_ones(seed, ratio):
    """A gradient of a hundredth of a code's unit adds up to its momentum in the mean."""
    grad = torch.full((64, BLOCK), 1.0 / ratio)
    grad[:, 0] = 1.0
    grad[:, 1:] *= 0.5 + torch.rand((64, BLOCK - 1), generator=torch.Generator().manual_seed(seed))
    param = nn.Parameter(torch.zeros(64, BLOCK))
    optimizer = NorMuon([param], lr=0.0, momentum=0.9, momentum_dtype=torch.int8)
    seen = []
    for step in range(200):
        param.grad = grad.clone()
        optimizer.step()
        state = optimizer.state[param]
        if step >= 100:
            seen.append(state["momentum_codes"] * state["momentum_absmax"] / 127)
    mean = torch.stack(seen).mean(0)[:, 1:].mean()
    # 63 x 127 values and 100 steps, of which some ten are independent: the deviation of their
    # mean is below a thousandth of a unit, 1/127.
    torch.testing.assert_close(mean, grad[:, 1:].mean(), rtol=0, atol=0.004 / 127)
