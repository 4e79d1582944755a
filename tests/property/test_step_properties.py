"""What must hold of a step for any matrix: equivariance, invariance, and batch = loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normuon import MatrixView, NorMuon

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**16)
options = st.fixed_dictionaries(
    {
        "nesterov": st.booleans(),
        "adjust_lr_fn": st.sampled_from(["match_rms_adamw", "original", "spectral_unclamped"]),
        "neuron_axis": st.sampled_from(["row", "short"]),
        "equilibrate": st.booleans(),
        "momentum": st.sampled_from([0.0, 0.9]),
        "beta2": st.sampled_from([0.0, 0.95]),
        "ns_coefficients": st.sampled_from(["jordan", "polar_express", "you", "cans"]),
    }
)
relaxed = settings(max_examples=40, deadline=None)


def two_steps(grads: list[Tensor], view: MatrixView | None = None, **kwargs) -> Tensor:
    """Where two steps from zero weights lead, in float64 and without decay."""
    param = nn.Parameter(torch.zeros(grads[0].shape, dtype=torch.float64))
    optimizer = NorMuon([{"params": [param], "view": view}], lr=1.0, weight_decay=0.0, **kwargs)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


def draw(seed: int, *shape: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2)]


@relaxed
@given(m=sizes, n=sizes, seed=seeds, kwargs=options)
def test_permuting_rows_or_columns_permutes_the_step(m, n, seed, kwargs):
    grads = draw(seed, m, n)
    rows, columns = torch.randperm(m), torch.randperm(n)
    moved = two_steps(grads, **kwargs)
    permuted = two_steps([g[rows][:, columns] for g in grads], **kwargs)
    torch.testing.assert_close(permuted, moved[rows][:, columns], rtol=0, atol=1e-8)


@relaxed
@given(m=sizes, n=sizes, seed=seeds, kwargs=options)
def test_flipping_signs_of_rows_and_columns_flips_the_step(m, n, seed, kwargs):
    grads = draw(seed, m, n)
    signs = torch.sign(torch.randn(m, 1).double()) * torch.sign(torch.randn(1, n).double())
    moved = two_steps(grads, **kwargs)
    flipped = two_steps([g * signs for g in grads], **kwargs)
    torch.testing.assert_close(flipped, moved * signs, rtol=0, atol=1e-8)


@relaxed
@given(
    m=sizes,
    n=sizes,
    seed=seeds,
    kwargs=options,
    exponent=st.integers(-100, 100),
)
def test_a_positive_factor_on_every_gradient_changes_nothing(m, n, seed, kwargs, exponent):
    """By a power of two the step is the same bit by bit, because every scaling is exact."""
    grads = draw(seed, m, n)
    moved = two_steps(grads, **kwargs)
    assert torch.equal(two_steps([g * 2.0**exponent for g in grads], **kwargs), moved)


@relaxed
@given(m=sizes, n=sizes, seed=seeds, kwargs=options)
def test_the_paper_scaling_pins_the_rms(m, n, seed, kwargs):
    kwargs["adjust_lr_fn"] = "match_rms_adamw"
    moved = two_steps(draw(seed, m, n)[:1], **kwargs)
    assert moved.square().mean().sqrt().item() == pytest.approx(0.2, rel=1e-9)


@relaxed
@given(batch=st.integers(1, 4), m=sizes, n=sizes, seed=seeds, kwargs=options)
def test_a_batch_of_experts_is_a_loop_over_them(batch, m, n, seed, kwargs):
    grads = draw(seed, batch, m, n)
    together = two_steps(grads, MatrixView.experts(), **kwargs)
    for index in range(batch):
        alone = two_steps([g[index] for g in grads], **kwargs)
        torch.testing.assert_close(together[index], alone, rtol=0, atol=1e-9)


@relaxed
@given(m=sizes, n=sizes, seed=seeds, kwargs=options)
def test_a_transposed_view_is_the_transposed_parameter(m, n, seed, kwargs):
    grads = draw(seed, m, n)
    plain = two_steps(grads, **kwargs)
    stored = two_steps([g.T.contiguous() for g in grads], MatrixView.transposed(), **kwargs)
    torch.testing.assert_close(stored, plain.T, rtol=0, atol=1e-9)


@relaxed
@given(
    q=st.integers(1, 4),
    k=st.integers(1, 4),
    heads=st.integers(1, 3),
    n=sizes,
    seed=seeds,
    kwargs=options,
)
def test_fused_blocks_and_heads_step_as_separate_parameters(q, k, heads, n, seed, kwargs):
    grads = draw(seed, (q + k) * heads, n)
    view = MatrixView.fused(q * heads, k * heads, heads=heads)
    fused = two_steps(grads, view, **kwargs)
    start = 0
    for rows in [q] * heads + [k] * heads:
        alone = two_steps([g[start : start + rows] for g in grads], **kwargs)
        torch.testing.assert_close(fused[start : start + rows], alone, rtol=0, atol=1e-9)
        start += rows
