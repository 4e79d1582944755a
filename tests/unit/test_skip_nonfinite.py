"""`skip_nonfinite`: a poisoned gradient costs its own matrix one step, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon

BAD = [float("nan"), float("inf"), -float("inf")]


def state_of(optimizer: NorMuon, param: nn.Parameter) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in optimizer.state[param].items() if k != "skipped_steps"}


@pytest.mark.parametrize("algorithm", ["normuon", "muon", "adamw"])
@pytest.mark.parametrize("bad", BAD)
def test_the_poisoned_parameter_and_its_state_are_untouched_and_counted(bad, algorithm):
    params = [nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    optimizer = NorMuon([{"params": params, "algorithm": algorithm}], skip_nonfinite=True)
    for param in params:
        param.grad = torch.randn(4, 6)
    optimizer.step()
    poisoned, healthy = params
    before, other = poisoned.detach().clone(), healthy.detach().clone()
    state = state_of(optimizer, poisoned)
    poisoned.grad[2, 3] = bad
    optimizer.step()
    assert torch.equal(poisoned, before)
    for key, value in state_of(optimizer, poisoned).items():
        assert torch.equal(value, state[key]), key
    assert not torch.equal(healthy, other)
    assert optimizer.state[poisoned]["skipped_steps"].tolist() == [1]
    assert optimizer.state[healthy]["skipped_steps"].tolist() == [0]


@pytest.mark.parametrize("bad", BAD)
def test_one_poisoned_expert_does_not_stop_the_others(bad):
    """Skipping is per matrix: two experts of one parameter, two fates."""
    param = nn.Parameter(torch.randn(3, 4, 6))
    group = {"params": [param], "view": MatrixView.experts()}
    optimizer = NorMuon([group], skip_nonfinite=True)
    param.grad = torch.randn(3, 4, 6)
    param.grad[1, 0, 0] = bad
    before = param.detach().clone()
    optimizer.step()
    assert torch.equal(param[1], before[1])
    assert not optimizer.state[param]["momentum_buffer"][1].any()
    assert not optimizer.state[param]["second_momentum_buffer"][1].any()
    for index in (0, 2):
        assert not torch.equal(param[index], before[index])
    assert optimizer.state[param]["skipped_steps"].tolist() == [0, 1, 0]


def test_healthy_gradients_step_as_they_do_without_it():
    results = []
    for skip in (False, True):
        param = nn.Parameter(torch.ones(5, 7))
        optimizer = NorMuon([param], skip_nonfinite=skip)
        for seed in range(4):
            param.grad = torch.randn(5, 7, generator=torch.Generator().manual_seed(seed))
            optimizer.step()
        results.append(param.detach())
    assert torch.equal(*results)


@pytest.mark.parametrize("algorithm", ["normuon", "muon", "adamw"])
def test_without_it_a_nan_propagates_as_in_any_torch_optimizer(algorithm):
    param = nn.Parameter(torch.ones(4, 6))
    param.grad = torch.randn(4, 6)
    param.grad[0, 0] = float("nan")
    NorMuon([{"params": [param], "algorithm": algorithm}]).step()
    assert param.isnan().any()


def test_it_may_be_turned_on_later_and_counts_from_then():
    param = nn.Parameter(torch.ones(4, 6))
    optimizer = NorMuon([param])
    param.grad = torch.randn(4, 6)
    optimizer.step()
    assert "skipped_steps" not in optimizer.state[param]
    optimizer.param_groups[0]["skip_nonfinite"] = True
    param.grad[0, 0] = float("inf")
    optimizer.step()
    optimizer.step()
    assert optimizer.state[param]["skipped_steps"].tolist() == [2]
    assert param.isfinite().all()


@pytest.mark.parametrize("bad", [False, True])
def test_weight_decay_as_a_tensor_decays_adamw_parameters_as_a_number_does(bad):
    stepped = []
    for weight_decay in (0.5, torch.tensor(0.5)):
        param = torch.nn.Parameter(torch.arange(1.0, 5.0))
        param.grad = torch.full((4,), float("nan") if bad else 0.1)
        group = {"params": [param], "algorithm": "adamw"}
        NorMuon([group], lr=0.1, weight_decay=weight_decay, skip_nonfinite=True).step()
        stepped.append(param.detach())
    torch.testing.assert_close(stepped[1], stepped[0])
    assert torch.equal(stepped[1], torch.arange(1.0, 5.0)) == bad
