"""The model of a run: a transformers causal language model, its loss, and its FLOPs per token."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from normuon_lab.data.tokenizer import HubAnswer, hub_answer
from normuon_lab.errors import InputError, first_line, require
from normuon_lab.plan.model_matrices import read_config
from normuon_lab.plan.presets import PRESETS, preset_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NO_TARGET = -100
"""Stands where nothing is to be predicted; cross-entropy leaves it out."""


def build_model(config: PretrainedConfig, *, seed: int = 0, device: str = "cpu") -> nn.Module:
    """The model of a configuration in float32, with weights that depend on `seed` alone.

    The global random state is left as it was found.

    Args:
        config: of a causal language model.
        seed: of the initial weights.
        device: where to; "meta" takes no memory, and there weights mean nothing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, dtype=torch.float32, attn_implementation="sdpa"
        )
    return model


def build_named_model(name: str, *, seed: int, pretrained: bool = False) -> nn.Module:
    """The model that `--model` names, on the CPU in float32.

    If `pretrained`, with the safetensors weights beside the configuration, not random ones.

    Raises:
        InputError: it cannot be built, or has no weights to start from.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    hub = hub_answer(name, file="model.safetensors") if pretrained else HubAnswer(local_only=False)
    try:
        if not pretrained:
            return build_model(transformers_config(name), seed=seed)
        logging.set_verbosity_error()
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            name,
            local_files_only=hub.local_only,
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            attn_implementation="sdpa",
        )
        return model
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"--model {name}: {hub.failure or first_line(error)}") from None


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
        hub = hub_answer(model, file="config.json")
        try:
            config = AutoConfig.from_pretrained(
                model, trust_remote_code=False, local_files_only=hub.local_only
            )
        except Exception as error:
            known = ", ".join(PRESETS)
            raise InputError(
                f"--model {model} is neither a named model ({known}) nor a file, and the Hub did "
                f"not give it: {hub.failure or first_line(error)}"
            ) from None
    is_language_model = type(config) in AutoModelForCausalLM._model_mapping
    require(
        is_language_model, f"--model {model}: {config.model_type} is not a causal language model"
    )
    return config


def config_of(model: nn.Module) -> PretrainedConfig:
    """The transformers configuration of a model, of which `nn.Module` says nothing."""
    known: Any = model
    config: PretrainedConfig = known.config
    return config


def config_values(model: nn.Module) -> dict[str, Any]:
    """The transformers configuration of a model, as it is after being written as JSON and read."""
    values: dict[str, Any] = json.loads(config_of(model).to_json_string(use_diff=False))
    return values


def num_parameters(model: nn.Module) -> int:
    """Elements of all parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, the units of sharding, recomputing and compiling."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    return [module for module in model.modules() if type(module).__name__ in names]


def next_token_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per target, float32 `[]`.

    Args:
        model: a causal language model of transformers.
        inputs: int64 `[batch, sequence]`.
        targets: the same shape; `NO_TARGET` where nothing is to be predicted.
    """
    return _loss_and_logits(model, inputs, targets)[0]


def next_token_scores(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The loss, and the share of targets whose logit is the largest."""
    loss, logits = _loss_and_logits(model, inputs, targets)
    num_correct = (logits.argmax(dim=-1) == targets).sum()
    return loss, num_correct / (targets != NO_TARGET).sum()


def _loss_and_logits(model: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logits = model(input_ids=inputs, use_cache=False).logits.float()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET)
    return loss, logits


@dataclass(frozen=True, slots=True)
class TokenFlops:
    """FLOPs of forward and backward for one token.

    Attributes:
        weights: 6 for each parameter that a token is multiplied with: all but the embedding, which
            is looked up (a tied one is multiplied with as the head).
        attention: 12 x layers x width of all query heads x sequence length, as if every token saw
            all others (Chowdhery et al. 2022, appendix B); recomputed activations do not count.
    """

    weights: int
    attention: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.attention


def flops_per_token(model: nn.Module, *, sequence_length: int) -> TokenFlops:
    """FLOPs of training on one token."""
    known: Any = model
    config = config_of(model)
    embedding, head = known.get_input_embeddings(), known.get_output_embeddings()
    is_tied = head is not None and head.weight is embedding.weight
    looked_up = 0 if is_tied else embedding.weight.numel()
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return TokenFlops(
        weights=6 * (num_parameters(model) - looked_up),
        attention=12 * config.num_hidden_layers * heads * head_width * sequence_length,
    )
