"""Clipping against torch's own, and what gradients of zero and of NaN do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from normuon_lab.train.loop import clip_gradients_, has_nonfinite


def parameters_with_gradients() -> list[nn.Parameter]:
    torch.manual_seed(3)
    shapes = ((5, 3), (7,), (2, 2, 2), ())
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for number, param in enumerate(params):
        param.grad = torch.randn(param.shape) * 10**number
    params.append(nn.Parameter(torch.ones(3)))  # Without a gradient.
    return params


@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_gradients_and_norm_are_those_of_torch(max_norm: float) -> None:
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    found = clip_gradients_(ours, max_norm=max_norm)
    # float32 norms of a few elements: a few units in the last place.
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)
    for mine, other in zip(ours, theirs, strict=True):
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)


def test_a_bound_of_zero_only_measures() -> None:
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    assert clip_gradients_(ours, max_norm=0.0) > 100
    pairs = zip(ours[:4], theirs[:4], strict=True)
    assert all(torch.equal(mine.grad, other.grad) for mine, other in pairs)


def test_zero_gradients_stay_zero_and_nan_is_seen() -> None:
    param = nn.Parameter(torch.ones(3))
    param.grad = torch.zeros(3)
    assert clip_gradients_([param], max_norm=1.0) == 0
    assert torch.equal(param.grad, torch.zeros(3))
    param.grad[1] = math.nan
    assert clip_gradients_([param], max_norm=1.0).isnan()
    assert not has_nonfinite([param])
    for value in (math.nan, math.inf):
        assert has_nonfinite([param, nn.Parameter(torch.tensor([1.0, value]))])
