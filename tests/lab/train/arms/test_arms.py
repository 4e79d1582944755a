"""What the arms make of their learning rate and options."""

from __future__ import annotations

import json
import math

import pytest
import torch

from normuon import NorMuon, suggest_lr
from normuon_lab.errors import InputError
from normuon_lab.study.evidence.protocol import MAIN_ARMS, OTHER_ARMS, RECENT_RIVALS
from normuon_lab.train.arms.builders import split_parameters
from normuon_lab.train.arms.options import ArmOptions
from normuon_lab.train.arms.registry import ARMS, PRETRAINING_ARMS
from normuon_lab.train.model import build_model
from normuon_lab.train.runs.config import ModelConfig, RunSpec
from normuon_lab.train.runs.train import train_run

LR = 0.004
BY_HEAD = ("normuon-heads", "normuon-heads-equilibrated")
NORMUON_ARMS = (
    *("normuon", "normuon-original", "normuon-short"),
    *(*BY_HEAD, "normuon-equilibrated", "normuon-kahan"),
)


def tiny_model(family="llama"):
    config = ModelConfig(family=family, num_layers=1, width=16, num_heads=2, mlp_width=48)
    return build_model(config.to_transformers(), seed=0)


def step_once(name, *, family="llama"):
    """The first step of every hidden matrix, by name, from the same gradients for every arm."""
    model = tiny_model(family)
    optimizers = ARMS[name].build(model, LR, ArmOptions(weight_decay=0.0))
    hidden, _ = split_parameters(model)
    before = {matrix: parameter.detach().clone() for matrix, parameter in hidden}
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()
    return {matrix: before[matrix] - parameter.detach() for matrix, parameter in hidden}


def test_the_arms_are_those_of_the_protocol():
    # Published runs have float32 weights, where a Kahan sum changes nothing.
    assert set(ARMS) == {*MAIN_ARMS, *OTHER_ARMS, *RECENT_RIVALS, "normuon-kahan"}
    assert tuple(PRETRAINING_ARMS) == MAIN_ARMS


@pytest.mark.parametrize("arm", [name for name in ARMS if name not in NORMUON_ARMS])
def test_options_of_normuon_are_refused_by_other_arms(arm):
    with pytest.raises(InputError, match=f"the arm '{arm}'.*ns_steps"):
        ARMS[arm].build(tiny_model(), LR, ArmOptions(normuon=(("ns_steps", 3),)))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("ns_stepz", "did you mean ns_steps"), ("frobnicate", "known are "), ("lr", "known are ")],
)
def test_a_keyword_that_normuon_does_not_take_is_named_with_the_nearest(name, hint):
    with pytest.raises(InputError, match=f"no arm takes {name} as an option.*{hint}"):
        ARMS["normuon"].build(tiny_model(), LR, ArmOptions(normuon=((name, 3),)))


def test_options_come_back_from_their_plain_values():
    options = ArmOptions(betas=(0.8, 0.9), ns_dtype=torch.bfloat16, normuon=(("ns_steps", 6),))
    assert ArmOptions.from_json(json.loads(json.dumps(options.to_json()))) == options
    with pytest.raises(InputError, match="no arm has the option adam_rate; known are adam_lr, "):
        ArmOptions.from_json({"adam_rate": 0.1})


@pytest.mark.parametrize("arm", NORMUON_ARMS)
def test_options_of_normuon_overrule_what_its_arms_fix(arm):
    pairs = (("adjust_lr_fn", "match_rms_adamw"), ("neuron_axis", "row"), ("ns_steps", 3))
    (optimizer,) = ARMS[arm].build(tiny_model(), LR, ArmOptions(normuon=pairs))
    assert isinstance(optimizer, NorMuon)
    for group in optimizer.param_groups:
        assert {name: group[name] for name, _ in pairs} == dict(pairs)
        # Nothing is left of the conversion that the original scaling takes.
        assert group["lr"] == LR


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_original_scaling_is_given_the_learning_rate_of_equal_steps(family):
    """Over all hidden matrices together an orthogonal direction moves as far as the paper's does.

    The direction has singular values of 0.7 to 1.2, hence the room.
    """

    def root_mean_square(steps):
        entries = sum(step.numel() for step in steps.values())
        return math.sqrt(sum(float(step.square().sum()) for step in steps.values()) / entries)

    original = root_mean_square(step_once("normuon-original", family=family))
    assert original == pytest.approx(0.2 * LR, rel=0.2)
    paper = root_mean_square(step_once("normuon", family=family))
    assert paper == pytest.approx(0.2 * LR, rel=1e-3)


