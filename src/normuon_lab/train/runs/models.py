"""Language models from transformers' classes, built from a configuration with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normuon_lab.train.runs.config import NO_TARGET, ModelConfig

# Every configuration of transformers takes it, and none lists it.
_ATTENTION: dict[str, Any] = {"attn_implementation": "sdpa"}


def build_model(config: ModelConfig, *, seed: int) -> nn.Module:
    """The model of `config`, float32, on the CPU, with weights that depend on `seed` alone.

    The global random state is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _llama(config) if config.family == "llama" else _gpt2(config)


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per target.

    Args:
        model: a causal language model of transformers.
        inputs: int64 `[batch, sequence]`.
        targets: the same shape; NO_TARGET where nothing is to be predicted.
    """
    loss, _ = _loss_and_logits(model, inputs, targets)
    return loss


def next_token_scores(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the share of targets whose logit is the largest."""
    loss, logits = _loss_and_logits(model, inputs, targets)
    num_correct = (logits.argmax(dim=-1) == targets).sum()
    return loss, num_correct / (targets != NO_TARGET).sum()


def hidden_matrix_kinds(config: ModelConfig) -> tuple[str, ...]:
    """Endings of the names of the matrices whose updates the report draws."""
    if config.family == "llama":
        return ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def _loss_and_logits(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)
    return loss, logits


def _llama(config: ModelConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.width,
            intermediate_size=config.mlp_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            max_position_embeddings=config.sequence_length,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            **_ATTENTION,
        )
    )


def _gpt2(config: ModelConfig) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_embd=config.width,
            n_inner=config.mlp_width,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            n_positions=config.sequence_length,
            # Dropout would draw random numbers between the arms' shared data order.
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            **_ATTENTION,
        )
    )
