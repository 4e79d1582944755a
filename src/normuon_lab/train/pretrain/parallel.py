"""Spreads a model over the ranks: tensor parallelism, recomputing, compiling, FSDP2, dtypes."""

from __future__ import annotations

import fnmatch
import re
import shutil
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from normuon_lab.errors import InputError, require
from normuon_lab.train.pretrain.config import ModelConfig
from normuon_lab.train.pretrain.model import config_of, layers_of
from normuon_lab.train.pretrain.ranks import Ranks

# What a tensor-parallel plan may say of modules outside the layers, which stay whole here.
_OUTSIDE_LAYERS = ("colwise_gather_output", "colwise_rep", "embedding_rowwise")


def spread(model: nn.Module, config: ModelConfig, ranks: Ranks) -> nn.Module:
    """Prepare a model for training on these ranks, in place; names of parameters do not change.

    Args:
        model: whole, on the CPU, the same on every rank.
        config: dtype, recomputing, compiling.
        ranks: among which to spread it.

    Returns:
        The model, on the ranks' devices. On several its parameters are DTensors.

    Raises:
        InputError: an architecture that cannot be split by tensor parallelism, or no compiler.
    """
    if ranks.mesh is not None and ranks.mesh["tp"].size() > 1:
        _split_layers(model, ranks.mesh["tp"])
    if config.activation_checkpointing:
        require(
            getattr(model, "supports_gradient_checkpointing", False),
            f"--activation-checkpointing: {type(model).__name__} does not support it",
        )
        known: Any = model
        known.gradient_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        compilers = ("c++", "g++", "clang++")
        require(
            any(shutil.which(name) for name in compilers),
            "--compile needs a C++ compiler, and none was found: install g++ or leave it out",
        )
        for layer in layers_of(model):
            layer.compile()
    if ranks.mesh is None:
        return model.to(ranks.device)
    _shard(model, ranks.mesh, compute_dtype(config, ranks.device))
    return model


def compute_dtype(config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of forward and backward."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def autocast(config: ModelConfig, ranks: Ranks) -> AbstractContextManager[object]:
    """The context of a forward pass: autocast for one process, nothing where FSDP2 casts."""
    dtype = compute_dtype(config, ranks.device)
    if ranks.mesh is not None or dtype is torch.float32:
        return nullcontext()
    return torch.autocast(ranks.device.type, dtype)


def reduce_only_after_last_(model: nn.Module, *, is_last: bool) -> None:
    """Let copies of the model average their gradients after the last micro batch only.

    Shards are reduced after each: keeping whole gradients between micro batches would cost their
    memory.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_all_reduce(is_last)


def _shard(model: nn.Module, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    is_replicated = mesh["dp_replicate"].size() > 1
    data_mesh = mesh["dp_replicate", "dp_shard"] if is_replicated else mesh["dp_shard"]
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype is torch.float32 else dtype, reduce_dtype=torch.float32
    )
    for layer in layers_of(model):
        fully_shard(layer, mesh=data_mesh, mp_policy=policy)
    fully_shard(model, mesh=data_mesh, mp_policy=policy)


def _split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism by transformers' own plan for the architecture, inside the layers."""
    config = config_of(model)
    size = mesh.size()
    plan: dict[str, str] = dict(getattr(model, "_tp_plan", None) or {})
    if not plan:
        raise InputError(
            f"--tp {size}: transformers has no tensor-parallel plan for {config.model_type}; leave "
            "it out"
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        count = getattr(config, name, None) or config.num_attention_heads
        require(count % size == 0, f"--tp {size} does not divide {name} = {count}")
    styles: dict[str, ParallelStyle] = {}
    for name, module in model.named_modules():
        style = _style_of(name, plan)
        if style is None or style in _OUTSIDE_LAYERS:
            continue
        is_linear = isinstance(module, nn.Linear) and style in ("colwise", "rowwise")
        require(is_linear, f"--tp {size}: {name} asks for {style}, which is not supported")
        styles[name] = ColwiseParallel() if style == "colwise" else RowwiseParallel()
    parallelize_module(model, mesh, styles)


def _style_of(name: str, plan: dict[str, str]) -> str | None:
    pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
    return next((style for key, style in plan.items() if fnmatch.fnmatchcase(pattern, key)), None)