def test_the_original_scaling_takes_larger_steps_where_matrices_are_narrow():
    steps = step_once("normuon-original")
    up, down = (steps[f"model.layers.0.mlp.{kind}_proj.weight"] for kind in ("up", "down"))
    # lr / sqrt(n) for n columns, whatever the rows: 16 and 48 of them.
    ratio = float(up.square().mean().sqrt() / down.square().mean().sqrt())
    assert ratio == pytest.approx(math.sqrt(3), rel=0.2)


def test_the_original_scaling_keeps_decay_and_the_learning_rate_of_adamw():
    model = tiny_model()
    (optimizer,) = ARMS["normuon-original"].build(model, LR, ArmOptions(weight_decay=0.3))
    for group in optimizer.param_groups:
        if group["algorithm"] == "adamw":
            assert (group["lr"], group["weight_decay"]) == (LR, 0.0)
        else:
            came_from = suggest_lr(group["lr"], coming_from="muon_original", to=optimizer)
            assert came_from == pytest.approx(LR)
            assert group["lr"] * group["weight_decay"] == pytest.approx(0.3 * LR)


def test_the_short_axis_scales_columns_of_wide_matrices_alone():
    short, rows = step_once("normuon-short"), step_once("normuon")
    wide = "model.layers.0.mlp.down_proj.weight"
    norms = short[wide].norm(dim=0)
    torch.testing.assert_close(norms, norms.mean().expand(48), rtol=1e-3, atol=0)
    norms = rows[wide].norm(dim=1)
    torch.testing.assert_close(norms, norms.mean().expand(16), rtol=1e-3, atol=0)
    for name, step in short.items():
        assert torch.equal(step, rows[name]) == (name != wide)


QUERIES, OUTPUT = (f"model.layers.0.self_attn.{kind}_proj.weight" for kind in "qo")


@pytest.mark.parametrize("arm", [*BY_HEAD, "muon-heads-equilibrated"])
def test_arms_by_head_give_every_head_an_orthogonal_step_of_its_own(arm):
    steps = step_once(arm)
    for head in steps[QUERIES].chunk(2):
        # Rows orthogonal within the head, at the size of an AdamW step: 8 x 16, so 0.2 lr 4 each.
        gram = head @ head.T / (0.2 * LR * 4) ** 2
        assert float((gram - torch.eye(8)).abs().max()) < 0.6
    whole = step_once("normuon-equilibrated" if "equilibrated" in arm else "normuon")
    assert not torch.allclose(steps[QUERIES], whole[QUERIES], rtol=0.05)
    if arm != "muon-heads-equilibrated":
        torch.testing.assert_close(steps[OUTPUT], whole[OUTPUT])


def test_equilibrated_arms_turn_the_switch_on():
    for arm in ("normuon-equilibrated", "normuon-heads-equilibrated", "muon-heads-equilibrated"):
        (optimizer,) = ARMS[arm].build(tiny_model(), LR, ArmOptions())
        algorithms = {group["algorithm"] for group in optimizer.param_groups}
        assert algorithms == {arm.split("-")[0], "adamw"}
        assert all(group["equilibrate"] for group in optimizer.param_groups)


def test_hyperball_steps_are_relative_to_the_weights_and_decay_nothing():
    model = tiny_model()
    norms = {name: float(matrix.norm()) for name, matrix in split_parameters(model)[0]}
    for name, step in step_once("hyperball").items():
        # A step along the sphere, of which going back to the radius leaves out a millionth.
        assert float(step.norm()) == pytest.approx(LR * norms[name], rel=0.01)


def test_ema_nesterov_looks_ahead_of_every_parameter_after_all_others_stepped():
    model = tiny_model()
    *others, ahead = ARMS["ema-nesterov"].build(model, LR, ArmOptions(weight_decay=0.0))
    plain = ARMS["muon"].build(tiny_model(), LR, ArmOptions(weight_decay=0.0))
    assert [type(optimizer) for optimizer in others] == [type(optimizer) for optimizer in plain]
    (group,) = ahead.param_groups
    assert set(group["params"]) == set(model.parameters())
    assert group["lr"] == 1.0


@pytest.mark.parametrize(
    "arm",
    [
        *("adam-mini", "normuon-original", "normuon-short", *BY_HEAD, "muon-heads-equilibrated"),
        *RECENT_RIVALS,
    ],
)
def test_an_arm_trains_with_rates_of_its_own(corpus, experiment, arm):
    spec = RunSpec(
        arm=arm, seed=0, learning_rate=LR, options=ArmOptions(adam_lr=0.008, weight_decay=0.0)
    )
    record = train_run(spec, experiment, corpus, probe_updates=True)
    assert record.final_loss < record.eval_losses[0]
    assert len(record.updates) == 12
