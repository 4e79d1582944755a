"""Adam-mini (Zhang et al. 2024, arXiv 2406.16793): Adam with one second moment per block.

The step is pytorch_optimizer's; which entries make a block is said here.
"""

from __future__ import annotations

from typing import Any

from pytorch_optimizer import AdamMini
from torch import nn
from torch.optim import Optimizer

from normuon_lab.train.arms.options import DEFAULT_OPTIONS, ArmOptions
from normuon_lab.train.arms.parameters import other_rates, split_parameters


def build_adam_mini(
    model: nn.Module, lr: float, options: ArmOptions = DEFAULT_OPTIONS
) -> list[Optimizer]:
    r"""Adam-mini for every parameter of a transformers model, in the paper's blocks.

    For each block b, with the decays and learning rates of `options`::

        v_b = b2 v_b + (1 - b2) mean(G_b * G_b)
        W_b = W_b - lr wd W_b - lr M_b / (1 - b1^t) / (sqrt(v_b / (1 - b2^t)) + eps)

    Blocks are heads of queries and keys, tokens of embeddings and output heads, neurons of all
    other linear layers, and everything else whole.

    Differs: GPT-2's Conv1D weights are whole blocks, heads and neurons together. The package cuts
    blocks from consecutive entries, and the neurons of a Conv1D are columns.
    Differs: left alone, the package takes the blocks of the paper's first version: heads of queries
    and keys, plain Adam for embeddings and output heads, and all other weights whole.

    Args:
        model: from transformers; its config knows the size of a head.
        lr: peak learning rate of hidden matrices.
        options: of the arm.
    """
    hidden, other = split_parameters(model)
    peaks = {name: lr for name, _ in hidden}
    for rate, parameters in other_rates(model, other, lr, options).items():
        peaks.update((name, rate) for name, _ in parameters)
    sizes = block_sizes(model)
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
    matrices = {name for name, _ in hidden}
    for group in optimizer.param_groups:
        name = group["name"]
        group["lr"] = peaks[name]
        group["weight_decay"] = options.weight_decay if name in matrices else 0.0
        if name in sizes:
            group["parameter_per_head"] = sizes[name]
    return [optimizer]


def block_sizes(model: nn.Module) -> dict[str, int]:
    """Entries per block of each weight that is not a block as a whole, by the weight's name."""
    config: Any = model.config
    head_rows = config.hidden_size // config.num_attention_heads
    sizes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            rows = head_rows if name.endswith(("q_proj", "k_proj")) else 1
            sizes[f"{name}.weight"] = rows * module.weight.shape[1]
    return sizes
