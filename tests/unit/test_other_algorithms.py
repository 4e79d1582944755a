"""`muon` and `adamw` groups against torch's own optimizers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import NorMuon
from normuon.step import adamw
from normuon.step.rule import ADJUST_LR_FNS


def torch_scales_by(adjust_lr_fn: str) -> bool:
    """Whether this torch's own Muon has a scaling; `spectral_unclamped` came with 2.15."""
    try:
        torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))], adjust_lr_fn=adjust_lr_fn)
    except ValueError:
        return False
    return True


SCALINGS = [name for name in ADJUST_LR_FNS if torch_scales_by(name)]


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
@pytest.mark.parametrize("adjust_lr_fn", SCALINGS)
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


@pytest.mark.parametrize("adjust_lr_fn", [None, *SCALINGS])
def test_a_muon_group_goes_on_from_torchs_state_dict(adjust_lr_fn):
    """Loaded as it is; torch's None, its default, means "original"."""
    ours, theirs = twins((24, 40), (40, 24))
    muon = torch.optim.Muon(theirs, lr=1e-2, adjust_lr_fn=adjust_lr_fn)
    train(theirs, theirs, muon, torch.optim.SGD(theirs, lr=0.0), steps=3)
    for a, b in zip(ours, theirs, strict=True):
        a.data.copy_(b.detach())
    starts = [param.detach().clone() for param in ours]
    optimizer = NorMuon([{"params": ours, "algorithm": "muon"}], ns_dtype=torch.bfloat16)
    optimizer.load_state_dict(muon.state_dict())
    assert optimizer.param_groups[0]["adjust_lr_fn"] == (adjust_lr_fn or "original")
    train(ours, theirs, optimizer, muon)
    for a, b, start in zip(ours, theirs, starts, strict=True):
        assert (a - b).norm() <= 0.05 * (b - start).norm()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust_lr_fn", SCALINGS)
def test_a_muon_group_in_float64_is_muons_formula(adjust_lr_fn, nesterov, monkeypatch):
    """With torch's own iteration made float64, the two agree to rounding."""
    ours, theirs = twins((24, 40), (40, 24))
    options = {"lr": 1e-2, "adjust_lr_fn": adjust_lr_fn, "nesterov": nesterov}
    cast = torch.Tensor.to

    def to(tensor, *args, **kwargs):
        if kwargs.get("dtype") == torch.bfloat16:
            kwargs["dtype"] = torch.float64
        return cast(tensor, *args, **kwargs)

    # torch.optim.Muon casts by the first of these, and from torch 2.15 on by the second.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.double().clone())
    monkeypatch.setattr(torch.Tensor, "to", to)
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


def without_fused_kernels(monkeypatch) -> None:
    """As on a device for which torch has none, and whose `step` its multi-tensor AdamW reads."""
    monkeypatch.setattr(adamw, "has_fused_kernel", lambda device_type: False)


def rates(kind: str) -> dict[str, object]:
    numbers = {"lr": 3e-3, "weight_decay": 0.05}
    if kind == "numbers":
        return numbers
    return {
        name: torch.full((1,) if "dim" in kind else (), value, dtype=torch.float64)
        for name, value in numbers.items()
    }


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("kind", ["numbers", "tensors", "tensors of one dim"])
@pytest.mark.parametrize("betas", [(0.9, 0.95), (0.0, 0.999)])
def test_our_own_multi_tensor_adamw_is_torchs(betas, kind, maximize, monkeypatch):
    """float64 on both sides, for accelerators on which torch's would wait at every step.

    Ours adds and divides in another order: some 2^-52 of a step of 3e-3 each time, thirty times.
    """
    monkeypatch.setattr(adamw, "_kernels_for", lambda *_, **__: "own")
    ours = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((9, 4), (7,), ())]
    theirs = [nn.Parameter(param.detach().clone()) for param in ours]
    options = {"betas": betas, "maximize": maximize}
    optimizer = NorMuon(
        [{"params": ours, "algorithm": "adamw"}], adamw_eps=1e-7, **options, **rates(kind)
    )
    twin = torch.optim.AdamW(theirs, eps=1e-7, foreach=True, **options, **rates("numbers"))
    for _ in range(30):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        twin.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15 if a.ndim == 0 else 1e-14)
        for key in ("exp_avg", "exp_avg_sq", "step"):
            torch.testing.assert_close(optimizer.state[a][key], twin.state[b][key])


