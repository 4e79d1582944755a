"""Every rival against its own paper's formula, written as one plain float64 loop."""

from __future__ import annotations

import math

import pytest
import torch

from normuon import MatrixView, NorMuon
from normuon_lab.train.arms.ema_nesterov import END_FACTOR, START_FACTOR, EmaNesterov
from normuon_lab.train.arms.rivals import (
    Dion,
    FrobeniusMuon,
    Hyperball,
    MuonAdam,
    MuonEqRows,
    Muown,
    NorMuonFront,
    NorMuonTall,
    RowMomentum,
)
from normuon_lab.train.loop import learning_rate_factor
from tests.reference import orthogonalize_by_svd

LR, DECAY, BETA, BETA2 = 0.02, 0.1, 0.9, 0.8


def scaled(direction):
    norm = torch.linalg.norm(direction)
    size = 0.2 * math.sqrt(direction.numel()) / norm if norm else 0.0
    return size * direction


def moving_average(memory, square):
    memory["v"] = BETA2 * memory.get("v", 0.0) + (1 - BETA2) * square
    return memory["v"]


def muon_adam(ahead, memory):
    o = orthogonalize_by_svd(ahead)
    return o / (moving_average(memory, o * o).sqrt() + 1e-8)


def front(ahead, memory):
    v = moving_average(memory, (ahead * ahead).mean(1))
    return orthogonalize_by_svd(ahead / v.sqrt()[:, None])


def tall(ahead, memory):
    o = orthogonalize_by_svd(ahead)
    if o.shape[0] <= o.shape[1]:
        return o
    return o / (moving_average(memory, (o * o).mean(1)).sqrt() + 1e-8)[:, None]


def frobenius(ahead, memory):
    return orthogonalize_by_svd(ahead)


def row_momentum(ahead, memory):
    return ahead / torch.diag(ahead @ ahead.T).sqrt()[:, None]


RIVALS = {
    MuonAdam: muon_adam,
    NorMuonFront: front,
    NorMuonTall: tall,
    FrobeniusMuon: frobenius,
    RowMomentum: row_momentum,
}


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
def test_a_rival_is_its_formula(rival, shape):
    formula = RIVALS[rival]
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    expected, momentum, memory = param.detach().clone(), torch.zeros(shape).double(), {}
    optimizer = rival([param], lr=LR, weight_decay=DECAY, momentum=BETA, beta2=BETA2)
    for _ in range(6):
        grad = torch.randn(shape, dtype=torch.float64)
        param.grad = grad.clone()
        optimizer.step()
        assert torch.equal(param.grad, grad)
        momentum = BETA * momentum + (1 - BETA) * grad
        ahead = BETA * momentum + (1 - BETA) * grad
        expected = expected * (1 - LR * DECAY) - LR * scaled(formula(ahead, memory))
    # Six steps of 0.004; the eps beside a second moment of at least 1e-3 is 1e-8 of it.
    torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize(("shape", "fraction"), [((6, 10), 0.5), ((10, 6), 1.0), ((5, 5), 0.01)])
def test_dion_is_its_algorithm(shape, fraction):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = Dion([param], lr=LR, weight_decay=DECAY, momentum=BETA, rank_fraction=fraction)
    expected, momentum = param.detach().clone(), torch.zeros(shape).double()
    rank = max(1, math.ceil(fraction * min(shape)))
    start = torch.randn(1, shape[1], rank, generator=torch.Generator().manual_seed(0)).double()[0]
    q = start / start.norm(dim=0)
    for _ in range(6):
        grad = torch.randn(shape, dtype=torch.float64)
        param.grad = grad
        optimizer.step()
        b = momentum + grad
        # Orthonormal columns by Gram-Schmidt; QR's differ in sign, which P Q^T does not see.
        columns = []
        for column in (b @ q).T:
            for other in columns:
                column = column - (column @ other) * other
            columns.append(column / column.norm())
        p = torch.stack(columns, dim=1)
        r = b.T @ p
        momentum = b - (1 - BETA) * p @ r.T
        q = r / r.norm(dim=0)
        expected = expected * (1 - LR * DECAY) - LR * scaled(p @ q.T)
    torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-9)


