"""`kahan_sum`: bfloat16 weights that follow steps too small for bfloat16."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from normuon import NorMuon

STEPS, LR = 50, 1e-4


def trained(algorithm, dtype, *, steps=STEPS, **options):
    """Weights and optimizer after steps with gradients of one direction, and noise."""
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(16, 24).bfloat16().to(dtype))
    group = {"params": [param], "algorithm": algorithm}
    optimizer = NorMuon([group], lr=LR, weight_decay=0.0, ns_dtype=torch.float32, **options)
    drift = torch.randn(16, 24)
    for _ in range(steps):
        param.grad = (drift + 0.5 * torch.randn(16, 24)).to(dtype)
        optimizer.step()
    return param, optimizer


def start():
    torch.manual_seed(0)
    return torch.randn(16, 24).bfloat16().float()


@pytest.mark.parametrize("algorithm", ["normuon", "muon", "adamw"])
def test_small_steps_add_up_as_in_float32(algorithm):
    exact, _ = trained(algorithm, torch.float32)
    rounded, _ = trained(algorithm, torch.bfloat16)
    summed, optimizer = trained(algorithm, torch.bfloat16, kahan_sum=True)
    still = (rounded.float() == start()).double().mean().item()
    assert still > 0.5, "bfloat16 alone does not move these weights"
    moved = exact - start()
    kept = summed.float() + optimizer.state[summed]["weight_residual"].float()
    error = (kept - exact).norm() / moved.norm()
    # The gradients and moments are bfloat16: an eighth of a percent each, over 50 steps.
    assert error < 0.05
    assert (rounded.float() - exact).norm() / moved.norm() > 0.5


@pytest.mark.parametrize("algorithm", ["normuon", "adamw"])
def test_it_is_saved_and_goes_on_bitwise(algorithm):
    param, optimizer = trained(algorithm, torch.bfloat16, steps=3, kahan_sum=True)
    copied = nn.Parameter(param.detach().clone())
    restored = NorMuon(
        [{"params": [copied], "algorithm": algorithm}], ns_dtype=torch.float32, kahan_sum=True
    )
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, two in ((param, optimizer), (copied, restored)):
        torch.manual_seed(1)
        one.grad = torch.randn(16, 24).bfloat16()
        two.step()
    assert torch.equal(param, copied)
    for key, value in optimizer.state[param].items():
        assert torch.equal(value, restored.state[copied][key])


@pytest.mark.parametrize("algorithm", ["normuon", "adamw"])
def test_a_skipped_step_leaves_weights_and_residuals_bit_by_bit(algorithm):
    param, optimizer = trained(
        algorithm, torch.bfloat16, steps=9, kahan_sum=True, skip_nonfinite=True
    )
    before = [param.clone(), optimizer.state[param]["weight_residual"].clone()]
    param.grad = torch.full_like(param, float("nan"))
    optimizer.step()
    assert torch.equal(param, before[0])
    assert torch.equal(optimizer.state[param]["weight_residual"], before[1])


def test_it_starts_when_it_is_turned_on_and_needs_no_memory_in_float32():
    param, optimizer = trained("normuon", torch.bfloat16, steps=1)
    assert "weight_residual" not in optimizer.state[param]
    optimizer.param_groups[0]["kahan_sum"] = True
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["weight_residual"].count_nonzero() > 0
    param, optimizer = trained("normuon", torch.float32, steps=1, kahan_sum=True)
    assert "weight_residual" not in optimizer.state[param]
