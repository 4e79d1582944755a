"""Loss after the same number of steps: NorMuon and AdamW from the same weights on the same text.

One seed, one learning rate for both and no tuning: it shows that training works here.
"""

from __future__ import annotations

import statistics
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normuon_lab.bench.measure import timed
from normuon_lab.bench.suite.decoder import (
    ARMS,
    Decoder,
    loss_of,
    make_decoder,
    make_optimizer,
    train_step,
)
from normuon_lab.bench.suite.options import DecoderSize
from normuon_lab.bench.suite.part import PartContext

EVALUATIONS = 10
SPEED_STEPS = 3
TIME_SHARE = 0.8
"""Of the time left that the steps are planned to take."""
WARMUP_SHARE = 0.1
HELD_OUT_EVERY = 10
"""Every tenth file is held out."""
APART = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(slots=True)
class Arm:
    """One optimizer and its model.

    Attributes:
        name: for people.
        model: trained.
        optimizer: of its parameters.
        losses: of the training batches since the last evaluation, on the device.
        curve: steps, mean training loss since the last point, and held-out loss, in nats.
    """

    name: str
    model: Decoder
    optimizer: Optimizer
    losses: list[Tensor] = field(default_factory=list)
    curve: list[dict[str, float | None]] = field(default_factory=list)


def run(context: PartContext) -> dict[str, Any]:
    """Steps both arms in turn, so that a run that is cut has as many steps of each."""
    size, options = context.sizes.comparison, context.options
    context.say("reading Python's own library")
    text = local_text(context.sizes.text_bytes)
    steps = planned_steps(text, context)
    context.say(f"{steps} steps of {' and '.join(ARMS)}")
    generator = torch.Generator().manual_seed(options.seed + 1)
    held_out = [
        random_batch(text.held_out, size, generator).to(context.device)
        for _ in range(context.sizes.eval_batches)
    ]
    arms = [make_arm(name, size, context) for name in ARMS]
    values: dict[str, Any] = {
        "text": "the .py files of Python's standard library, as bytes",
        "train_bytes": len(text.train),
        "held_out_bytes": len(text.held_out),
        "files": list(text.files),
        "parameters": sum(param.numel() for param in arms[0].model.parameters()),
        "steps": steps,
        "tokens_per_step": size.micro_batch * size.sequence_length,
        "lr": options.lr,
        "schedule": "linear up over a tenth of the steps, then linear to zero",
        "seed": options.seed,
        "note": "one seed and one learning rate, which nobody tuned: no claim",
    }
    generator = torch.Generator().manual_seed(options.seed)
    marks = {round(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    cut = False
    for step in range(steps):
        batch = random_batch(text.train, size, generator).to(context.device)
        for arm in arms:
            for group in arm.optimizer.param_groups:
                group["lr"] = options.lr * schedule(step, steps)
            arm.losses.append(train_step(arm.model, arm.optimizer, [batch]))
        cut = context.seconds_left() < 0
        if step + 1 in marks or cut:
            for arm in arms:
                add_point(arm, step + 1, held_out)
            context.keep({**values, **curves(arms), "cut": cut})
        if cut:
            break
    return {**values, **curves(arms), "cut": cut}


def planned_steps(text: LocalText, context: PartContext) -> int:
    """As many steps of both as fit in the time left, by the speed of a few."""
    size = context.sizes.comparison
    generator = torch.Generator().manual_seed(context.options.seed)
    seconds = 0.0
    for name in ARMS:
        arm = make_arm(name, size, context)
        spent = []
        for _ in range(1 + SPEED_STEPS):
            batch = random_batch(text.train, size, generator).to(context.device)
            step = partial(train_step, arm.model, arm.optimizer, [batch])
            spent.append(timed(step, context.device))
        seconds += statistics.median(spent[1:])
    # An evaluation's batch takes at most a third of a step's.
    left = context.seconds_left() - EVALUATIONS * context.sizes.eval_batches * seconds / 3
    fewest, most = context.sizes.steps
    return max(fewest, min(most, int(TIME_SHARE * left / seconds)))


def make_arm(name: str, size: DecoderSize, context: PartContext) -> Arm:
    """An arm at its first step; all begin with the same weights."""
    model = make_decoder(size, seed=context.options.seed, device=context.device)
    return Arm(name, model, make_optimizer(name, model, lr=context.options.lr))


def random_batch(text: Tensor, size: DecoderSize, generator: torch.Generator) -> Tensor:
    """``[micro_batch, sequence_length + 1]``: stretches of a text that begin anywhere."""
    length = size.sequence_length + 1
    starts = torch.randint(len(text) - length + 1, (size.micro_batch, 1), generator=generator)
    return text[starts + torch.arange(length)]


def schedule(step: int, steps: int) -> float:
    """Of the learning rate: up over the first tenth, then down to zero.

    Example:
        >>> [round(schedule(step, 10), 2) for step in (0, 1, 5, 9)]
        [1.0, 1.0, 0.56, 0.11]
    """
    warmup = max(1, round(WARMUP_SHARE * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


@torch.no_grad()
def add_point(arm: Arm, step: int, held_out: Sequence[Tensor]) -> None:
    """Evaluates an arm and adds a point to its curve."""
    losses = [loss_of(arm.model, batch).item() for batch in held_out]
    arm.curve.append(
        {
            "step": step,
            "train_loss": torch.stack(arm.losses).mean().item(),
            "held_out_loss": statistics.mean(losses),
        }
    )
    arm.losses.clear()


def curves(arms: Sequence[Arm]) -> dict[str, Any]:
    """Plain values of what the arms have reached."""
    return {
        "arms": [
            {
                "name": arm.name,
                "curve": list(arm.curve),
                "held_out_loss": arm.curve[-1]["held_out_loss"] if arm.curve else None,
            }
            for arm in arms
        ],
        "steps_taken": arms[0].curve[-1]["step"] if arms[0].curve else 0,
    }


@dataclass(frozen=True, slots=True)
class LocalText:
    """Bytes of whole files as uint8: ``[n]`` to train on, ``[m]`` held out, and how many files."""

    train: Tensor
    held_out: Tensor
    files: tuple[int, int]


def local_text(max_bytes: int, folder: Path | None = None) -> LocalText:
    """Reads .py files in the order of their paths until there are `max_bytes` bytes.

    Without a folder, those of the running Python's standard library: there may be no network.

    Raises:
        RuntimeError: fewer than two files can be read.
    """
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    total = 0
    contents = _contents(folder or Path(sysconfig.get_path("stdlib")))
    for number, content in enumerate(contents):
        parts[number % HELD_OUT_EVERY == HELD_OUT_EVERY - 1].append(content)
        total += len(content)
        if total >= max_bytes and parts[1]:
            break
    if not all(parts):
        raise RuntimeError(f"fewer than {HELD_OUT_EVERY} .py files to read")
    train, held_out = (
        torch.frombuffer(bytearray(b"\n".join(part)), dtype=torch.uint8) for part in parts
    )
    return LocalText(train, held_out, (len(parts[0]), len(parts[1])))


def _contents(folder: Path) -> Iterator[bytes]:
    for path in sorted(folder.rglob("*.py")):
        if APART.isdisjoint(path.relative_to(folder).parts):
            try:
                content = path.read_bytes()
            except OSError:
                continue
            if content:
                yield content
