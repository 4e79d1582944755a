"""Codes of 8-bit momentum: golden values, extremes, and blocks that do not depend on layout."""

from __future__ import annotations

import math

import pytest
import torch

from normuon import MatrixView
from normuon.models.blocks import BLOCK, block_grid, blocks_of_region
from normuon.step.int8 import (
    Blocks,
    decode_,
    decoded,
    encode_,
    encode_in_chunks_,
    encoded,
    round_stochastically_,
    salts,
)


def salt_of(*counts):
    return salts(torch.tensor(counts, dtype=torch.int32))


def coded(x_KAB, blocks, *, count=1):
    """The codes, maxima and decoded values of pieces."""
    absmax_KAN = blocks.absmax(x_KAB)
    codes_KAB = torch.empty(x_KAB.shape, dtype=torch.int8)
    salt_K = salt_of(*[count] * len(x_KAB))
    encode_(codes_KAB, x_KAB, absmax_KAN, blocks=blocks, salt_K=salt_K)
    values_KAB = torch.empty_like(x_KAB)
    return codes_KAB, absmax_KAN, decode_(values_KAB, codes_KAB, absmax_KAN, blocks=blocks)


def test_codes_are_what_they_were():
    """Golden values: a run that is resumed by a later release must round as this one does."""
    assert salt_of(1, 2, 1000).tolist() == [912558784, 1827673586, 772539992]
    x_KAB = torch.linspace(-0.1, 1.0, 8).expand(3, 1, 8).clone()
    blocks = Blocks.regular(8)
    absmax_KAN = blocks.absmax(x_KAB)
    assert absmax_KAN.tolist() == [[[1.0]]] * 3
    codes = torch.empty(x_KAB.shape, dtype=torch.int8)
    encode_(codes, x_KAB, absmax_KAN, blocks=blocks, salt_K=salt_of(1, 2, 1000))
    assert codes[:, 0].tolist() == GOLDEN_CODES


GOLDEN_CODES = [
    [-13, 8, 27, 47, 67, 87, 107, 127],
    [-13, 7, 27, 47, 67, 87, 107, 127],
    [-12, 8, 27, 47, 68, 87, 107, 127],
]


def test_whole_numbers_stay_whatever_the_salt():
    y = torch.arange(128.0).expand(2000, 128).clone()
    rounded = round_stochastically_(y.clone(), salt_of(*range(2000))[:, None])
    assert torch.equal(rounded, y)


def test_zero_and_the_largest_magnitude_are_exact():
    x = torch.zeros(1, 2, BLOCK)
    x[0, 0, 5], x[0, 0, 6] = 3.0, -3.0
    codes, absmax, values = coded(x, Blocks.regular(BLOCK))
    assert codes[0, 0, 5] == 127
    assert codes[0, 0, 6] == -127
    assert absmax[0].tolist() == [[3.0], [0.0]]
    assert torch.equal(values[0, 1], torch.zeros(BLOCK))
    torch.testing.assert_close(values, x, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-30, 1.0, 1e30, 3e38])
def test_no_scale_gives_nan(scale):
    """Denormals lose digits, as in any float32, and nothing more."""
    x = torch.linspace(-1, 1, 300).view(1, 1, 300) * scale
    _, absmax, values = coded(x, Blocks.regular(300))
    assert torch.isfinite(values).all()
    # A code is within one of the value's 127ths; a denormal maximum / 127 is rounded besides.
    limit = absmax.amax() / 127 * 1.001 + 127 * 1.5e-45
    assert (values - x).abs().amax() <= limit


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_spoils_its_block_and_no_other(bad):
    x = torch.ones(1, 1, 3 * BLOCK)
    x[0, 0, BLOCK + 3] = bad
    _, absmax, values = coded(x, Blocks.regular(3 * BLOCK))
    assert absmax[0, 0].tolist() == [1.0, math.inf, 1.0]
    finite = torch.isfinite(values[0, 0])
    assert finite.tolist() == [True] * BLOCK + [False] * BLOCK + [True] * BLOCK


def test_a_negative_has_the_negative_codes():
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))
    blocks = Blocks.regular(200)
    assert torch.equal(coded(x, blocks)[0], -coded(-x, blocks)[0])


def test_scaling_by_a_power_of_two_changes_no_code():
    x = torch.randn(2, 3, 200, generator=torch.Generator().manual_seed(0))
    blocks = Blocks.regular(200)
    assert torch.equal(coded(x, blocks)[0], coded(x * 2.0**-60, blocks)[0])


