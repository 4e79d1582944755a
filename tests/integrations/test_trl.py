"""NorMuon in TRL's trainers, which are transformers' Trainers: rates, decay and schedule."""

from __future__ import annotations

import pytest
import torch

from normuon import NorMuon, param_groups

pytest.importorskip("accelerate")
pytest.importorskip("trl")
import trl
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from normuon.integrations.transformers import trainer_optimizer

WORDS = ["[PAD]", "[EOS]", *"abcdefgh"]


def small_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def small_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(WORDS)}, unk_token="[PAD]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", eos_token="[EOS]")


ARGUMENTS = {
    "max_steps": 4,
    "learning_rate": 3e-4,
    "weight_decay": 0.07,
    "adam_beta2": 0.98,
    "lr_scheduler_type": "linear",
    "gradient_accumulation_steps": 2,
    "per_device_train_batch_size": 2,
    "bf16": False,
    "report_to": [],
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}
TEXTS = Dataset.from_dict({"text": ["a b c d e f g h"] * 16})
PAIRS = Dataset.from_dict(
    {"prompt": ["a b"] * 16, "chosen": [" c d e"] * 16, "rejected": [" h g f"] * 16}
)
PROMPTS = Dataset.from_dict({"prompt": ["a b c"] * 16})


def sft(args, **how):
    return trl.SFTTrainer(args=args, train_dataset=TEXTS, **how)


def dpo(args, **how):
    return trl.DPOTrainer(args=args, train_dataset=PAIRS, ref_model=small_model(), **how)


def grpo(args, **how):
    def longer_is_better(completions, **_):
        return [float(len(set(text))) for text in completions]

    return trl.GRPOTrainer(args=args, train_dataset=PROMPTS, reward_funcs=longer_is_better, **how)


def build(make, tmp_path, model=None, **how):
    """A trainer on a small model, with the arguments above."""
    options = dict(ARGUMENTS)
    if make is grpo:
        options |= {"num_generations": 2, "max_completion_length": 4}
    config = {sft: trl.SFTConfig, dpo: trl.DPOConfig, grpo: trl.GRPOConfig}[make]
    return make(
        config(str(tmp_path), **options),
        model=model or small_model(),
        processing_class=small_tokenizer(),
        **how,
    )


@pytest.mark.parametrize("make", [sft, dpo, grpo])
def test_the_arguments_of_every_trl_trainer_are_respected(make, tmp_path, capsys):
    """Also where the constructor has no `optimizer_cls_and_kwargs`: the attribute serves."""
    trainer = build(make, tmp_path)
    start = {name: param.detach().clone() for name, param in trainer.model.named_parameters()}
    trainer.optimizer_cls_and_kwargs = trainer_optimizer(trainer.args)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert isinstance(optimizer, NorMuon)
    by_algorithm = {group["algorithm"]: group for group in optimizer.param_groups}
    assert set(by_algorithm) == {"normuon", "adamw"}
    assert {group["initial_lr"] for group in optimizer.param_groups} == {3e-4}
    assert {group["lr"] for group in optimizer.param_groups} == {0.0}, "decayed to zero"
    assert by_algorithm["normuon"]["weight_decay"] == 0.07
    assert by_algorithm["adamw"]["weight_decay"] == 0.0
    assert by_algorithm["adamw"]["betas"] == (0.9, 0.98)
    printed = capsys.readouterr().out
    assert "lr 0.0003 (TrainingArguments.learning_rate)" in printed
    assert "schedule linear" in printed
    moved = [n for n, p in trainer.model.named_parameters() if not torch.equal(p, start[n])]
    assert len(moved) == len(start)


def test_sfts_own_argument_is_the_step_of_an_optimizer_built_by_hand(tmp_path):
    by_factory = build(
        sft,
        tmp_path,
        optimizer_cls_and_kwargs=trainer_optimizer(
            trl.SFTConfig(str(tmp_path), **ARGUMENTS), quiet=True
        ),
    )
    model = small_model()
    options = {"lr": 3e-4, "weight_decay": 0.07, "betas": (0.9, 0.98)}
    optimizer = NorMuon(param_groups(model), **options)
    by_hand = build(sft, tmp_path, model=model, optimizers=(optimizer, None))
    for trainer in (by_factory, by_hand):
        trainer.train()
    for ours, theirs in zip(by_factory.model.parameters(), by_hand.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
