"""A real Accelerator's loop: the steps, rates and checkpoints of the same loop in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from normuon import NorMuon, param_groups

pytest.importorskip("accelerate")
import accelerate
from torch.utils.data import DataLoader, TensorDataset

NUM_STEPS, ACCUMULATED = 6, 2


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.LayerNorm(10), nn.Linear(10, 10), nn.Linear(10, 4))


def built(model: nn.Module):
    optimizer = NorMuon(param_groups(model), lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=NUM_STEPS)
    return optimizer, schedule


def batches() -> TensorDataset:
    torch.manual_seed(1)
    return TensorDataset(torch.randn(NUM_STEPS * ACCUMULATED * 4, 6))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :4]).square().mean()


def by_plain_torch() -> tuple[nn.Module, list[float]]:
    model = small_model()
    optimizer, schedule = built(model)
    rates = []
    for number, (x,) in enumerate(DataLoader(batches(), batch_size=4)):
        (loss_of(model, x) / ACCUMULATED).backward()
        if (number + 1) % ACCUMULATED == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model, rates


def by_accelerate(folder=None, *, save_at: int = -1, resume: bool = False):
    """The whole run, or its first or second half around a checkpoint."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    model = small_model()
    optimizer, schedule = built(model)
    loader = DataLoader(batches(), batch_size=4)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    start = 0
    if resume:
        accelerator.load_state(str(folder))
        start = save_at
    rates = []
    for number, (x,) in enumerate(accelerator.skip_first_batches(loader, start * ACCUMULATED)):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if not resume and number + 1 == save_at * ACCUMULATED:
            accelerator.save_state(str(folder))
            break
    return accelerator.unwrap_model(model), rates


def assert_equal_weights(ours: nn.Module, theirs: nn.Module) -> None:
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_accelerates_loop_is_plain_torchs_bit_by_bit():
    """Halves of a batch add up in one order, since 1 / 2 is exact."""
    model, rates = by_accelerate()
    expected, expected_rates = by_plain_torch()
    assert rates == expected_rates
    assert len(set(rates)) == NUM_STEPS
    assert_equal_weights(model, expected)


def test_save_state_and_load_state_repeat_the_rest_bit_by_bit(tmp_path):
    by_accelerate(tmp_path, save_at=3)
    resumed, rates = by_accelerate(tmp_path, save_at=3, resume=True)
    expected, expected_rates = by_plain_torch()
    assert rates == expected_rates[3:]
    assert_equal_weights(resumed, expected)
