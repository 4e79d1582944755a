"""Named model configurations: the paper's, those that plans are usually asked for, and small ones.

Only sizes are here; building a model from a configuration is the caller's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from normuon_lab.errors import require

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class Preset:
    """One named model.

    Attributes:
        description: what it is, for people.
        model_type: transformers' name of the architecture.
        options: arguments of its configuration class.
    """

    description: str
    model_type: str
    options: Mapping[str, Any]


def _gpt2(*, layers: int, width: int, heads: int, description: str) -> Preset:
    options = {
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return Preset(description, "gpt2", options)


def _paper_llama(depth: int, *, description: str) -> Preset:
    """The paper's family: width 128 d, d query heads, d / 4 key-value heads, MLP width 4 * 128 d.

    The paper gives neither the vocabulary nor whether the MLP is gated. Matched by count: without a
    gate the models would have 0.8B and 4.0B parameters, so gate, up and down are three matrices;
    with Llama's vocabulary of 32,000 and an untied output head they have 1.104B and 5.445B, the
    paper's 1.1B and 5.4B. (Tied they would have 1.04B and 5.33B.)
    """
    options = {
        "vocab_size": 32_000,
        "hidden_size": 128 * depth,
        "intermediate_size": 4 * 128 * depth,
        "num_hidden_layers": depth,
        "num_attention_heads": depth,
        "num_key_value_heads": depth // 4,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }
    return Preset(description, "llama", options)


def _small_llama(
    *, layers: int, width: int, heads: int, mlp_width: int, description: str
) -> Preset:
    """A Llama over bytes, which trains on a CPU."""
    options = {
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return Preset(description, "llama", options)


def _llama3(*, layers: int, width: int, heads: int, mlp_width: int, description: str) -> Preset:
    options = {
        "vocab_size": 128_256,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        "tie_word_embeddings": False,
    }
    return Preset(description, "llama", options)


PRESETS: dict[str, Preset] = {
    "gpt2-124m": _gpt2(layers=12, width=768, heads=12, description="GPT-2 small"),
    "gpt2-350m": _gpt2(layers=24, width=1024, heads=16, description="GPT-2 medium"),
    "llama-1.1b": _paper_llama(16, description="the paper's 1.1B model, depth 16"),
    "llama-5.4b": _paper_llama(28, description="the paper's 5.4B model, depth 28"),
    "llama-tiny": _small_llama(
        layers=2, width=64, heads=4, mlp_width=176, description="0.1M parameters over bytes"
    ),
    "llama-small": _small_llama(
        layers=6, width=256, heads=8, mlp_width=688, description="4.5M parameters over bytes"
    ),
    "llama3-8b": _llama3(
        layers=32, width=4096, heads=32, mlp_width=14_336, description="Llama 3 8B"
    ),
    "llama3-70b": _llama3(
        layers=80, width=8192, heads=64, mlp_width=28_672, description="Llama 3 70B"
    ),
    "mixtral-8x7b": Preset(
        "Mixtral 8x7B",
        "mixtral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
}


def preset_config(name: str) -> PretrainedConfig:
    """The transformers configuration of a preset.

    Raises:
        InputError: there is no such preset; the message lists them.

    Example:
        >>> preset_config("llama-1.1b").num_key_value_heads
        4
    """
    require(name in PRESETS, f"unknown preset {name}; known are {', '.join(PRESETS)}")
    from transformers import AutoConfig

    preset = PRESETS[name]
    return AutoConfig.for_model(preset.model_type, **preset.options)
