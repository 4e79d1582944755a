"""Named model configurations: the paper's, common ones for plans, and small ones.

Only sizes: callers build models from them.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from normuon_lab.errors import require

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def _gpt2(*, layers: int, width: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }


def _llama(
    *,
    layers: int,
    width: int,
    mlp_width: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    positions: int,
    **others: Any,
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": mlp_width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        **others,
    }


def _paper_llama(depth: int) -> dict[str, Any]:
    """The paper's family: width 128 d, d query heads, d / 4 key-value heads, MLP width 4 * 128 d.

    The paper gives neither the vocabulary nor whether the MLP is gated. Matched by count: without a
    gate the models would have 0.8B and 4.0B parameters, so gate, up and down are three matrices;
    with Llama's vocabulary of 32,000 and an untied output head they have 1.104B and 5.445B, the
    paper's 1.1B and 5.4B. (Tied they would have 1.04B and 5.33B.)
    """
    return _llama(
        layers=depth,
        width=128 * depth,
        mlp_width=4 * 128 * depth,
        heads=depth,
        key_value_heads=depth // 4,
        vocabulary=32_000,
        positions=4096,
    )


# Over bytes: they train on a CPU.
_small_llama = partial(_llama, vocabulary=256, positions=1024, bos_token_id=None, eos_token_id=None)
_llama3 = partial(
    _llama,
    key_value_heads=8,
    vocabulary=128_256,
    positions=8192,
    rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
)

PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-124m": _gpt2(layers=12, width=768, heads=12),
    "gpt2-350m": _gpt2(layers=24, width=1024, heads=16),
    "llama-1.1b": _paper_llama(16),
    "llama-5.4b": _paper_llama(28),
    # 0.1M and 4.5M parameters.
    "llama-tiny": _small_llama(layers=2, width=64, mlp_width=176, heads=4, key_value_heads=2),
    "llama-small": _small_llama(layers=6, width=256, mlp_width=688, heads=8, key_value_heads=4),
    "llama3-8b": _llama3(layers=32, width=4096, mlp_width=14_336, heads=32),
    "llama3-70b": _llama3(layers=80, width=8192, mlp_width=28_672, heads=64),
    "mixtral-8x7b": {
        "model_type": "mixtral",
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
}
"""Arguments of `transformers.AutoConfig.for_model`."""


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

    return AutoConfig.for_model(**PRESETS[name])
