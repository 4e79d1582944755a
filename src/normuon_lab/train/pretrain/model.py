"""The model of a run: a transformers causal language model from its configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normuon_lab.errors import InputError, require
from normuon_lab.plan.model_matrices import read_config
from normuon_lab.plan.presets import PRESETS, preset_config
from normuon_lab.train.pretrain.config import ModelConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def transformers_config(model: str) -> PretrainedConfig:
    """The configuration that a name, a path or a Hub name stands for.

    Raises:
        InputError: there is none, or it is of no causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if model in PRESETS:
        return preset_config(model)
    if Path(model).exists():
        config = read_config(model)
    else:
        try:
            config = AutoConfig.from_pretrained(model, trust_remote_code=False)
        except Exception as error:
            known = ", ".join(PRESETS)
            raise InputError(
                f"--model {model} is neither a named model ({known}) nor a file, and the Hub did "
                f"not give it: {_first_line(error)}"
            ) from None
    is_language_model = type(config) in AutoModelForCausalLM._model_mapping
    require(is_language_model, f"--model {model}: {config.model_type} is no causal language model")
    return config


def build_model(config: ModelConfig, *, seed: int) -> nn.Module:
    """The model on the CPU in float32, with weights that depend on `seed` alone.

    The global random state is left as it was found.

    Raises:
        InputError: it cannot be built, or has no weights to start from.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    try:
        if config.pretrained:
            return AutoModelForCausalLM.from_pretrained(
                config.model, use_safetensors=True, trust_remote_code=False, **options
            )
        found = transformers_config(config.model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(found, trust_remote_code=False, **options)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--model {config.model}: {_first_line(error)}") from None


def config_of(model: nn.Module) -> PretrainedConfig:
    """The transformers configuration of a model, of which `nn.Module` says nothing."""
    known: Any = model
    config: PretrainedConfig = known.config
    return config


def config_values(model: nn.Module) -> dict[str, Any]:
    """The transformers configuration of a model, as it is after being written as JSON and read."""
    values: dict[str, Any] = json.loads(config_of(model).to_json_string(use_diff=False))
    return values


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, the units of sharding, recomputing and compiling."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token, float32 `[]`.

    Args:
        model: called with all tokens but the last.
        tokens: int64 `[batch, sequence + 1]`.
    """
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