def test_adamw_takes_a_tensor_lr_for_gradients_laid_out_otherwise():
    """torch's fused kernel needs equal strides, and its multi-tensor one refuses a tensor lr."""
    (ours,), (theirs,) = twins((6, 4))
    optimizer = NorMuon([{"params": [ours], "algorithm": "adamw"}], lr=torch.tensor(3e-3))
    twin = torch.optim.AdamW(
        [theirs], lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8, foreach=True
    )
    for _ in range(10):
        grad = torch.randn(4, 6).mT
        ours.grad, theirs.grad = grad, grad.clone()
        optimizer.step()
        twin.step()
    # Ten steps of 3e-3, each right to a few units of float32's 6e-8.
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["numbers", "tensors"])
def test_our_own_adamw_leaves_what_is_skipped(kind, monkeypatch):
    """Bit by bit, `step` included, and counts it."""
    without_fused_kernels(monkeypatch)
    param = nn.Parameter(torch.randn(5))
    optimizer = NorMuon(
        [{"params": [param], "algorithm": "adamw"}], skip_nonfinite=True, **rates(kind)
    )
    param.grad = torch.randn(5)
    optimizer.step()
    weights = param.detach().clone()
    state = {key: value.clone() for key, value in optimizer.state[param].items()}
    param.grad = torch.full((5,), float("nan"))
    optimizer.step()
    assert torch.equal(param, weights)
    assert int(optimizer.state[param]["skipped_steps"]) == 1
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert torch.equal(optimizer.state[param][key], state[key])


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"maximize": True},
        {"lr": torch.tensor(0.05, dtype=torch.float64)},
        {"weight_decay": torch.tensor(0.5, dtype=torch.float64)},
        {"skip_nonfinite": True},
    ],
    ids=str,
)
def test_cautious_decay_of_the_adamw_half_is_its_formula(options):
    """Entries decay that the step moves towards zero: ``W <- W - lr wd W [W u >= 0] - lr u``."""
    given = {"lr": 0.05, "weight_decay": 0.5, **options}
    param = nn.Parameter(torch.randn(6, 5, dtype=torch.float64))
    expected, mean, square = param.detach().clone(), torch.zeros(6, 5).double(), torch.zeros(6, 5)
    optimizer = NorMuon(
        [{"params": [param], "algorithm": "adamw"}], cautious_weight_decay=True, **given
    )
    lr, decay = float(given["lr"]), float(given["weight_decay"])
    square = square.double()
    for step in range(1, 6):
        param.grad = torch.randn(6, 5, dtype=torch.float64)
        if options.get("skip_nonfinite"):
            bad = param.grad.clone()
            bad[0, 0] = float("nan")
            kept, param.grad = param.grad, bad
            before = param.detach().clone()
            optimizer.step()
            assert torch.equal(param, before), "a step that is skipped decays nothing"
            param.grad = kept
        optimizer.step()
        grad = -param.grad if options.get("maximize") else param.grad
        mean = 0.9 * mean + 0.1 * grad
        square = 0.95 * square + 0.05 * grad * grad
        update = mean / (1 - 0.9**step) / ((square / (1 - 0.95**step)).sqrt() + 1e-8)
        shrinks = expected * update >= 0
        expected = expected - lr * decay * expected * shrinks - lr * update
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-12)


def test_kahan_sums_keep_a_cautious_decay_that_bfloat16_would_round_away():
    def trained(dtype, **options):
        param = nn.Parameter(torch.full((4,), 1.0, dtype=dtype))
        group = {"params": [param], "algorithm": "adamw"}
        optimizer = NorMuon([group], lr=1e-4, cautious_weight_decay=True, **options)
        for _ in range(200):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return param.detach().double()

    exact = trained(torch.float64)
    torch.testing.assert_close(trained(torch.bfloat16, kahan_sum=True), exact, rtol=2**-8, atol=0)
    assert (trained(torch.bfloat16) == 1).all()
