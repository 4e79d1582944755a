"""The rule's lines one by one, where a doctest does not already say it."""

from __future__ import annotations

import pytest
import torch

from normuon.step import rule
from tests.spectra import spectrum_zoo


def step_scale(mean_square, per_neuron, shape, adjust_lr_fn):
    sums = rule.neuron_sums(mean_square, per_neuron, adjust_lr_fn=adjust_lr_fn)
    m, n = shape
    num_neurons = mean_square.shape[-1]
    return rule.step_scale(sums, m=m, n=n, num_neurons=num_neurons, adjust_lr_fn=adjust_lr_fn)


@pytest.mark.parametrize("dim", [-2, -1])
@pytest.mark.parametrize("name", ["gaussian", "rows_over_three_decades", "tall", "one_row"])
def test_line_six_pins_the_rms_of_the_step(name, dim):
    """RMS(scale * Oh) is 0.2 exactly, found from the row statistics alone."""
    o = spectrum_zoo()[name][None]
    m, n = o.shape[1:]
    mean_square = rule.mean_square_per_neuron(o, dim=dim)
    v = rule.update_second_moment(torch.rand_like(mean_square), mean_square, beta2=0.9)
    per_neuron = rule.neuron_scale(v, eps=1e-8)
    scale = step_scale(mean_square, per_neuron, (m, n), "match_rms_adamw")
    step = o * per_neuron.unsqueeze(-1 if dim == -2 else -2) * scale[:, None, None]
    assert step.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-12)


def test_original_scaling_restores_the_norm_of_the_direction():
    o = torch.randn(1, 6, 3, dtype=torch.float64)
    mean_square = rule.mean_square_per_neuron(o, dim=-2)
    per_neuron = rule.neuron_scale(torch.rand(1, 6, dtype=torch.float64), eps=1e-8)
    scale = step_scale(mean_square, per_neuron, (6, 3), "original")
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
        scale = step_scale(mean_square, per_neuron, (5, 7), "match_rms_adamw")
        steps.append(per_neuron * scale[:, None])
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("adjust_lr_fn", rule.ADJUST_LR_FNS)
def test_a_zero_direction_gives_a_zero_step(adjust_lr_fn):
    zero = torch.zeros(1, 4)
    for eps in (0.0, 1e-8):
        per_neuron = rule.neuron_scale(zero, eps=eps)
        scale = step_scale(zero, per_neuron, (4, 3), adjust_lr_fn)
        assert torch.equal(scale * per_neuron.sum(), torch.zeros(1))


def test_bfloat16_statistics_are_accumulated_in_float32():
    """A bfloat16 sum of 4,096 ones stalls at 256; the mean square of ones is 1."""
    o = torch.ones(1, 1, 4096, dtype=torch.bfloat16)
    mean_square = rule.mean_square_per_neuron(o, dim=-2)
    assert mean_square.dtype == torch.float32
    assert mean_square.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("momentum_beta", [0.0, 0.3, 0.5, 0.95])
