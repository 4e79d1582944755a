"""Builds the optimizers of each arm, with their parameters and rates.

The partition is `normuon.param_groups`', the same in every arm: hidden matrices on one side;
embeddings, head, norms and biases, which AdamW trains, on the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from normuon import NorMuon, param_groups, suggest_lr
from normuon.models.heads import output_heads
from normuon_lab.train.arms import rivals
from normuon_lab.train.arms.ema_nesterov import EmaNesterov
from normuon_lab.train.arms.options import ArmOptions

NamedParameters = list[tuple[str, Tensor]]


def split_parameters(model: nn.Module) -> tuple[NamedParameters, NamedParameters]:
    """Hidden matrices, and everything else, as `(name, parameter)` pairs in the model's order."""
    hidden: NamedParameters = []
    other: NamedParameters = []
    for group in param_groups(model):
        (other if group["algorithm"] == "adamw" else hidden).extend(group["params"])
    return hidden, other


def hidden_groups(model: nn.Module, *, split_heads: bool = False) -> list[dict[str, Any]]:
    """The groups of hidden matrices of `normuon.param_groups`, each with its ``view``."""
    groups = param_groups(model, split_heads=split_heads)
    return [group for group in groups if group["algorithm"] != "adamw"]


def other_groups(model: nn.Module, lr: float, options: ArmOptions) -> list[dict[str, Any]]:
    """A group for each peak learning rate of the parameters that AdamW trains; no weight decay.

    Parameters are named and in the model's order. A head that is tied to the embedding takes the
    head's rate.
    """
    heads = output_heads(model)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    embeddings = {id(parameter) for parameter in embedding.parameters()} if embedding else set()
    rest = options.adam_lr or lr
    found: dict[float, NamedParameters] = {}
    for name, parameter in split_parameters(model)[1]:
        rate = rest
        if id(parameter) in heads:
            rate = options.head_lr or rest
        elif id(parameter) in embeddings:
            rate = options.embedding_lr or rest
        found.setdefault(rate, []).append((name, parameter))
    return [
        {"params": parameters, "lr": rate, "weight_decay": 0.0}
        for rate, parameters in found.items()
    ]