def test_dion_of_full_rank_keeps_nothing_back():
    """With rank min(m, n) the error feedback leaves exactly mu B in the momentum."""
    param = torch.nn.Parameter(torch.zeros(4, 7, dtype=torch.float64))
    optimizer = Dion([param], lr=LR, momentum=BETA, rank_fraction=1.0)
    param.grad = torch.randn(4, 7, dtype=torch.float64)
    optimizer.step()
    buffer = optimizer.state[param]["momentum_buffer"]
    torch.testing.assert_close(buffer, BETA * param.grad, rtol=0, atol=1e-12)


def scaled_like_muon(o):
    return 0.2 * math.sqrt(max(o.shape)) * o


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muon_eq_evens_rows_before_muon(shape):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    expected, momentum = param.detach().clone(), torch.zeros(shape).double()
    optimizer = MuonEqRows([param], lr=LR, weight_decay=DECAY, momentum=BETA)
    row_sizes = torch.logspace(-3, 3, shape[0], dtype=torch.float64)
    for _ in range(4):
        param.grad = row_sizes[:, None] * torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        # The authors' momentum is a sum; rows of norm 1 do not see the constant.
        momentum = BETA * momentum + param.grad
        ahead = param.grad + BETA * momentum
        even = torch.diag(torch.diag(ahead @ ahead.T) ** -0.5) @ ahead
        expected = expected * (1 - LR * DECAY) - LR * scaled_like_muon(orthogonalize_by_svd(even))
    torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_hyperball_is_its_formula(shape):
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
    expected, momentum = param.detach().clone(), torch.zeros(shape).double()
    radius = expected.square().sum().sqrt()
    optimizer = Hyperball([param], lr=LR, weight_decay=DECAY, momentum=BETA)
    for _ in range(6):
        param.grad = torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        momentum = BETA * momentum + (1 - BETA) * param.grad
        o = orthogonalize_by_svd(BETA * momentum + (1 - BETA) * param.grad)
        moved = expected - LR * radius * o / o.square().sum().sqrt()
        expected = radius * moved / moved.square().sum().sqrt()
    torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(param.detach().norm(), radius, rtol=1e-12, atol=0)


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_muown_is_weight_normalisation_stepped_by_adam_and_muon(shape, decay):
    """Its gradients against autograd's, its rows' step against torch.optim.Adam's."""
    torch.manual_seed(0)
    start = torch.randn(shape, dtype=torch.float64)
    param = torch.nn.Parameter(start.clone())
    rival = Muown([param], lr=LR, weight_decay=decay, momentum=BETA, betas=(0.9, 0.95))
    magnitude = torch.nn.Parameter(start.norm(dim=1, keepdim=True))
    adam = torch.optim.Adam([magnitude], lr=LR, betas=(0.9, 0.95))
    v, momentum = start.clone(), torch.zeros(shape).double()
    for _ in range(6):
        grad = torch.randn(shape, dtype=torch.float64)
        param.grad = grad.clone()
        rival.step()
        v.requires_grad_(True)
        weight = magnitude * v / v.norm(dim=1, keepdim=True)
        magnitude.grad, grad_v = torch.autograd.grad(weight, [magnitude, v], grad)
        adam.step()
        momentum = BETA * momentum + (1 - BETA) * grad_v
        ahead = BETA * momentum + (1 - BETA) * grad_v
        with torch.no_grad():
            v = v - LR * scaled_like_muon(orthogonalize_by_svd(ahead))
            expected = magnitude * v / v.norm(dim=1, keepdim=True) - LR * decay * weight
            if decay:
                # Decay turns the rows a little; the authors' V turns with them.
                v = expected / expected.norm(dim=1, keepdim=True) * v.norm(dim=1, keepdim=True)
                magnitude.copy_(expected.norm(dim=1, keepdim=True))
        torch.testing.assert_close(param.detach(), expected, rtol=0, atol=1e-9)


def test_muown_moves_a_row_of_zeros_nowhere():
    param = torch.nn.Parameter(torch.cat([torch.zeros(1, 4), torch.ones(2, 4)]))
    optimizer = Muown([param], lr=LR, betas=(0.9, 0.95))
    for _ in range(3):
        param.grad = torch.randn(3, 4)
        optimizer.step()
    assert torch.equal(param[0], torch.zeros(4))
    assert bool((param[1:] != 1).all())
    assert bool(torch.isfinite(param).all())


