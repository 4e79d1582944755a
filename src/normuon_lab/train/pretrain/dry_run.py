"""The cost of a run without running it: `normuon train --dry-run`, as plain values and text.

Parameters and optimizer state are counted on the meta device. The library's plan says which rank
would orthogonalise what.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Column, Table
from torch import nn

from normuon.distributed.cost import CostModel
from normuon.distributed.plan import DEFAULT_BUCKET_BYTES
from normuon_lab.errors import counted
from normuon_lab.plan.contents import PlanRequest, plan_contents, plan_model
from normuon_lab.plan.mesh import AXES, Mesh
from normuon_lab.plan.model_matrices import ModelShapes, shapes_of
from normuon_lab.train.arms.builders import split_parameters
from normuon_lab.train.arms.registry import PRETRAINING_ARMS
from normuon_lab.train.model import (
    build_model,
    config_of,
    flops_per_token,
    transformers_config,
)
from normuon_lab.train.pretrain.config import Hardware, PretrainConfig
from normuon_lab.train.pretrain.metrics import PEAK_TFLOPS
from normuon_lab.train.pretrain.parallel import mesh_shape
from normuon_lab.train.pretrain.trainer import build_optimizers, micro_batch_size

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SCHEMA_VERSION = 1
FLOAT32_BYTES = 4
_PLAN_VALUES = (
    "digest",
    "num_orthogonalisations",
    "num_buckets",
    "imbalance",
    "bytes_sent_total",
    "bytes_sent_busiest",
    "scratch_bytes_max",
    "predicted_step_seconds",
    "traffic",
)


def dry_run(config: PretrainConfig, hardware: Hardware) -> dict[str, Any]:
    """Everything that `--json` prints; docs/lab/train.md says what each value is.

    Raises:
        InputError: a model that cannot be built, or a mesh or batch that does not divide.
    """
    model = build_model(transformers_config(config.model.model), device="meta")
    shapes = shapes_of(model, name=config.model.model, split_heads=config.optimizer.split_heads)
    parallel, world_size = config.parallel, hardware.num_ranks
    if parallel.dp_shard is not None:
        world_size = parallel.dp_replicate * parallel.dp_shard * parallel.tp
    mesh = Mesh(**dict(zip(AXES, mesh_shape(parallel, world_size=world_size), strict=True)))
    micro_size = micro_batch_size(config.batch, data_ranks=mesh.world_size // mesh.tp)
    flops = flops_per_token(model, sequence_length=config.batch.sequence_length)
    tflops = config.metrics.device_tflops or PEAK_TFLOPS["H100"]
    rate = 1e12 * tflops * hardware.mfu
    request = PlanRequest(
        mesh=mesh,
        balance="flops",
        bucket_bytes=DEFAULT_BUCKET_BYTES,
        wire_dtype="bfloat16",
        cost_model=CostModel(flops_per_second=rate, bytes_per_second=1e9 * hardware.bandwidth),
    )
    plan = plan_contents(plan_model(shapes, request))
    elements = state_elements(model, config)
    model_seconds = flops.total * config.batch.tokens_per_step / (mesh.world_size * rate)
    # Only NorMuon's step is planned; AdamW's is small beside it.
    is_planned = config.optimizer.arm == "normuon"
    optimizer_seconds = plan["predicted_step_seconds"] if is_planned else 0.0
    step_seconds = model_seconds + optimizer_seconds
    return {
        "kind": "normuon train dry run",
        "schema_version": SCHEMA_VERSION,
        "preset": config.preset,
        "model": config.model.model,
        "arm": config.optimizer.arm,
        "parameters": shapes.num_parameters,
        "hidden_matrix_parameters": shapes.num_hidden_parameters,
        "tokens": config.tokens,
        "steps": config.batch.steps,
        "tokens_per_step": config.batch.tokens_per_step,
        "flops": flops.total * config.tokens,
        "flops_per_token": {**asdict(flops), "total": flops.total},
        "state_elements": elements,
        "state_elements_per_hidden_weight": {
            arm: count / shapes.num_hidden_parameters for arm, count in elements.items()
        },
        "mesh": plan["mesh"],
        "micro_batch_size": micro_size,
        "memory_per_rank": _memory(
            config, shapes, config_of(model), plan["memory"], micro_size, mesh
        ),
        "plan": {name: plan[name] for name in _PLAN_VALUES},
        "hardware": asdict(hardware) | {"num_ranks": mesh.world_size, "device_tflops": tflops},
        "expected": {
            "model_seconds_per_step": model_seconds,
            "optimizer_seconds_per_step": optimizer_seconds,
            "step_seconds": step_seconds,
            "tokens_per_second": config.batch.tokens_per_step / step_seconds,
            "total_seconds": step_seconds * config.batch.steps,
        },
    }


def state_elements(model: nn.Module, config: PretrainConfig) -> dict[str, int]:
    """Elements of state that each arm keeps for the hidden matrices, counted after a real step."""
    hidden, _ = split_parameters(model)
    counts: dict[str, int] = {}
    for arm in PRETRAINING_ARMS:
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter)
        # Split or not, state is a number per neuron; and only NorMuon's arm knows the options.
        bare = replace(config.optimizer, arm=arm, split_heads=False, equilibrate=False)
        optimizers = build_optimizers(model, bare)
        for optimizer in optimizers:
            if not optimizer.state:  # NorMuon's exists from construction.
                optimizer.step()
        counts[arm] = sum(
            value.numel()
            for optimizer in optimizers
            for _, parameter in hidden
            for value in optimizer.state.get(parameter, {}).values()
            # AdamW counts its steps in one number per parameter, which is no element of a moment.
            if value.ndim > 0
        )
    model.zero_grad()
    return counts


def _memory(
    config: PretrainConfig,
    shapes: ModelShapes,
    model_config: PretrainedConfig,
    state: dict[str, Any],
    micro_size: int,
    mesh: Mesh,
) -> dict[str, int]:
    """Bytes on the fullest rank; counted, except an estimate for activations."""
    compute_bytes = 4 if config.model.dtype == "float32" else 2
    # AdamW keeps two numbers per weight, as large as the weight.
    weights = state["adamw_state_bytes_max"] // 2
    hidden_share = shapes.num_hidden_parameters / shapes.num_parameters
    optimizer = {
        "adamw": state["adamw_state_bytes_max"],
        "muon": round(weights * (2 - hidden_share)),
        "normuon": state["state_bytes_max"],
    }[config.optimizer.arm]
    activations = _activation_bytes(
        model_config,
        tokens=micro_size * config.batch.sequence_length,
        compute_bytes=compute_bytes,
        is_recomputed=config.model.activation_checkpointing,
        tp=mesh.tp,
    )
    # While a layer computes, it and the next are whole in the compute dtype.
    layer = shapes.num_hidden_parameters // model_config.num_hidden_layers
    outside = shapes.num_parameters - shapes.num_hidden_parameters
    is_sharded = mesh.world_size > 1
    gathered = (2 * layer // mesh.tp + outside) * compute_bytes if is_sharded else 0
    parts = {
        "weights_bytes": weights,
        "gradients_bytes": weights,
        "optimizer_state_bytes": optimizer,
        "optimizer_scratch_bytes": state["scratch_bytes_max"],
        "gathered_weights_bytes": gathered,
        "activations_bytes": activations,
    }
    return {**parts, "total_bytes": sum(parts.values())}


def _activation_bytes(
    config: PretrainedConfig, *, tokens: int, compute_bytes: int, is_recomputed: bool, tp: int
) -> int:
    """Bytes that the backward pass needs from the forward pass of one micro batch.

    Of a layer, per token: the inputs and outputs of two norms and the attention's output (5 h), the
    queries (h), keys and values, and the MLP's inner products: 2 m, or 4 m with a gate. Attention
    keeps no scores (flash attention). After the last layer come the logits, in the compute dtype,
    in float32, and their gradient.
    """
    width = config.hidden_size
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    mlp_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None)
    mlp_width = mlp_width or 4 * width
    num_products = 2 if config.model_type == "gpt2" else 4
    split = width + 2 * width * kv_heads // heads + num_products * mlp_width
    layer = 5 * width + split // tp
    num_layers = config.num_hidden_layers
    kept = width * num_layers + layer if is_recomputed else layer * num_layers
    logits = config.vocab_size * (compute_bytes + 2 * FLOAT32_BYTES)
    return tokens * (kept * compute_bytes + logits)


def print_dry_run(contents: Mapping[str, Any], console: Console) -> None:
    """Print the values of `dry_run`."""
    flops, plan, expected = (contents[name] for name in ("flops_per_token", "plan", "expected"))
    run = Table(
        "of the run",
        Column(justify="right"),
        title=f"{contents['preset']}: {contents['model']} with {contents['arm']}",
    )
    for label, value in (
        ("parameters", f"{contents['parameters']:,}"),
        ("of hidden matrices", f"{contents['hidden_matrix_parameters']:,}"),
        ("mesh", ", ".join(f"{axis} {size}" for axis, size in contents["mesh"].items())),
        ("steps", f"{contents['steps']:,}"),
        ("tokens a step", f"{contents['tokens_per_step']:,}"),
        ("tokens", f"{contents['tokens']:,}"),
        ("FLOPs a token", f"{flops['total']:.3e} (attention {flops['attention']:.2e})"),
        ("FLOPs", f"{contents['flops']:.3e}"),
    ):
        run.add_row(label, value)
    state = Table(
        "optimizer", "elements of state", "per hidden weight", title="State of hidden matrices"
    )
    for name, count in contents["state_elements"].items():
        ratio = contents["state_elements_per_hidden_weight"][name]
        state.add_row(name, f"{count:,}", f"{ratio:.4f}")
    memory = Table("memory of one rank", "GiB")
    for name, size in contents["memory_per_rank"].items():
        memory.add_row(name.removesuffix("_bytes").replace("_", " "), f"{size / 2**30:.2f}")
    for table in (run, state, memory):
        console.print(table)
    hardware = contents["hardware"]
    console.print(
        f"NorMuon's plan: {counted(plan['num_orthogonalisations'], 'orthogonalisation')}, "
        f"{counted(plan['num_buckets'], 'bucket')}, imbalance {plan['imbalance']:.3f}, "
        f"{plan['bytes_sent_total'] / 1e9:.2f} GB sent per step; `normuon plan` has the details.\n"
        f"Expected on {counted(hardware['num_ranks'], 'device')} of "
        f"{hardware['device_tflops']:g} TFLOP/s at MFU {hardware['mfu']:g} and "
        f"{hardware['bandwidth']:g} GB/s: "
        f"{expected['step_seconds']:.3f} s a step, {expected['optimizer_seconds_per_step']:.3f} s "
        f"of it NorMuon's; {expected['tokens_per_second']:,.0f} tokens/s; "
        f"{expected['total_seconds'] / 86_400:.2f} days.",
        highlight=False,
        soft_wrap=True,
    )