def build_adamw(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
    """`torch.optim.AdamW` for every parameter."""
    hidden = {"params": _hidden_tensors(model), "weight_decay": options.weight_decay}
    return [AdamW([hidden, *_adamw_groups(model, lr, options)], lr=lr, betas=options.betas)]


def build_muon(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
    """`torch.optim.Muon` for hidden matrices, AdamW for the rest."""
    muon = Muon(
        _hidden_tensors(model),
        lr=lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, AdamW(_adamw_groups(model, lr, options), lr=lr, betas=options.betas)]


def build_normuon(
    model: nn.Module,
    lr: float,
    options: ArmOptions,
    *,
    algorithm: str = "normuon",
    split_heads: bool = False,
    **fixed: Any,
) -> list[Optimizer]:
    """`normuon.NorMuon` with the keyword arguments `fixed`, which `options.normuon` overrules.

    Hidden matrices take `algorithm`, those of attention heads each on their own if `split_heads`.
    With ``adjust_lr_fn="original"`` the learning rate of hidden matrices is the one at which steps
    are as large as the paper's scaling makes them, and the decay of a step stays what it was.
    """
    split_heads = split_heads or options.split_heads
    groups = [
        {**group, "algorithm": algorithm} for group in hidden_groups(model, split_heads=split_heads)
    ]
    keywords = {
        "momentum": options.momentum,
        "beta2": options.beta2,
        "betas": options.betas,
        "ns_dtype": options.ns_dtype,
        **fixed,
        **dict(options.normuon),
    }
    if isinstance(keywords.get("momentum_dtype"), str):  # As options and JSON files spell it.
        keywords["momentum_dtype"] = getattr(torch, keywords["momentum_dtype"])
    ratio = 1.0
    if keywords.get("adjust_lr_fn") == "original":
        ratio = 1 / suggest_lr(1.0, coming_from="muon_original", to=groups)
    groups += [{**group, "algorithm": "adamw"} for group in other_groups(model, lr, options)]
    return [NorMuon(groups, lr=lr * ratio, weight_decay=options.weight_decay / ratio, **keywords)]


def build_rival(
    model: nn.Module, lr: float, options: ArmOptions, *, rival: str, **fixed: Any
) -> list[Optimizer]:
    """A class of `rivals`, by name, for hidden matrices, and AdamW for the rest."""
    keywords = {
        name: getattr(options, name) for name in ("weight_decay", "momentum", "beta2", "betas")
    }
    groups = [
        {key: group[key] for key in ("params", "view") if key in group}
        for group in hidden_groups(model)
    ]
    return [
        getattr(rivals, rival)(groups, lr=lr, **keywords, **fixed),
        AdamW(_adamw_groups(model, lr, options), lr=lr, betas=options.betas),
    ]


def build_ema_nesterov(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
    """Muon and AdamW, and what looks ahead of both."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [*build_muon(model, lr, options), EmaNesterov(parameters)]


def build_adam_mini(model: nn.Module, lr: float, options: ArmOptions) -> list[Optimizer]:
    """Adam-mini (Zhang et al. 2024, arXiv 2406.16793): Adam with one second moment per block.

    The step is pytorch_optimizer's; which entries make a block of a transformers model is said
    here. For each block b, with the decays and learning rates of `options`::

        v_b = b2 v_b + (1 - b2) mean(G_b * G_b)
        W_b = W_b - lr wd W_b - lr M_b / (1 - b1^t) / (sqrt(v_b / (1 - b2^t)) + eps)

    Blocks are heads of queries and keys, tokens of embeddings and output heads, neurons of all
    other linear layers, and everything else whole.

    Differs: GPT-2's Conv1D weights are whole blocks, heads and neurons together. The package cuts
    blocks from consecutive entries, and the neurons of a Conv1D are columns.
    Differs: left alone, the package takes the blocks of the paper's first version: heads of queries
    and keys, plain Adam for embeddings and output heads, and all other weights whole.
    """
    from pytorch_optimizer import AdamMini

    peaks = {name: lr for name, _ in split_parameters(model)[0]}
    decays = dict.fromkeys(peaks, options.weight_decay)
    for group in other_groups(model, lr, options):
        peaks.update((name, group["lr"]) for name, _ in group["params"])
    sizes = _block_sizes(model)
    config: Any = model.config
    optimizer = AdamMini(
        model,
        lr=lr,
        betas=options.betas,
        num_embeds=config.hidden_size,
        num_heads=config.num_attention_heads,
    )
    # What the package calls heads of queries and keys are blocks of any number of entries.
    optimizer.embed_blocks = set()
    optimizer.qk_blocks = set(sizes)
    for group in optimizer.param_groups:
        name = group["name"]
        group["lr"] = peaks[name]
        group["weight_decay"] = decays.get(name, 0.0)
        if name in sizes:
            group["parameter_per_head"] = sizes[name]
    return [optimizer]


def _block_sizes(model: nn.Module) -> dict[str, int]:
    """Entries per block of each weight that is not a block as a whole, by the weight's name."""
    config: Any = model.config
    head_rows = config.hidden_size // config.num_attention_heads
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            rows = head_rows if name.endswith(("q_proj", "k_proj")) else 1
            sizes[f"{name}.weight"] = rows * module.weight.shape[1]
    return sizes


def _hidden_tensors(model: nn.Module) -> list[Tensor]:
    return [parameter for _, parameter in split_parameters(model)[0]]


def _adamw_groups(model: nn.Module, lr: float, options: ArmOptions) -> list[dict[str, Any]]:
    return [
        {**group, "params": [parameter for _, parameter in group["params"]]}
        for group in other_groups(model, lr, options)
    ]