def test_ema_nesterov_is_its_recurrence():
    """x' = A(x + s m), m' = 0.9 m + 0.1 (x' - x), around SGD with decay, on a quadratic."""
    steps, warmup, peak = 60, 3, 0.1
    param = torch.nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))
    sgd = torch.optim.SGD([param], lr=peak, weight_decay=0.01)
    ahead = EmaNesterov([param], step_size=0.7, decay=0.9)
    x, trend, s = param.detach().clone(), torch.zeros(2).double(), 0.0
    looked_ahead = []
    for step in range(steps):
        factor = learning_rate_factor(
            step, steps=steps, warmup_steps=warmup, decay_steps=steps - warmup
        )
        y = x + s * trend
        torch.testing.assert_close(param.detach(), y, rtol=0, atol=1e-14)
        new = y - peak * factor * (y**3 + 0.01 * y)
        trend, x = 0.9 * trend + 0.1 * (new - x), new
        s = 0.7 * factor if step >= warmup and END_FACTOR < factor <= START_FACTOR else 0.0
        looked_ahead.append(s > 0)
        param.grad = param.detach() ** 3
        for optimizer, rate in ((sgd, peak), (ahead, 1.0)):
            optimizer.param_groups[0]["lr"] = rate * factor
            optimizer.step()
    # The authors' shares of a run: from three tenths of it to eight.
    assert [looked_ahead.index(True), looked_ahead[::-1].index(True)] == [18, 12]
    assert torch.equal(param.detach(), ahead.state[param]["weights"])


def test_ema_nesterov_never_looks_ahead_under_a_constant_rate():
    param = torch.nn.Parameter(torch.ones(2))
    ahead = EmaNesterov([param])
    for value in (2.0, 3.0, 4.0):
        with torch.no_grad():
            param.fill_(value)
        ahead.step()
        assert torch.equal(param.detach(), torch.full((2,), value))


VIEWED = [*RIVALS, Dion, MuonEqRows, Hyperball, Muown]


@pytest.mark.parametrize("rival", VIEWED, ids=lambda rival: rival.__name__)
def test_views_are_heeded(rival):
    """A transposed weight moves as its transpose does, and fused blocks move on their own."""
    options = {"lr": LR, "momentum": BETA, "beta2": BETA2, "rank_fraction": 0.5}
    options["betas"] = (0.9, 0.95)
    torch.manual_seed(0)
    plain = torch.nn.Parameter(torch.randn(12, 5))
    turned = torch.nn.Parameter(plain.detach().T.clone())
    upper, lower = (torch.nn.Parameter(half.clone()) for half in plain.detach().split([8, 4]))
    fused = torch.nn.Parameter(plain.detach().clone())
    one = rival([{"params": [plain]}], **options)
    other = rival([{"params": [turned], "view": MatrixView.transposed()}], **options)
    halves = rival([{"params": [upper, lower]}], **options)
    blocks = rival([{"params": [fused], "view": MatrixView.fused(8, 4)}], **options)
    for _ in range(3):
        grad = torch.randn(12, 5)
        plain.grad, turned.grad, fused.grad = grad, grad.T.contiguous(), grad
        upper.grad, lower.grad = grad.split([8, 4])
        for optimizer in (one, other, halves, blocks):
            optimizer.step()
    torch.testing.assert_close(turned.detach().T, plain.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(fused.detach()[:8], upper.detach(), rtol=0, atol=1e-6)
    torch.testing.assert_close(fused.detach()[8:], lower.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rival", VIEWED, ids=lambda rival: rival.__name__)
def test_a_zero_gradient_moves_nothing(rival):
    param = torch.nn.Parameter(torch.ones(6, 4))
    param.grad = torch.zeros(6, 4)
    options = {"beta2": BETA2, "betas": (0.9, 0.95), "rank_fraction": 0.5}
    optimizer = rival([param], lr=LR, weight_decay=0.0, **options)
    optimizer.step()
    torch.testing.assert_close(param.detach(), torch.ones(6, 4), rtol=0, atol=0)


def test_the_tall_ablation_is_normuon_on_tall_matrices():
    """The one place where an ablation and the library must agree."""
    torch.manual_seed(0)
    start = torch.randn(10, 6, dtype=torch.float64)
    one, two = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    rival = NorMuonTall([one], lr=LR, weight_decay=DECAY, momentum=BETA, beta2=BETA2)
    library = NorMuon([two], lr=LR, weight_decay=DECAY, momentum=BETA, beta2=BETA2)
    for _ in range(5):
        one.grad = two.grad = torch.randn(10, 6, dtype=torch.float64)
        rival.step()
        library.step()
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
