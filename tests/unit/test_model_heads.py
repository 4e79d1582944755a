"""Wrapped, hand-written and peculiar models: where their heads, routers, gains and the rest go."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from normuon import MatrixView, NorMuon, describe_groups, param_groups

WIDTH = 8


def algorithms(model: nn.Module, **kwargs) -> dict[str, str]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(model, **kwargs)
    return {name: group["algorithm"] for group in groups for name, _ in group["params"]}


def model_of(**parts: nn.Module) -> nn.Module:
    model = nn.Module()
    for name, part in parts.items():
        setattr(model, name, part)
    return model


def mlp(**last: nn.Module) -> nn.Module:
    body = nn.Sequential(nn.Linear(6, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
    return model_of(body=body, **(last or {"fc": nn.Linear(WIDTH, 3)}))


class Outer(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.loss = net, nn.CrossEntropyLoss()


WRAPPERS = {
    "compiled": torch.compile,
    "data parallel, compiled": lambda model: torch.compile(nn.DataParallel(model)),
    "data parallel twice": lambda model: nn.DataParallel(nn.DataParallel(model)),
    "an outer module": Outer,
    "two outer modules, compiled": lambda model: torch.compile(Outer(Outer(model))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_a_wrapper_changes_nothing(wrap):
    bare = algorithms(mlp())
    assert list(algorithms(wrap(mlp())).values()) == list(bare.values())
    assert bare["fc.weight"] == "adamw"
    assert bare["body.2.weight"] == "normuon"


def test_checkpoint_wrapped_blocks_change_nothing():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(2))
    model = model_of(embed=nn.Embedding(9, WIDTH), blocks=blocks, head=nn.Linear(WIDTH, 9))
    for index in range(2):
        blocks[index] = checkpoint_wrapper(blocks[index])
    model.head = checkpoint_wrapper(model.head)
    found = algorithms(model)
    assert found["blocks.0._checkpoint_wrapped_module.0.weight"] == "normuon"
    assert found["head._checkpoint_wrapped_module.weight"] == "adamw"


HEADS = [
    *("out", "to_logits", "proj_out", "decoder", "mlp_head", "policy_head", "value_head"),
    *("classifier", "final_layer", "fc", "output", "score", "anything_that_nobody_reads"),
]


@pytest.mark.parametrize("name", HEADS)
def test_a_hand_written_head_is_found(name):
    assert algorithms(mlp(**{name: nn.Linear(WIDTH, 3)}))[f"{name}.weight"] == "adamw"
    deep = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))
    assert algorithms(mlp(**{name: deep}))[f"{name}.1.weight"] == "adamw"


def test_every_head_of_several_is_found():
    found = algorithms(mlp(policy=nn.Linear(WIDTH, 5), value=nn.Linear(WIDTH, 1)))
    assert (found["policy.weight"], found["value.weight"]) == ("adamw", "adamw")
    assert found["body.0.weight"] == found["body.2.weight"] == "normuon"


def test_logits_over_the_vocabulary_are_a_head_wherever_they_are_registered():
    model = model_of(
        readout_of_tokens=nn.Linear(WIDTH, 50),
        embed=nn.Embedding(50, WIDTH),
        hidden=nn.Linear(WIDTH, WIDTH),
        norm=nn.LayerNorm(WIDTH),
    )
    found = algorithms(model)
    assert found["readout_of_tokens.weight"] == "adamw"
    assert found["hidden.weight"] == "normuon"


def test_the_last_matrix_of_a_block_is_no_head():
    block = model_of(proj=nn.Linear(WIDTH, WIDTH), qkv=nn.Linear(WIDTH, 3 * WIDTH))
    model = model_of(embed=nn.Embedding(9, WIDTH), blocks=nn.ModuleList([block]))
    with pytest.warns(UserWarning, match=r"blocks\.0\.qkv\.weight \[24, 8\], takes NorMuon"):
        groups = param_groups(model)
    assert [name for name, _ in groups[0]["params"]] == [
        "blocks.0.proj.weight",
        "blocks.0.qkv.weight",
    ]


def test_a_model_without_a_head_is_told_what_to_write():
    model = nn.Sequential(nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH))
    message = (
        r"no output head was found in this Sequential: its last matrix, 1\.weight \[8, 8\], "
        r"takes NorMuon\. If it is the output layer, pass overrides=\{'1\.weight': 'adamw'\}; if "
        r"it is hidden, overrides=\{'1\.weight': 'normuon'\}"
    )
    with pytest.warns(UserWarning, match=message):
        param_groups(model)
    assert algorithms(model, overrides={"1.weight": "normuon"})["1.weight"] == "normuon"
    assert algorithms(model, overrides={"1.weight": "adamw"})["1.weight"] == "adamw"


class TopKRouter(nn.Linear):
    pass


class TopKGating(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(WIDTH, 4)


@pytest.mark.parametrize(
    ("router", "name"),
    [
        (TopKRouter(WIDTH, 4), "weight"),
        (TopKGating(), "layer.weight"),
        (nn.Linear(WIDTH, 4), "weight"),
    ],
    ids=["a Linear of its own class", "inside a gating", "beside as many experts"],
)
def test_a_router_is_no_matrix(router, name):
    experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
    block = model_of(gate=router, experts=experts, shared_expert_gate=nn.Linear(WIDTH, 1))
    found = algorithms(mlp(moe=block, head=nn.Linear(WIDTH, 3)))
    assert found[f"moe.gate.{name}"] == "adamw"
    assert found["moe.shared_expert_gate.weight"] == "adamw"
    assert found["moe.experts.0.weight"] == "normuon"


class PatchEmbed(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.proj = layer


@pytest.mark.parametrize("layer", [nn.Linear(48, WIDTH), nn.Conv2d(3, WIDTH, 4, 4)], ids=repr)
def test_a_patch_embedding_is_known_by_its_class_or_its_name(layer):
    for name, part in (("stem", PatchEmbed(layer)), ("to_patch_embedding", nn.Sequential(layer))):
        model = model_of(**{name: part}, body=nn.Linear(WIDTH, WIDTH), head=nn.Linear(WIDTH, 3))
        found = algorithms(model)
        assert [a for n, a in found.items() if n.startswith(name)] == ["adamw", "adamw"]
        assert found["body.weight"] == "normuon"


GAINS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "orthogonal": nn.utils.parametrizations.orthogonal,
    "spectral norm, old": nn.utils.spectral_norm,
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change", [*GAINS.values(), nn.utils.weight_norm], ids=[*GAINS, "weight norm, old"]
)
def test_what_a_parametrized_layer_trains_is_no_matrix(change):
    model = mlp()
    model.body[2] = change(model.body[2])
    found = algorithms(model)
    assert {a for name, a in found.items() if name.startswith("body.2")} == {"adamw"}
    assert found["body.0.weight"] == "normuon"


class Extra(nn.Linear):
    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH, 1))
        self.channel_scale = nn.Parameter(torch.ones(WIDTH, 1, 1))
        self.lora_A = nn.Parameter(torch.ones(2, WIDTH))
        self.lora_B = nn.Parameter(torch.ones(WIDTH, 2))


def test_only_a_modules_own_weight_is_its_matrix():
    found = algorithms(mlp(extra=Extra(), head=nn.Linear(WIDTH, 3)))
    assert found["extra.weight"] == found["extra.lora_A"] == "normuon"
    assert found["extra.gain"] == found["extra.channel_scale"] == "adamw"


class Adapter(nn.Module):
    def __init__(self, names: tuple[str, str], down: tuple[int, int], up: tuple[int, int]):
        super().__init__()
        for name, shape in zip(names, (down, up), strict=True):
            self.register_parameter(name, nn.Parameter(torch.ones(shape)))


@pytest.mark.parametrize("names", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
@pytest.mark.parametrize(
    ("down", "up", "neuron_dim"),
    [
        ((4, 24), (32, 4), 0),
        ((24, 4), (4, 32), 1),
        ((4, 24), (24, 4), 0),  # Both products exist: 24 x 24 of rank 4, or 4 x 4 of rank 24.
        ((24, 4), (4, 24), 1),
    ],
)
def test_the_factors_of_an_adapter_say_together_how_they_are_stored(names, down, up, neuron_dim):
    """Once every ``lora_*`` was taken for [out, in], so that neurons were along the rank."""
    (group,) = param_groups(Adapter(names, down, up))
    assert [name for name, _ in group["params"]] == list(names)
    assert group["view"] == MatrixView(neuron_dim=neuron_dim)


@pytest.mark.parametrize(
    ("names", "down", "up"),
    [
        (("lora_A", "lora_B"), (8, 8), (8, 8)),  # Both products exist.
        (("lora_A", "lora_B"), (8, 24), (32, 4)),  # Neither does.
        (("lora_A", "other"), (4, 24), (32, 4)),  # No partner.
        (("lora_A", "lora_middle"), (4, 24), (32, 4)),
    ],
)
def test_factors_whose_shapes_do_not_say_it_are_asked_about(names, down, up):
    with pytest.raises(
        ValueError, match=r"these parameters may or may not be hidden matrices: .*Adapter\.lora_A"
    ):
        param_groups(Adapter(names, down, up))


@pytest.mark.parametrize("name", ["weight_hh_l1", "weight_ih_l1_reverse"])
def test_old_weight_norm_is_known_on_every_layer_of_a_recurrent_module(name):
    """Once only the first layer's were, and the others' directions took NorMuon as matrices."""
    model = nn.ModuleDict(
        {"rnn": nn.LSTM(8, 16, num_layers=2, bidirectional=True), "head": nn.Linear(32, 3)}
    )
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model["rnn"], name)
    found = algorithms(model)
    assert found[f"rnn.{name}_v"] == found[f"rnn.{name}_g"] == "adamw"
    assert found["rnn.weight_hh_l0"] == "normuon"


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.mixing, self.other = (nn.Parameter(torch.ones(4, WIDTH)) for _ in range(2))
        self.bias = nn.Parameter(torch.ones(4))


def test_one_override_is_enough_for_an_unknown_class():
    model = mlp(layers=nn.ModuleList(Mixing() for _ in range(3)), head=nn.Linear(WIDTH, 3))
    with pytest.raises(
        ValueError, match=r"layers\.0\.mixing \[4, 8\] of Mixing\.mixing and 2 more"
    ):
        param_groups(model)
    with pytest.raises(ValueError, match=r"overrides=\{Mixing: \.\.\.\}.*'normuon'.*'adamw'"):
        param_groups(model)
    found = algorithms(model, overrides={Mixing: "normuon"})
    assert found["layers.2.mixing"] == found["layers.2.other"] == "normuon"
    assert found["layers.2.bias"] == "adamw"


def test_overrides_do_not_mind_wrappers():
    model = torch.compile(nn.DataParallel(mlp()))
    found = algorithms(model, overrides={"body.0.weight": "adamw"})
    assert found["_orig_mod.module.body.0.weight"] == "adamw"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: param_groups(mlp().parameters()), TypeError, "needs a torch.nn.Module"),
        (lambda: param_groups(mlp(), overrides={"pos": 3}), ValueError, r"overrides\['pos'\]=3"),
        (lambda: param_groups(mlp(), overrides={3: "adamw"}), ValueError, "a name, a pattern or"),
        (
            lambda: param_groups(mlp(fc=nn.LazyLinear(3))),
            ValueError,
            "fc.weight: this parameter of a lazy module",
        ),
        (
            lambda: param_groups(mlp(), hidden={"learning_rate": 1}),
            ValueError,
            "hidden: 'learning_rate' is not an option of a group; did you mean 'lr'",
        ),
        (lambda: param_groups(mlp(), other={"wd": 0.1}), ValueError, "did you mean 'weight_decay'"),
    ],
)
def test_a_mistake_gets_one_clear_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_equal_layers_are_one_line_of_the_collapsed_table():
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(3))
    model = model_of(embed=nn.Embedding(9, WIDTH), blocks=blocks, lm_head=nn.Linear(WIDTH, 9))
    lines = describe_groups(param_groups(model), collapse=True).splitlines()
    assert lines[1].split()[:5] == ["blocks.*.*.weight", "(3)", "[8,", "8]", "normuon"]
    assert lines[-2:] == [
        "normuon: 3 parameters, 192 elements",
        "adamw: 6 parameters, 177 elements",
    ]
    assert (
        NorMuon(param_groups(model, overrides={"blocks.*.weight": MatrixView.linear()})) is not None
    )


def test_every_cluster_of_an_adaptive_softmax_gives_logits():
    """Its clusters lie in a ModuleList, whose items are otherwise taken for repeated blocks."""
    softmax = nn.AdaptiveLogSoftmaxWithLoss(WIDTH, 40, cutoffs=[10, 20], div_value=2.0)
    found = algorithms(mlp(loss=softmax))
    heads = {"loss.head.weight", "loss.tail.0.1.weight", "loss.tail.1.1.weight"}
    assert {name for name in heads if found[name] == "adamw"} == heads
    assert {found["loss.tail.0.0.weight"], found["loss.tail.1.0.weight"]} == {"normuon"}