def test_a_momentum_that_is_its_own_gradient_stays_as_it_is(momentum_beta):
    """How a matrix that must not move is held among others that do: ``lerp(M, M)`` is M."""
    momentum = torch.cat([torch.randn(100) * 10.0**e for e in (-30, -3, 0, 3, 30)])
    before = momentum.clone()
    rule.update_momenta_([momentum], [before.clone()], momentum_beta=momentum_beta)
    assert torch.equal(momentum, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("momentum_beta", [0.0, 0.3, 0.95])
def test_looking_ahead_gives_the_same_bits_in_one_pass_and_in_two(momentum_beta, dtype):
    """A whole matrix may be large where its shards are small, and both must give one result."""
    momentum, grad = torch.randn(2, rule.LARGE_NUMEL, dtype=dtype)
    before = momentum.clone(), grad.clone()
    whole = torch.empty_like(grad)
    rule.look_ahead_([whole], [momentum], [grad], momentum_beta=momentum_beta)
    shards = torch.empty_like(grad)
    parts = [list(tensor.chunk(4)) for tensor in (shards, momentum, grad)]
    rule.look_ahead_(*parts, momentum_beta=momentum_beta)
    assert torch.equal(whole, shards)
    assert torch.equal(momentum, before[0])
    assert torch.equal(grad, before[1])


def test_looking_ahead_fills_directions_of_any_strides():
    """Directions are views in the parameters' order, which a batch may hold transposed."""
    momentum, grad = torch.randn(2, 256, 257)
    batch = torch.empty(257, 256)
    rule.look_ahead_([batch.t()], [momentum], [grad], momentum_beta=0.75)
    torch.testing.assert_close(batch.t(), 0.75 * momentum + 0.25 * grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kept", [1, 0.75, torch.tensor(0.75), torch.tensor([0.75])], ids=str)
def test_line_seven_of_many_tensors_is_that_of_each(kept):
    weights = [torch.randn(3, 4), torch.randn(5, 2)]
    steps = [torch.randn(3, 4), torch.randn(5, 2)]
    expected = [kept * w - s for w, s in zip(weights, steps, strict=True)]
    rule.apply_steps_(weights, steps, kept=kept)
    assert all(torch.equal(w, e) for w, e in zip(weights, expected, strict=True))


def applied(weight, step, **options):
    """Line 7 of weights in half precision: widened, decayed and moved, rounded once."""
    wide = weight.to(step.dtype)
    moved = rule.applied_step(wide, step, **{"cautious": False, "moves_B11": None, **options})
    assert moved is wide
    return moved.to(weight.dtype)


def test_half_precision_weights_are_rounded_once():
    """A decay of 1e-4 and a step of the same size add up before bfloat16 rounds them away."""
    weight = torch.full((1, 1, 1), 1.0, dtype=torch.bfloat16)
    # Each alone is less than half of bfloat16's spacing below 1 (2^-8): rounded away one by one.
    moved = applied(weight, torch.full((1, 1, 1), 0.0015), decay=0.0015)
    assert moved.item() == 1 - 2**-8


def test_cautious_decay_leaves_entries_that_grow():
    weight = torch.tensor([[[2.0, 2.0, -2.0, 0.0]]])
    step = torch.tensor([[[0.5, -0.5, -0.5, 0.5]]])
    moved = applied(weight, step, decay=0.25, cautious=True)
    assert moved.flatten().tolist() == [1.0, 2.5, -1.0, -0.5]


@pytest.mark.parametrize("cautious", [False, True])
@pytest.mark.parametrize("decay", [0.25, torch.tensor(0.25)], ids=["number", "tensor"])
def test_matrices_that_do_not_move_do_not_decay(decay, cautious):
    weight = torch.tensor([[[2.0, -2.0]], [[2.0, -2.0]]])
    step = torch.tensor([[[0.5, -0.5]], [[0.0, 0.0]]])
    moves = torch.tensor([True, False])[:, None, None]
    moved = applied(weight, step, decay=decay, cautious=cautious, moves_B11=moves)
    assert moved.tolist() == [[[1.0, -1.0]], [[2.0, -2.0]]]


def test_the_short_axis_is_columns_for_wide_matrices_only():
    assert rule.neuron_dim(3, 4, "short") == -1
    assert rule.neuron_dim(4, 4, "short") == -2
    assert rule.neuron_dim(4, 3, "short") == -2
    assert rule.neuron_dim(3, 4, "row") == -2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_neuron_that_barely_moves_stops_no_other_without_epsilon(dtype):
    """Its v is subnormal; the square of 1 / sqrt(v) would be infinite, and every step zero."""
    v = torch.tensor([[1.0, torch.finfo(dtype).tiny / 8, 4.0]], dtype=dtype)
    per_neuron = rule.neuron_scale(v, eps=0.0)
    assert per_neuron.tolist() == [[1.0, 0.0, 0.5]]
    sums = rule.neuron_sums(v, per_neuron, adjust_lr_fn="match_rms_adamw")
    # Two of three neurons have mean square 1: 0.2 sqrt(3 x 4) / sqrt(2 x 4).
    scale = rule.step_scale(sums, m=3, n=4, num_neurons=3, adjust_lr_fn="match_rms_adamw")
    torch.testing.assert_close(scale.item(), 0.2 * 1.5**0.5, rtol=1e-6, atol=0)
