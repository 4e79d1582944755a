"""The shapes of a model's parameters, built on the meta device without allocating weights.

`normuon.param_groups` decides which parameters are hidden matrices.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normuon_lab.errors import InputError, require
from normuon_lab.plan.presets import PRESETS, preset_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from normuon import MatrixView

# transformers has no tensor-parallel plan for GPT-2; this is Megatron-LM's split of its layers.
_OWN_TP_PLANS: dict[str, dict[str, str]] = {
    "gpt2": {
        "transformer.h.*.attn.c_attn": "conv1d_colwise",
        "transformer.h.*.attn.c_proj": "conv1d_rowwise",
        "transformer.h.*.mlp.c_fc": "conv1d_colwise",
        "transformer.h.*.mlp.c_proj": "conv1d_rowwise",
    }
}


@dataclass(frozen=True, slots=True)
class ModelParam:
    """One parameter of a model.

    Attributes:
        name: its qualified name.
        shape: whole, not a shard's.
        view: how a hidden matrix is seen as matrices; None for what AdamW takes.
        reason: why it is what it is.
        tp_style: its style in the model's tensor-parallel plan; None if it is not there.
    """

    name: str
    shape: tuple[int, ...]
    view: MatrixView | None
    reason: str
    tp_style: str | None

    @property
    def numel(self) -> int:
        """Its number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelShapes:
    """A model without weights.

    Attributes:
        name: the preset, or the path of the configuration.
        model_type: transformers' name of the architecture.
        params: every trainable parameter.
        groups: its param groups, of parameters on the meta device.
        split_heads: whether heads are separate matrices in them.
        has_tp_plan: whether tensor parallelism is known for the architecture.
    """

    name: str
    model_type: str
    params: tuple[ModelParam, ...]
    groups: list[dict[str, Any]]
    split_heads: bool
    has_tp_plan: bool

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters."""
        return sum(param.numel for param in self.params)

    @property
    def num_hidden_parameters(self) -> int:
        """Elements of the hidden matrices."""
        return sum(param.numel for param in self.params if param.view is not None)


def model_shapes(model: str, *, split_heads: bool = False) -> ModelShapes:
    """The shapes of a preset, or of a transformers config.json or the folder of one.

    Raises:
        InputError: no such preset or file, no configuration, a model without hidden matrices, or
            without a head to split.
    """
    config = preset_config(model) if model in PRESETS else read_config(model)
    return shapes_of(_on_meta(config, model), name=model, split_heads=split_heads)


def shapes_of(model: nn.Module, *, name: str, split_heads: bool = False) -> ModelShapes:
    """The shapes of a transformers model, which may be on the meta device.

    Raises:
        InputError: a parameter is ambiguous, because only its shape is known.
    """
    from normuon import param_groups

    model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
    plan: Mapping[str, str] = dict(getattr(model, "_tp_plan", None) or {})
    plan = plan or _OWN_TP_PLANS.get(model_type, {})
    try:
        groups = param_groups(model, split_heads=split_heads)
    except ValueError as error:
        raise InputError(f"{name}: {error}") from None
    params = tuple(
        ModelParam(
            name=param_name,
            shape=tuple(param.shape),
            view=group.get("view"),
            reason=reason,
            tp_style=tp_style_of(param_name, plan),
        )
        for group in groups
        for (param_name, param), reason in zip(group["params"], group["reasons"], strict=True)
    )
    return ModelShapes(name, model_type, params, groups, split_heads, bool(plan))


def tp_style_of(name: str, plan: Mapping[str, str]) -> str | None:
    """A parameter's style in a tensor-parallel plan, by its module or its own name.

    Example:
        >>> tp_style_of("h.3.mlp.up_proj.weight", {"h.*.mlp.up_proj": "colwise"})
        'colwise'
    """
    pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
    for key in (pattern, pattern.rpartition(".")[0]):
        if key in plan:
            return plan[key]
    return None


def read_config(model: str) -> PretrainedConfig:
    """The transformers configuration in a config.json, or in a folder that has one.

    Raises:
        InputError: it cannot be read, or the installed transformers does not know it.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(PRESETS)
        raise InputError(f"{model} is neither a preset ({known}) nor a file") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise InputError(f"{path} is not a transformers configuration: invalid JSON") from None
    kind = values.get("model_type") if isinstance(values, dict) else None
    if not isinstance(kind, str):
        raise InputError(f"{path} is not a transformers configuration: it has no model_type")
    from transformers import CONFIG_MAPPING, AutoConfig

    require(
        kind in CONFIG_MAPPING,
        f"{path}: the installed transformers does not know the model_type {kind!r}",
    )
    options = {key: value for key, value in values.items() if key not in ("model_type", "auto_map")}
    # A quantised checkpoint is trained, if at all, from its full-precision shapes.
    options.pop("quantization_config", None)
    try:
        return AutoConfig.for_model(kind, **options)
    except Exception as error:
        raise InputError(f"{path} is not a usable configuration: {_one_line(error)}") from None


def _on_meta(config: PretrainedConfig, name: str) -> nn.Module:
    import torch
    from transformers import AutoModel, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    is_language_model = type(config) in AutoModelForCausalLM._model_mapping
    factory = AutoModelForCausalLM if is_language_model else AutoModel
    try:
        with torch.device("meta"):
            model: nn.Module = factory.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise InputError(f"{name}: transformers cannot build it: {_one_line(error)}") from None
    return model


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
