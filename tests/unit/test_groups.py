"""Which algorithm each parameter takes, told by the module that owns it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from normuon import MatrixView, NorMuon, describe_groups, param_groups


def placed(model: nn.Module, **kwargs) -> dict[str, tuple[str, MatrixView | None, str]]:
    return {
        name: (group["algorithm"], group.get("view"), reason)
        for group in param_groups(model, **kwargs)
        for (name, _), reason in zip(group["params"], group["reasons"], strict=True)
    }


class Experts(nn.Module):
    def __init__(self, transposed: bool = False):
        super().__init__()
        self.is_transposed = transposed
        self.gate_up_proj = nn.Parameter(torch.randn(4, 8, 6))
        self.gate_up_proj_bias = nn.Parameter(torch.randn(4, 8))


class TopKRouter(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))


class ScaleNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))


class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 12))
        self.bias = nn.Parameter(torch.randn(12))


class PatchEmbed(nn.Module):
    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.randn(1, 9, 6))
        self.cls_token = nn.Parameter(torch.randn(1, 1, 6))


class WindowAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.randn(9, 2))
        self.temperature = nn.Parameter(torch.randn(4, 1, 1))


LINEAR = MatrixView.linear()


@pytest.mark.parametrize(
    ("module", "name", "algorithm", "view", "reason"),
    [
        (nn.Linear(4, 6), "weight", "normuon", LINEAR, "Linear"),
        (nn.Linear(4, 6), "bias", "adamw", None, "vector: Linear.bias"),
        (nn.Embedding(9, 4), "weight", "adamw", None, "embedding"),
        (nn.EmbeddingBag(9, 4), "weight", "adamw", None, "embedding"),
        (nn.LayerNorm((2, 3)), "weight", "adamw", None, "norm: LayerNorm"),
        (nn.GroupNorm(2, 4), "weight", "adamw", None, "vector: GroupNorm.weight"),
        (ScaleNorm(), "weight", "adamw", None, "norm: ScaleNorm"),
        (nn.Conv2d(3, 8, 5), "weight", "normuon", MatrixView.conv(), "Conv2d, flattened"),
        (nn.Conv1d(4, 8, 3, groups=2), "weight", "normuon", MatrixView(heads=2), "2 groups"),
        (nn.Conv2d(8, 8, 3, groups=8), "weight", "adamw", None, "depthwise Conv2d"),
        (nn.ConvTranspose2d(3, 8, 5), "weight", "normuon", MatrixView(neuron_dim=1), "flattened"),
        (nn.Bilinear(3, 4, 5), "weight", "normuon", MatrixView.conv(), "Bilinear"),
        (nn.LSTM(3, 4), "weight_hh_l0", "normuon", LINEAR, "LSTM"),
        (nn.GRUCell(3, 4), "weight_ih", "normuon", LINEAR, "GRUCell"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "normuon", LINEAR, "MultiheadAttention"),
        (nn.MultiheadAttention(4, 2), "out_proj.weight", "normuon", LINEAR, "Linear"),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), "bias_k", "adamw", None, "bias"),
        (Conv1D(), "weight", "normuon", MatrixView.transposed(), "[in, out]"),
        (Experts(), "gate_up_proj", "normuon", MatrixView.experts(), "[E, out, in]"),
        (Experts(True), "gate_up_proj", "normuon", MatrixView.experts(transposed=True), "[E, in"),
        (Experts(), "gate_up_proj_bias", "adamw", None, "bias of Experts"),
        (TopKRouter(), "weight", "adamw", None, "router: TopKRouter"),
        (PatchEmbed(), "pos_embed", "adamw", None, "embedding, by its name"),
        (PatchEmbed(), "cls_token", "adamw", None, "embedding, by its name"),
        (WindowAttention(), "relative_position_bias_table", "adamw", None, "bias, by its name"),
        (WindowAttention(), "temperature", "adamw", None, "vector [4, 1, 1]: WindowAttention"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_the_owning_modules_type_decides(module, name, algorithm, view, reason):
    model = nn.ModuleDict({"part": module, "hidden": nn.Linear(4, 4)})
    found_algorithm, found_view, found_reason = placed(model)[f"part.{name}"]
    assert (found_algorithm, found_view) == (algorithm, view)
    assert reason in found_reason


class LanguageModel(nn.Module):
    def __init__(self, head: str = "lm_head", tied: bool = False):
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.hidden = nn.Linear(4, 4, bias=False)
        setattr(self, head, nn.Linear(4, 11, bias=False))
        if tied:
            getattr(self, head).weight = self.embed.weight


@pytest.mark.parametrize("head", ["lm_head", "embed_out", "output", "classifier", "score"])
def test_an_output_head_is_known_by_name(head):
    assert placed(LanguageModel(head))[f"{head}.weight"][::2] == ("adamw", "output head")


def test_a_top_level_heads_name_means_nothing_deeper_in_the_model():
    """A Linear called `output` inside a block is a hidden matrix, as in BERT."""
    block = nn.ModuleDict({"output": nn.Linear(4, 4), "lm_head": nn.Linear(4, 9)})
    model = nn.ModuleDict({"embed": nn.Embedding(9, 4), "block": block})
    assert placed(model)["block.output.weight"][0] == "normuon"
    assert placed(model)["block.lm_head.weight"][0] == "adamw"


@pytest.mark.parametrize("prefix", ["module", "_orig_mod"])
def test_a_wrapped_models_head_is_still_found(prefix):
    wrapped = nn.ModuleDict({prefix: LanguageModel("output")})
    assert placed(wrapped)[f"{prefix}.output.weight"][0] == "adamw"


def test_a_tied_head_appears_once_as_an_embedding():
    found = placed(LanguageModel(tied=True))
    assert found["embed.weight"][::2] == ("adamw", "embedding, tied to the output head")
    assert "lm_head.weight" not in found


def test_a_head_the_model_names_itself_needs_no_name():
    model = LanguageModel("hidden_too")
    model.hidden_too = nn.Linear(4, 4)
    with pytest.warns(UserWarning, match="no output head was found in this LanguageModel"):
        assert placed(model)["hidden_too.weight"][0] == "normuon"
    model.get_output_embeddings = lambda: model.hidden_too
    assert placed(model)["hidden_too.weight"][::2] == ("adamw", "output head")


def test_frozen_parameters_are_left_out():
    model = LanguageModel()
    model.embed.weight.requires_grad_(False)
    assert "embed.weight" not in placed(model)


def test_weight_decay_is_zero_outside_hidden_matrices():
    groups = param_groups(LanguageModel())
    assert [(g["algorithm"], g.get("weight_decay")) for g in groups] == [
        ("normuon", None),
        ("adamw", 0.0),
    ]
    optimizer = NorMuon(groups, lr=1e-3, weight_decay=0.3)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]


def test_hidden_and_other_set_options_of_their_groups():
    groups = param_groups(
        LanguageModel(), hidden={"weight_decay": 0.05}, other={"lr": 3e-3, "betas": (0.8, 0.9)}
    )
    assert groups[0]["weight_decay"] == 0.05
    assert (groups[1]["lr"], groups[1]["betas"], groups[1]["weight_decay"]) == (3e-3, (0.8, 0.9), 0)


def test_overrides_win_over_types_and_the_first_match_counts():
    found = placed(
        LanguageModel(),
        overrides={
            "lm_*": "muon",
            "*.weight": {"algorithm": "normuon", "view": MatrixView.transposed()},
        },
    )
    assert found["lm_head.weight"] == ("muon", LINEAR, "override 'lm_*'")
    assert found["embed.weight"][:2] == ("normuon", MatrixView.transposed())


def test_an_override_may_be_a_view_or_options_alone():
    groups = param_groups(
        LanguageModel(),
        overrides={"hidden.weight": MatrixView.fused(2, 2), "embed.weight": {"lr": 0.3}},
    )
    assert groups[0]["view"] == MatrixView.fused(2, 2)
    embedding = next(g for g in groups if g.get("lr") == 0.3)
    assert [name for name, _ in embedding["params"]] == ["embed.weight"]
    assert embedding["algorithm"] == "adamw"
    assert embedding["weight_decay"] == 0.0


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(4, 4)
        self.mixing = nn.Parameter(torch.randn(5, 3))


def test_a_matrix_that_only_its_shape_could_place_is_refused():
    with pytest.raises(ValueError, match=r"mixing \[5, 3\] of Custom\.mixing\. Choose by class"):
        param_groups(Custom())
    assert placed(Custom(), overrides={"mixing": "adamw"})["mixing"][0] == "adamw"
    assert placed(Custom(), overrides={"mixing": "normuon"})["mixing"][:2] == ("normuon", LINEAR)


def test_a_model_without_a_hidden_matrix_is_refused():
    with pytest.raises(ValueError, match="this model has no hidden matrix"):
        param_groups(nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4)))


def test_an_override_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"match no trainable parameter: \['hiden\*'\]"):
        param_groups(LanguageModel(), overrides={"hiden*": "adamw"})


def test_an_unknown_algorithm_in_an_override_is_refused():
    with pytest.raises(ValueError, match=r"overrides\['hidden\*'\]: 'sgd' is not one of"):
        param_groups(LanguageModel(), overrides={"hidden*": "sgd"})


def test_grouped_transposed_convolutions_ask_for_a_decision():
    model = nn.ModuleDict({"up": nn.ConvTranspose1d(4, 4, 3, groups=2), "l": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match=r"up\.weight \[4, 2, 3\] of ConvTranspose1d"):
        param_groups(model)


def test_the_table_reads_the_same_from_groups_and_from_an_optimizer():
    groups = param_groups(LanguageModel(), overrides={"hidden.weight": MatrixView.fused(3, 1)})
    table = describe_groups(groups)
    assert table == describe_groups(NorMuon(groups).param_groups)
    assert table.splitlines()[1].split("  ")[0] == "hidden.weight"
    assert "1 of 3x4, 1 of 1x4" in table
    assert "override 'hidden.weight'" in table


def test_every_trainable_parameter_is_in_exactly_one_group():
    model = LanguageModel()
    names = [name for group in param_groups(model) for name, _ in group["params"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("normuon", r"^0\.bias \[4\]: a 'normuon' group takes matrices, but this parameter has 1"),
        (MatrixView.fused(3, 3), r"^0\.weight \[4, 4\]: the group's view does not fit: blocks="),
    ],
    ids=["a vector", "another shape"],
)
def test_an_override_that_does_not_fit_is_refused_at_once(override, message):
    """Before the groups are printed: the table shows the matrices of every parameter."""
    pattern = "0.*" if override == "normuon" else "0.weight"
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=message):
        param_groups(model, overrides={pattern: override})


def test_an_empty_matrix_keeps_its_width_in_the_table():
    layers = {"empty": nn.Linear(4, 0), "body": nn.Linear(4, 4), "head": nn.Linear(4, 2)}
    assert "1 of 0x4" in describe_groups(param_groups(nn.ModuleDict(layers)))
