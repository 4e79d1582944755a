"""Joins ranks and spreads a model over them: mesh, FSDP2, tensor parallelism, dtypes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from normuon_lab.errors import InputError, counted, require
from normuon_lab.machine import has_cpp_compiler
from normuon_lab.plan.model_matrices import tp_style_of
from normuon_lab.train.model import config_of, layers_of
from normuon_lab.train.pretrain.config import ModelConfig, ParallelConfig
from normuon_lab.train.ranks import Ranks

# Tokenising a corpus, or checking a large checkpoint, on one rank keeps the others waiting.
_TIMEOUT = timedelta(minutes=60)


@contextmanager
def joined(parallel: ParallelConfig) -> Iterator[Ranks]:
    """Join the process group of torchrun's ranks, and leave it at the end.

    Raises:
        InputError: the sizes of the mesh do not fit the number of ranks.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    shape = mesh_shape(parallel, world_size=world_size)
    has_cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Ranks(rank=0, world_size=1, device=device, mesh=None)
        return
    _join(backend="cpu:gloo,cuda:nccl" if has_cuda else "gloo")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("dp_replicate", "dp_shard", "tp"))
    yield Ranks(rank=dist.get_rank(), world_size=world_size, device=device, mesh=mesh)
    # Not after an exception: a rank that fails alone must not wait here for the others.
    dist.destroy_process_group()


def _join(*, backend: str) -> None:
    """Join the process group. Gloo besides NCCL: flags and checkpoints stay on the CPU.

    When torchrun restarts its ranks, their store still has the addresses of the failed ones (torch
    2.13), so each attempt uses other names.
    """
    store, rank, world_size = next(dist.rendezvous("env://", timeout=_TIMEOUT))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt {attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=_TIMEOUT,
    )


def mesh_shape(parallel: ParallelConfig, *, world_size: int) -> tuple[int, int, int]:
    """Sizes of dp_replicate, dp_shard and tp for so many ranks.

    Raises:
        InputError: their product is another number.

    Example:
        >>> mesh_shape(ParallelConfig(tp=2), world_size=8)
        (1, 4, 2)
    """
    fixed = parallel.dp_replicate * parallel.tp
    named = f"--dp-replicate {parallel.dp_replicate} x --tp {parallel.tp}"
    if parallel.dp_shard is None:
        require(
            world_size % fixed == 0,
            f"{named} does not divide the {counted(world_size, 'rank')}: start another number "
            "of them",
        )
        return (parallel.dp_replicate, world_size // fixed, parallel.tp)
    require(
        fixed * parallel.dp_shard == world_size,
        f"{named} x --dp-shard {parallel.dp_shard} is {fixed * parallel.dp_shard}, but "
        f"{counted(world_size, 'rank')} {'was' if world_size == 1 else 'were'} started: use "
        "torchrun --nproc-per-node, or other sizes",
    )
    return (parallel.dp_replicate, parallel.dp_shard, parallel.tp)


# What a tensor-parallel plan may say of modules outside the layers, which stay whole here.
_OUTSIDE_LAYERS = ("colwise_gather_output", "colwise_rep", "embedding_rowwise")


def spread(model: nn.Module, config: ModelConfig, ranks: Ranks) -> nn.Module:
    """Prepare a model for training on these ranks, in place; names of parameters do not change.

    The model is whole, on the CPU and the same on every rank. Afterwards it is on the ranks'
    devices, and on several its parameters are DTensors.

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
        require(
            has_cpp_compiler(),
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
    """Replicas of the model average their gradients after the last micro batch only.

    Shards are reduced after each, so that no whole gradients are kept in between.
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
        style = tp_style_of(name, plan)
        if style is None or style in _OUTSIDE_LAYERS:
            continue
        is_linear = isinstance(module, nn.Linear) and style in ("colwise", "rowwise")
        require(is_linear, f"--tp {size}: {name} asks for {style}, which is not supported")
        styles[name] = ColwiseParallel() if style == "colwise" else RowwiseParallel()
    parallelize_module(model, mesh, styles)
