"""Megatron-LM's Muon, which is emerging_optimizers' under tensor parallelism: its state as ours."""

from __future__ import annotations

import sys
import typing

import pytest
import torch
from torch import nn

from normuon import NorMuon, convert_state
from tests.reference import relative_to_distance_moved
from tests.unit.test_convert import clone, groups_of, matrices, quintic, small_model, train


def megatrons_options(**more) -> dict:
    """What Megatron-LM's Muon has in its groups: the optimizer's options and its own."""
    theirs = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, "max_lr": 0.02, "min_lr": 0.0}
    return {**theirs, "wd_mult": 1.0, "lr_mult": 1.0, "is_expert_parallel": False, **more}


class MegatronsMuon(torch.optim.Optimizer):
    """Megatron-LM's Muon without tensor parallelism: what its state means is what is tested."""

    def __init__(self, params, **options):
        super().__init__(params, megatrons_options(**options))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                adaptive = "beta2" in group
                by_rows = param.shape[0] >= param.shape[1]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(param)
                    if adaptive:
                        kept = param[:, :1] if by_rows else param[:1]
                        state["moment2_buffer"] = torch.zeros_like(kept)
                momentum = state["momentum_buffer"].lerp_(param.grad, 1 - group["momentum"])
                update = o = quintic(momentum)
                if adaptive:
                    mean = o.square().mean(-1 if by_rows else -2, keepdim=True)
                    v = state["moment2_buffer"].lerp_(mean, 1 - group["beta2"])
                    update = o / v.sqrt()
                    update = update * (o.norm() / update.norm())
                m, n = param.shape  # scale_mode="shape_scaling"
                param.sub_(update * (max(1, m / n) ** 0.5 * group["lr"]))


@pytest.mark.parametrize("adaptive", [False, True])
def test_megatrons_muon_goes_on_as_if_nothing_had_happened(adaptive, capsys):
    """The next ten steps are theirs; the adaptive one's neurons lie along the short side."""
    theirs = small_model()
    for param in theirs.parameters():
        param.requires_grad_(param.ndim == 2)
    old = MegatronsMuon(matrices(theirs), **({"beta2": 0.95, "eps": 1e-8} if adaptive else {}))
    train(theirs, [old], 10)
    start, ours = clone(theirs), clone(theirs)
    for param in ours.parameters():
        param.requires_grad_(param.ndim == 2)
    groups = groups_of(ours)
    for group in groups:
        group["algorithm"] = "normuon" if adaptive else "muon"
    options = {"nesterov": False, "weight_decay": 0.0, "neuron_axis": "short", "eps": 0.0}
    new = NorMuon(groups, lr=0.02, adjust_lr_fn="original", **options)
    saved = {"optimizer": old.state_dict(), "fp32_from_fp16_params": [matrices(theirs)]}
    new.load_state_dict(convert_state(saved, to=new, params=matrices(ours)))
    printed = capsys.readouterr().out
    assert "2 x Muon's first moment carried over" in printed
    assert ("2 x NorMuon's second moments carried over" in printed) == adaptive
    assert "Megatron's 0.02 with scale_mode='spectral' is 0.1 times its extra_scale" in printed
    train(theirs, [old], 10, first=10)
    train(ours, [new], 10, first=10)
    # Both in float64, where 10 steps of rounding stay far below 1e-9 of the distance.
    for a, b, c in zip(matrices(ours), matrices(theirs), matrices(start), strict=True):
        assert relative_to_distance_moved(a.detach(), b.detach(), c.detach()) < 1e-9


def emerging_optimizers():
    """The real package, which asks for Python 3.12 for the sake of one name."""
    with pytest.MonkeyPatch.context() as patch:
        if sys.version_info < (3, 12):
            patch.setattr(typing, "override", lambda method: method, raising=False)
        return pytest.importorskip("emerging_optimizers.orthogonalized_optimizers")


@pytest.mark.parametrize("method", ["muon", "normuon", "adamuon", "namo"])
def test_the_real_optimizers_under_megatrons_muon(method):
    real = emerging_optimizers()
    model = small_model().float()
    shared = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.0}
    if method == "muon":
        old = real.Muon(matrices(model), **shared)
    else:
        old = real.AdaptiveMuon(matrices(model), **shared, moment2_method=method)
    for step in range(3):
        torch.manual_seed(step)
        model(torch.randn(8, 6)).square().mean().backward()
        old.step()
        model.zero_grad()
    new = NorMuon(groups_of(model), lr=1e-3, neuron_axis="short")
    new.load_state_dict(convert_state(old, to=new, quiet=True))
    for param in matrices(model):
        theirs, state = old.state[param], new.state[param]
        assert torch.equal(state["momentum_buffer"], theirs["momentum_buffer"])
        v = state["second_momentum_buffer"]
        if method == "normuon":
            assert torch.equal(v, theirs["moment2_buffer"].flatten())
        else:
            assert v.count_nonzero() == 0


def test_the_older_spelling_of_momentum_is_known():
    model = small_model()
    old = MegatronsMuon(matrices(model))
    train(model, [old], 2)
    saved = old.state_dict()
    for group in saved["param_groups"]:
        group["momentum_beta"] = group.pop("momentum")
    state = convert_state(saved, to=groups_of(model), params=matrices(model), quiet=True)["state"]
    first = old.state[model[0].weight]["momentum_buffer"]
    assert any(torch.equal(entry["momentum_buffer"], first) for entry in state.values())


def test_megatrons_l2_decay_is_refused():
    model = small_model()
    old = MegatronsMuon(matrices(model), weight_decay=0.1)
    train(model, [old], 1)
    old.weight_decay_method = "l2"
    with pytest.raises(
        ValueError, match=r"^MegatronsMuon with weight_decay_method='l2' has the dec"
    ):
        convert_state(old, to=groups_of(model))


def test_megatrons_shard_of_a_tensor_parallel_matrix_is_refused():
    """Its state is that of some rows; the whole matrix is what is converted."""
    model = small_model()
    part = nn.Parameter(model[0].weight.detach()[:5].clone())
    old = MegatronsMuon([part])
    part.grad = torch.ones_like(part)
    old.step()
    with pytest.raises(
        ValueError, match=r"^0\.weight \[10, 6\]: its first moment has shape \[5, 6\]"
    ):
        convert_state(old.state_dict(), to=groups_of(model), params=[model[0].weight])
