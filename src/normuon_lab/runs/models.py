"""Language models from transformers' classes, built from a configuration with random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from normuon_lab.runs.config import ModelConfig


def build_model(config: ModelConfig, *, seed: int) -> nn.Module:
    """The model of `config`, float32, on the CPU, with weights that depend on `seed` alone.

    The global random state is left as it was found.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _llama(config) if config.family == "llama" else _gpt2(config)


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token; both arguments are int64 `[batch, sequence]`."""
    logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def hidden_matrix_kinds(config: ModelConfig) -> tuple[str, ...]:
    """Endings of the names of the matrices whose updates the report draws."""
    if config.family == "llama":
        return ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


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
            attn_implementation="sdpa",
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
            attn_implementation="sdpa",
        )
    )
