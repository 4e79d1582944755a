"""NorMuon by the Trainer's own arguments, with the real Trainer."""

from __future__ import annotations

import pytest
import torch

from normuon import NorMuon, param_groups

pytest.importorskip("accelerate")
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from normuon.integrations.transformers import TrainerOptimizer, trainer_optimizer

SAMPLES = [
    {"input_ids": torch.arange(i, i + 16), "labels": torch.arange(i, i + 16)} for i in range(48)
]


def small_model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
        )
    )


def arguments(tmp_path, **options):
    given = {
        "max_steps": 4,
        "learning_rate": 5e-5,
        "weight_decay": 0.07,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-7,
        "lr_scheduler_type": "linear",
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    return TrainingArguments(str(tmp_path), **given)


def trained(args, **how):
    model = how.pop("model", None) or small_model()
    trainer = Trainer(model=model, args=args, train_dataset=SAMPLES, **how)
    trainer.train()
    return trainer


def test_the_trainers_arguments_are_respected(tmp_path, capsys):
    args = arguments(tmp_path)
    trainer = trained(args, optimizer_cls_and_kwargs=trainer_optimizer(args))
    optimizer = trainer.optimizer.optimizer  # Accelerate's wrapper has it.
    assert isinstance(optimizer, NorMuon)
    by_algorithm = {group["algorithm"]: group for group in optimizer.param_groups}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {5e-5}
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}, "decayed to zero"
    assert by_algorithm["normuon"]["weight_decay"] == 0.07
    assert by_algorithm["adamw"]["weight_decay"] == 0.0
    assert by_algorithm["adamw"]["betas"] == (0.9, 0.98)
    assert by_algorithm["adamw"]["adamw_eps"] == 1e-7
    printed = capsys.readouterr().out
    assert "lr 5e-05 (TrainingArguments.learning_rate)" in printed
    assert (
        "weight_decay 0.07 (TrainingArguments.weight_decay) of matrices; schedule linear" in printed
    )
    assert "mlp.up_proj.weight" in printed


def test_it_is_the_step_of_an_optimizer_built_by_hand(tmp_path):
    args = arguments(tmp_path)
    by_factory = trained(args, optimizer_cls_and_kwargs=trainer_optimizer(args, quiet=True))
    model = small_model()
    options = {"lr": 5e-5, "weight_decay": 0.07, "betas": (0.9, 0.98), "adamw_eps": 1e-7}
    by_hand = trained(args, model=model, optimizers=(NorMuon(param_groups(model), **options), None))
    for ours, theirs in zip(by_factory.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_options_win_and_nothing_is_printed_when_quiet(tmp_path, capsys):
    args = arguments(tmp_path)
    how = trainer_optimizer(
        args,
        lr=1e-3,
        equilibrate=True,
        quiet=True,
        split_heads=True,
        overrides={"*.down_proj.weight": "adamw"},
        other={"lr": 3e-4},
    )
    optimizer = trained(args, optimizer_cls_and_kwargs=how).optimizer.optimizer
    groups = {name: group for group in optimizer.param_groups for name in group["param_names"]}
    assert groups["model.layers.0.mlp.down_proj.weight"]["algorithm"] == "adamw"
    assert groups["model.layers.0.self_attn.q_proj.weight"]["view"].heads == 4
    assert groups["model.layers.0.self_attn.q_proj.weight"]["initial_lr"] == 1e-3
    assert groups["lm_head.weight"]["initial_lr"] == 3e-4
    assert optimizer.defaults["equilibrate"]
    assert "NorMuon" not in capsys.readouterr().out


def test_the_rate_is_read_when_the_optimizer_is_built(tmp_path):
    args = arguments(tmp_path)
    how = trainer_optimizer(args, quiet=True)
    args.learning_rate = 2e-4
    optimizer = trained(args, optimizer_cls_and_kwargs=how).optimizer.optimizer
    assert {group["initial_lr"] for group in optimizer.param_groups} == {2e-4}


def test_arguments_that_would_mean_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"optim_args='momentum=0.9' is for optimizers that trans"):
        trainer_optimizer(arguments(tmp_path, optim_args="momentum=0.9"))


def test_a_trainer_without_factories_says_so():
    with pytest.raises(ImportError, match="takes optimizer classes only: upgrade it"):
        TrainerOptimizer([{"params": []}], args=None)


def test_frozen_parameters_are_left_out(tmp_path):
    model = small_model()
    model.model.embed_tokens.requires_grad_(False)
    args = arguments(tmp_path)
    how = trainer_optimizer(args, quiet=True)
    optimizer = trained(args, model=model, optimizer_cls_and_kwargs=how).optimizer.optimizer
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert "model.embed_tokens.weight" not in names
