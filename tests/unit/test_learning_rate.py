"""Learning rates of other optimizers in NorMuon's terms, and the warning for the known mistake."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from normuon import NorMuon, param_groups, suggest_lr
from normuon.learning_rate import _warn_once


@pytest.fixture(autouse=True)
def _warn_anew():
    _warn_once.cache_clear()


def rms_of_first_step(shape: tuple[int, int], **options) -> float:
    weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    weight.grad = torch.randn(shape, dtype=torch.float64)
    NorMuon(
        [weight], weight_decay=0.0, ns_coefficients="polar_express", ns_steps=8, **options
    ).step()
    return weight.detach().square().mean().sqrt().item()


@pytest.mark.parametrize("shape", [(96, 24), (24, 96), (64, 64)])
def test_the_suggested_rate_makes_steps_as_large_as_muons(shape):
    """Eight steps of Polar Express bring singular values to 1, which the arithmetic assumes.

    A square random matrix has one near 0, which may not get there: 1 of 64, so 1% at most.
    """
    weight = nn.Parameter(torch.zeros(shape))
    rate = suggest_lr(0.02, coming_from="muon_original", to=[{"params": [weight]}])
    theirs = rms_of_first_step(shape, lr=0.02, adjust_lr_fn="original")
    assert rms_of_first_step(shape, lr=rate) == pytest.approx(theirs, rel=1e-2)


def test_several_matrices_share_one_rate():
    """Root mean square over all entries: 5 lr sqrt(sum m / sum m n)."""
    model = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Linear(16, 4, bias=False))
    groups = param_groups(model, overrides={"*": "normuon"})
    rate = suggest_lr(0.02, coming_from="muon_original", to=NorMuon(groups))
    assert rate == pytest.approx(5 * 0.02 * (20 / 128) ** 0.5, rel=1e-12)


def test_spectral_rates_count_the_rows_of_wide_matrices_less():
    """lr (m / n)^0.5 O has RMS lr sqrt(m) / n where m < n: 16 x 4 counts 16, 4 x 16 counts 1."""
    model = nn.Sequential(nn.Linear(4, 16, bias=False), nn.Linear(16, 4, bias=False))
    groups = param_groups(model, overrides={"*": "normuon"})
    rate = suggest_lr(0.02, coming_from="muon_spectral_unclamped", to=groups)
    assert rate == pytest.approx(5 * 0.02 * (17 / 128) ** 0.5, rel=1e-12)


@pytest.mark.parametrize("origin", ["adamw", "muon_match_rms_adamw"])
def test_adamw_sized_rates_are_kept(origin):
    assert suggest_lr(4e-4, coming_from=origin) == 4e-4


@pytest.mark.parametrize(
    ("lr", "to", "message"),
    [
        (0.0, None, "lr=0.0 must be a number above 0 and finite"),
        (
            0.02,
            [{"params": [nn.Parameter(torch.zeros(3))], "algorithm": "adamw"}],
            "have no hidden matrix",
        ),
    ],
)
def test_what_no_rate_follows_from_is_refused(lr, to, message):
    with pytest.raises(ValueError, match=message):
        suggest_lr(lr, coming_from="muon_original", to=to)


def test_muons_rate_with_adamw_sized_steps_warns_once():
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.warns(UserWarning, match=r"^lr=0\.02 with adjust_lr_fn='match_rms_adamw' looks"):
        NorMuon([weight], lr=0.02)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NorMuon([weight], lr=0.02)


def test_the_warning_points_at_the_line_that_built_the_optimizer():
    with pytest.warns(UserWarning, match="looks like") as caught:
        NorMuon([nn.Parameter(torch.zeros(4, 4))], lr=0.02)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.019},
        {"lr": 0.02, "adjust_lr_fn": "original"},
        {"lr": torch.tensor(0.02)},
    ],
)
def test_other_learning_rates_do_not_warn(options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NorMuon([nn.Parameter(torch.zeros(4, 4))], **options)


def test_adamw_groups_may_have_any_rate():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        NorMuon([{"params": [nn.Parameter(torch.zeros(4))], "algorithm": "adamw", "lr": 0.3}])
