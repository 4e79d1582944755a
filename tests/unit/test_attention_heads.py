"""`param_groups(split_heads=True)`: every attention head's rows become a matrix of their own."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon, describe_groups, param_groups


def views_of(model: nn.Module, **kwargs) -> dict[str, MatrixView | None]:
    return {
        name: group.get("view")
        for group in param_groups(model, split_heads=True, **kwargs)
        for name, _ in group["params"]
    }


class Attention(nn.Module):
    """Four query heads of 8 neurons, two of keys and of values, and an output projection."""

    def __init__(self, **projections: int) -> None:
        super().__init__()
        self.head_dim = 8
        sizes = projections or {"q_proj": 32, "k_proj": 16, "v_proj": 16}
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(24, size, bias=False))
        self.o_proj = nn.Linear(32, 24, bias=False)


def test_separate_projections_split_and_the_rest_stays_whole():
    views = views_of(Attention())
    assert views == {
        "q_proj.weight": MatrixView(heads=4),
        "k_proj.weight": MatrixView(heads=2),
        "v_proj.weight": MatrixView(heads=2),
        "o_proj.weight": MatrixView.linear(),
    }


@pytest.mark.parametrize("name", ["qkv", "qkv_proj", "Wqkv", "query_key_value"])
def test_a_fused_projection_splits_into_all_its_heads(name):
    views = views_of(Attention(**{name: 64}))
    assert views[f"{name}.weight"] == MatrixView(heads=8)


def test_torch_multihead_attention_holds_its_projections_itself():
    fused = views_of(nn.MultiheadAttention(12, 3, bias=False))
    assert fused == {"in_proj_weight": MatrixView(heads=9), "out_proj.weight": MatrixView.linear()}
    apart = views_of(nn.MultiheadAttention(12, 3, bias=False, kdim=5, vdim=7))
    assert [apart[f"{part}_proj_weight"] for part in "qkv"] == [MatrixView(heads=3)] * 3


def test_the_reason_counts_the_heads():
    reasons = {
        name: reason
        for group in param_groups(Attention(), split_heads=True)
        for (name, _), reason in zip(group["params"], group["reasons"], strict=True)
    }
    assert reasons["q_proj.weight"] == "Linear, 4 heads"
    assert reasons["o_proj.weight"] == "Linear"


def test_heads_step_as_matrices_of_their_own():
    """The split projection moves as four separate parameters would; whole, it moves otherwise."""

    def stepped(model: nn.Module, groups) -> dict[str, torch.Tensor]:
        optimizer = NorMuon(groups, lr=1e-2, ns_dtype=torch.float32)
        generator = torch.Generator().manual_seed(1)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        return {name: param.detach() for name, param in model.named_parameters()}

    torch.manual_seed(0)
    model = Attention()
    whole = Attention()
    whole.load_state_dict(model.state_dict())
    queries = [nn.Parameter(rows.clone()) for rows in model.q_proj.weight.detach().chunk(4)]
    together = stepped(model, param_groups(model, split_heads=True))["q_proj.weight"]
    optimizer = NorMuon(queries, lr=1e-2, ns_dtype=torch.float32)
    for query, grad in zip(queries, model.q_proj.weight.grad.chunk(4), strict=True):
        query.grad = grad.clone()
    optimizer.step()
    assert torch.equal(together, torch.cat([query.detach() for query in queries]))
    unsplit = stepped(whole, param_groups(whole))["q_proj.weight"]
    assert not torch.allclose(together, unsplit, atol=1e-4)


def test_an_override_wins():
    views = views_of(Attention(), overrides={"k_proj.weight": MatrixView.linear()})
    assert views["k_proj.weight"] == MatrixView.linear()
    assert views["q_proj.weight"] == MatrixView(heads=4)


def test_neurons_that_are_not_a_multiple_of_the_head_size_are_refused():
    message = (
        "k_proj.weight [20, 24]: split_heads=True, but its 20 neurons are not a multiple of its "
        "module's head size, 8; split it with overrides={'name or pattern': "
        "normuon.MatrixView(heads=...)}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        param_groups(Attention(q_proj=32, k_proj=20), split_heads=True)


def frozen(model: nn.Module) -> nn.Module:
    for name, param in model.named_parameters():
        param.requires_grad_(name == "o_proj.weight")
    return model


@pytest.mark.parametrize("model", [nn.Linear(4, 6), frozen(Attention())], ids=["none", "frozen"])
def test_a_model_without_attention_to_train_stays_as_it_is(model):
    split, whole = (
        describe_groups(param_groups(model, split_heads=split)) for split in (True, False)
    )
    assert split == whole


class CountsHeadsItsOwnWay(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_head = 4
        self.c_attn = nn.Linear(32, 96, bias=False)
        self.c_proj = nn.Linear(32, 32, bias=False)


class HoldsThemApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("to_q", "to_k", "to_v", "to_out"):
            self.add_module(name, nn.Linear(32, 32, bias=False))


def test_attention_without_a_head_size_is_warned_about_once_for_each_class():
    """Otherwise split_heads=True would do nothing there, and say nothing."""
    layers = [CountsHeadsItsOwnWay(), CountsHeadsItsOwnWay(), HoldsThemApart(), Attention()]
    model = nn.ModuleDict({"layers": nn.ModuleList(layers), "lm_head": nn.Linear(24, 9)})
    with pytest.warns(UserWarning, match="split_heads=True leaves") as caught:
        groups = param_groups(model, split_heads=True)
    texts = [str(warning.message) for warning in caught]
    assert len(texts) == 2
    assert texts[0].startswith(
        "split_heads=True leaves layers.0.c_attn.weight [96, 32] and 1 more whole: "
        "CountsHeadsItsOwnWay has no head_dim."
    )
    assert "layers.2.to_q.weight [32, 32] and 2 more whole: HoldsThemApart" in texts[1]
    assert any(group.get("view") == MatrixView(heads=4) for group in groups)


def test_what_an_override_or_a_head_size_splits_is_not_warned_about(recwarn):
    model = nn.ModuleDict({"attn": CountsHeadsItsOwnWay(), "lm_head": nn.Linear(32, 9)})
    views = views_of(model, overrides={"*c_attn.weight": MatrixView(heads=12)})
    assert views["attn.c_attn.weight"] == MatrixView(heads=12)
    model["attn"].head_dim = 8
    assert views_of(model) == views
    assert not recwarn.list
