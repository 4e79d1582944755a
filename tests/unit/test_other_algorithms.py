"""`muon` and `adamw` groups against torch's own optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import NorMuon


def twins(*shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    return ours, [nn.Parameter(param.detach().clone()) for param in ours]


def train(ours, theirs, our_optimizer, their_optimizer, steps: int = 10) -> None:
    for _ in range(steps):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape)
            b.grad = a.grad.clone()
        our_optimizer.step()
        their_optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_a_muon_group_is_torch_optim_muon(adjust_lr_fn, nesterov):
    """The same spellings, the same update, in the bfloat16 that torch.optim.Muon computes in."""
    ours, theirs = twins((24, 40), (40, 24), (16, 16))
    starts = [param.detach().clone() for param in ours]
    options = {"lr": 1e-2, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    train(
        ours,
        theirs,
        NorMuon([{"params": ours, "algorithm": "muon"}], ns_dtype=torch.bfloat16, **options),
        torch.optim.Muon(theirs, **options),
    )
    for a, b, start in zip(ours, theirs, starts, strict=True):
        # bfloat16's 2^-8 through five steps; the two normalise in different orders.
        assert (a - b).norm() <= 0.05 * (b - start).norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_a_muon_group_in_float64_is_muons_formula(adjust_lr_fn, nesterov, monkeypatch):
    """With torch's own iteration made float64, the two agree to rounding."""
    ours, theirs = twins((24, 40), (40, 24))
    options = {"lr": 1e-2, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    # torch.optim.Muon casts with .bfloat16(); float64 parameters then keep their precision.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())
    train(
        ours,
        theirs,
        NorMuon([{"params": ours, "algorithm": "muon"}], ns_dtype=torch.float64, **options),
        torch.optim.Muon(theirs, **options),
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("maximize", [False, True])
def test_an_adamw_group_is_torchs_fused_adamw(maximize):
    """Bit by bit: the same kernel on the same state."""
    ours, theirs = twins((9, 4), (7,), ())
    optimizer = NorMuon(
        [{"params": ours, "algorithm": "adamw"}],
        lr=3e-3,
        weight_decay=0.05,
        betas=(0.8, 0.9),
        adamw_eps=1e-7,
        maximize=maximize,
    )
    twin = torch.optim.AdamW(
        theirs,
        lr=3e-3,
        weight_decay=0.05,
        betas=(0.8, 0.9),
        eps=1e-7,
        maximize=maximize,
        fused=True,
    )
    train(ours, theirs, optimizer, twin)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(optimizer.state[a][key], twin.state[b][key])


def test_one_schedule_drives_both_halves():
    matrix, bias = nn.Parameter(torch.ones(4, 4)), nn.Parameter(torch.ones(4))
    groups = [{"params": [matrix]}, {"params": [bias], "algorithm": "adamw"}]
    optimizer = NorMuon(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2)
    for expected in (1e-2, 5e-3, 0.0):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([expected] * 2)
        matrix.grad, bias.grad = torch.randn(4, 4), torch.randn(4)
        before = (matrix.detach().clone(), bias.detach().clone())
        optimizer.step()
        schedule.step()
        assert torch.equal(matrix, before[0]) == (expected == 0)
        assert torch.equal(bias, before[1]) == (expected == 0)
