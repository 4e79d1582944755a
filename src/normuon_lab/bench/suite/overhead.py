"""What NorMuon adds to a training step: a GPT-2-sized decoder with it and with AdamW."""

from __future__ import annotations

import statistics
from operator import truediv
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon.orthogonalize import resolve_backend
from normuon_lab.bench.measure import quartiles, timed
from normuon_lab.bench.suite.decoder import ARMS, make_arm, train_step
from normuon_lab.bench.suite.options import DecoderSize
from normuon_lab.bench.suite.part import PartContext

LR = 3e-4
PAPER_PERCENT = 2.9
"""What the paper reports for its 1.1B model and batch."""


def run(context: PartContext) -> dict[str, Any]:
    """Milliseconds per step of both, in blocks that take turns."""
    size = context.sizes.training
    tokens_per_micro_batch = size.micro_batch * size.sequence_length
    asked = context.sizes.tokens_per_step or context.options.tokens_per_step
    count = max(1, round(asked / tokens_per_micro_batch))
    batches = random_batches(size, count, seed=context.options.seed, device=context.device)
    arms = {
        name: make_arm(name, size, lr=LR, seed=context.options.seed, device=context.device)
        for name in ARMS
    }
    steps = context.sizes.block_steps
    values: dict[str, Any] = {
        "parameters": sum(param.numel() for param in arms[ARMS[0]][0].parameters()),
        "tokens_per_step": count * tokens_per_micro_batch,
        "micro_batches": count,
        "micro_batch": size.micro_batch,
        "sequence_length": size.sequence_length,
        "steps_per_block": steps,
        "ns_backend": resolve_backend("auto", device=context.device, dtype=torch.bfloat16),
        "paper_percent": PAPER_PERCENT,
    }

    def block(name: str, number: int) -> float:
        def advance() -> None:
            for _ in range(number):
                train_step(*arms[name], batches)

        return 1e3 * timed(advance, context.device) / number

    for name in ARMS:
        context.say(f"{name}: first steps")
        block(name, 2)
    fewest, most = context.sizes.blocks
    times: dict[str, list[float]] = {name: [] for name in ARMS}
    for number in range(most):
        if number >= fewest and context.seconds_left() < 0:
            break
        for name in ARMS if number % 2 == 0 else ARMS[::-1]:
            times[name].append(block(name, steps))
        context.keep({**values, **summary(times)})
    values.update(summary(times))
    values["optimizer_ms"] = {name: optimizer_ms(*arms[name], context.device) for name in ARMS}
    return values


def random_batches(
    size: DecoderSize, count: int, *, seed: int, device: torch.device
) -> list[Tensor]:
    """Micro-batches of random tokens: a step's time does not depend on them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (size.micro_batch, size.sequence_length + 1)
    return [
        torch.randint(size.vocabulary, shape, generator=generator).to(device) for _ in range(count)
    ]


def optimizer_ms(model: nn.Module, optimizer: Optimizer, device: torch.device) -> float:
    """Milliseconds of the optimizer's step alone, with the device idle before it; the median."""
    spent = []
    for _ in range(5):
        for param in model.parameters():
            param.grad = torch.full_like(param, 1e-3)
        spent.append(1e3 * timed(optimizer.step, device))
    optimizer.zero_grad(set_to_none=True)
    return statistics.median(spent)


def summary(times: dict[str, list[float]]) -> dict[str, Any]:
    """Medians and quartiles of each arm, and the ratio over blocks."""
    adamw, normuon = (times[name] for name in ARMS)
    ratios = list(map(truediv, normuon, adamw))
    return {
        "arms": [
            {
                "name": name,
                "step_ms": times[name],
                "median_ms": statistics.median(times[name]),
                "quartiles_ms": quartiles(times[name]),
            }
            for name in ARMS
        ],
        "blocks": len(ratios),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": quartiles(ratios),
        "overhead_percent": 100 * (statistics.median(ratios) - 1),
    }