@pytest.mark.parametrize("along_rows", [False, True])
def test_chunks_change_no_code(monkeypatch, along_rows):
    x_KAB = torch.randn(5, 7, 300, generator=torch.Generator().manual_seed(0))
    if along_rows:
        x_KAB = x_KAB.mT.contiguous().mT
    blocks = Blocks.regular(300)
    absmax_KAN, salt_K = blocks.absmax(x_KAB), salt_of(1, 2, 3, 4, 5)
    whole, parts = (torch.empty_like(x_KAB, dtype=torch.int8) for _ in range(2))
    encode_(whole, x_KAB, absmax_KAN, blocks=blocks, salt_K=salt_K)
    for elements in (1, 700, 4300, 10**6):
        monkeypatch.setattr("normuon.step.int8.CHUNK_ELEMENTS", (elements, elements))
        encode_in_chunks_(parts.zero_(), x_KAB, absmax_KAN, blocks=blocks, salt_K=salt_K)
        assert torch.equal(whole, parts)


def test_a_part_of_a_line_has_the_codes_of_the_whole():
    """Columns 100 to 290 of 300, with the maxima of the whole blocks."""
    x = torch.randn(2, 3, 300, generator=torch.Generator().manual_seed(0))
    codes, absmax, values = coded(x, Blocks.regular(300))
    part = Blocks([[index // BLOCK for index in range(100, 290)]] * 2, num_blocks=3)
    found = torch.empty(2, 3, 190, dtype=torch.int8)
    encode_(found, x[..., 100:290], absmax, blocks=part, salt_K=salt_of(1, 1))
    assert torch.equal(found, codes[..., 100:290])
    decoded_part = decode_(torch.empty(2, 3, 190), found, absmax, blocks=part)
    assert torch.equal(decoded_part, values[..., 100:290])
    maxima = part.absmax(x[..., 100:290])
    assert (maxima <= absmax).all()
    assert torch.equal(maxima[..., 1], absmax[..., 1]), "the middle block is whole"


VIEWS = {
    "linear": (MatrixView.linear(), (5, 300), (5, 3)),
    "conv1d": (MatrixView.transposed(), (300, 5), (300, 1)),
    "conv": (MatrixView.conv(), (4, 20, 3, 3), (4, 2)),
    "conv_transposed": (MatrixView.transposed(), (20, 4, 3, 3), (4, 2)),
    "experts": (MatrixView.experts(), (2, 5, 300), (2, 5, 3)),
    "experts_transposed": (MatrixView.experts(transposed=True), (2, 5, 300), (2, 5, 3)),
    "fused_conv1d": (MatrixView.fused(140, 40, neuron_dim=1), (5, 180), (5, 3)),
    "heads_conv1d": (MatrixView(neuron_dim=1, heads=3), (5, 90), (5, 3)),
    "empty": (MatrixView.linear(), (0, 300), (0, 3)),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_whole_parameter_there_and_back(name):
    view, shape, maxima_shape = VIEWS[name]
    grid = block_grid(view, shape)
    assert grid.shape == maxima_shape
    whole = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    codes, absmax = encoded(whole, grid)
    assert absmax.shape == maxima_shape
    back = decoded(codes, absmax, grid)
    # To the nearest of 127ths of the largest magnitude of all.
    assert not whole.numel() or (back - whole).abs().amax() <= whole.abs().amax() / 253
    again, same = encoded(back, grid)
    assert torch.equal(codes, again)
    torch.testing.assert_close(absmax, same, rtol=1e-6, atol=0)


def test_blocks_of_a_rectangle_of_a_convolution():
    view, shape = MatrixView.conv(), (4, 20, 3, 3)
    grid = block_grid(view, shape)
    found = blocks_of_region(grid, shape, (0, 12, 1, 0), (4, 4, 1, 3))
    expected = [(c * 9 + 3 + k) // BLOCK for c in range(12, 16) for k in range(3)]
    assert found == tuple(expected)


def test_no_block_spans_two_matrices():
    grid = block_grid(MatrixView.fused(140, 40, 300, neuron_dim=1), (5, 480))
    assert {grid.blocks[139], grid.blocks[140]} == {1, 2}
    assert {grid.blocks[179], grid.blocks[180]} == {2, 3}
