"""The rule's lines one by one, where a doctest does not already say it."""

from __future__ import annotations

import pytest
import torch

from normuon import rule
from tests.spectra import spectrum_zoo


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("name", ["gaussian", "rows_over_three_decades", "tall", "one_row"])
def test_line_six_pins_the_rms_of_the_step(name, dim):
    """RMS(scale * Oh) is 0.2 exactly, found from the row statistics alone."""
    o = spectrum_zoo()[name][None]
    m, n = o.shape[1:]
    mean_square = rule.mean_square_per_neuron(o, dim=dim)
    v = rule.update_second_moment(torch.rand_like(mean_square), mean_square, beta2=0.9)
    per_neuron = rule.neuron_scale(v, eps=1e-8)
    scale = rule.step_scale(mean_square, per_neuron, m=m, n=n, adjust_lr_fn="match_rms_adamw")
    step = o * per_neuron.unsqueeze(-1 if dim == -2 else -2) * scale[:, None, None]
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-12)


def test_original_scaling_restores_the_norm_of_the_direction():
    o = torch.randn(1, 6, 3, dtype=torch.float64)
    mean_square = rule.mean_square_per_neuron(o, dim=-2)
    per_neuron = rule.neuron_scale(torch.rand(1, 6, dtype=torch.float64), eps=1e-8)
    scale = rule.step_scale(mean_square, per_neuron, m=6, n=3, adjust_lr_fn="original")
    step = o * per_neuron[..., None] * scale[:, None, None]
    assert step.norm().item() == pytest.approx(o.norm().item() * 2**0.5, rel=1e-12)


def test_multiplying_v_by_a_constant_changes_no_step():
    """Why there is no bias correction: line 6 divides it out (with eps = 0, to rounding)."""
    o = torch.randn(1, 5, 7, dtype=torch.float64)
    mean_square = rule.mean_square_per_neuron(o, dim=-2)
    v = torch.rand(1, 5, dtype=torch.float64) + 0.1
    steps = []
    for constant in (1.0, 1e-3):
        per_neuron = rule.neuron_scale(v * constant, eps=0.0)
        scale = rule.step_scale(mean_square, per_neuron, m=5, n=7, adjust_lr_fn="match_rms_adamw")
        steps.append(per_neuron * scale[:, None])
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("adjust_lr_fn", rule.ADJUST_LR_FNS)
def test_a_zero_direction_gives_a_zero_step(adjust_lr_fn):
    zero = torch.zeros(1, 4)
    for eps in (0.0, 1e-8):
        per_neuron = rule.neuron_scale(zero, eps=eps)
        scale = rule.step_scale(zero, per_neuron, m=4, n=3, adjust_lr_fn=adjust_lr_fn)
        assert torch.equal(scale * per_neuron.sum(), torch.zeros(1))


def test_bfloat16_statistics_are_accumulated_in_float32():
    """A bfloat16 sum of 4,096 ones stalls at 256; the mean square of ones is 1."""
    o = torch.ones(1, 1, 4096, dtype=torch.bfloat16)
    mean_square = rule.mean_square_per_neuron(o, dim=-2)
    assert mean_square.dtype == torch.float32
    assert mean_square.item() == pytest.approx(1.0, rel=1e-6)


def test_half_precision_weights_are_rounded_once():
    """A decay of 1e-4 and a step of the same size add up before bfloat16 rounds them away."""
    weight = torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16)
    # Each alone is less than half of bfloat16's spacing below 1 (2^-8): rounded away one by one.
    rule.apply_step_(weight, torch.full((1, 1, 1), 0.0015), decay=0.0015, cautious=False)
    assert weight.item() == 1 - 2**-8


def test_cautious_decay_leaves_entries_that_grow():
    weight = torch.tensor([[[2.0, 2.0, -2.0, 0.0]]])
    step = torch.tensor([[[0.5, -0.5, -0.5, 0.5]]])
    rule.apply_step_(weight, step, decay=0.25, cautious=True)
    assert weight.flatten().tolist() == [1.0, 2.5, -1.0, -0.5]


def test_the_short_axis_is_columns_for_wide_matrices_only():
    assert rule.neuron_dim(3, 4, "short") == -1
    assert rule.neuron_dim(4, 4, "short") == -2
    assert rule.neuron_dim(4, 3, "short") == -2
    assert rule.neuron_dim(3, 4, "row") == -2
