"""Loss after the same number of steps: NorMuon and AdamW from the same weights on the same text.

One seed, one learning rate for both and no tuning: it shows that training works here.
"""

from __future__ import annotations

import statistics
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normuon_lab.bench.measure import timed
from normuon_lab.bench.suite.decoder import (
    ARMS,
    Decoder,
    loss_of,
    make_arm,
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
    arms = [
        make_arm(name, size, lr=options.lr, seed=options.seed, device=context.device)
        for name in ARMS
    ]
    values: dict[str, Any] = {
        "text": "the .py files of Python's standard library, as bytes",
        "train_bytes": len(text.train),
        "held_out_bytes": len(text.held_out),
        "files": list(text.files),
        "parameters": sum(param.numel() for param in arms[0][0].parameters()),
        "steps": steps,
        "tokens_per_step": size.micro_batch * size.sequence_length,
        "lr": options.lr,
        "schedule": "linear up over a tenth of the steps, then linear to zero",
        "seed": options.seed,
        "note": "one seed and one learning rate, which nobody tuned: no claim",
        # Of a curve: steps, mean training loss since the last point, and held-out loss, in nats.
        "arms": [{"name": name, "curve": [], "held_out_loss": None} for name in ARMS],
        "steps_taken": 0,
        "cut": False,
    }
    generator = torch.Generator().manual_seed(options.seed)
    marks = {round(steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    losses: dict[str, list[Tensor]] = {name: [] for name in ARMS}
    for step in range(steps):
        batch = random_batch(text.train, size, generator).to(context.device)
        for name, (model, optimizer) in zip(ARMS, arms, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = options.lr * schedule(step, steps)
            losses[name].append(train_step(model, optimizer, [batch]))
        values["cut"] = context.seconds_left() < 0
        if step + 1 in marks or values["cut"]:
            for found, (model, _) in zip(values["arms"], arms, strict=True):
                found["held_out_loss"] = held_out_loss(model, held_out)
                found["curve"].append(
                    {
                        "step": step + 1,
                        "train_loss": torch.stack(losses[found["name"]]).mean().item(),
                        "held_out_loss": found["held_out_loss"],
                    }
                )
                losses[found["name"]].clear()
            values["steps_taken"] = step + 1
            context.keep(values)
        if values["cut"]:
            break
    return values


def planned_steps(text: LocalText, context: PartContext) -> int:
    """As many steps of both as fit in the time left, by the speed of a few."""
    size, options = context.sizes.comparison, context.options
    generator = torch.Generator().manual_seed(options.seed)
    seconds = 0.0
    for name in ARMS:
        arm = make_arm(name, size, lr=options.lr, seed=options.seed, device=context.device)
        spent = []
        for _ in range(1 + SPEED_STEPS):
            batch = random_batch(text.train, size, generator).to(context.device)
            spent.append(timed(partial(train_step, *arm, [batch]), context.device))
        seconds += statistics.median(spent[1:])
    # An evaluation's batch takes at most a third of a step's.
    left = context.seconds_left() - EVALUATIONS * context.sizes.eval_batches * seconds / 3
    fewest, most = context.sizes.steps
    return max(fewest, min(most, int(TIME_SHARE * left / seconds)))


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
def held_out_loss(model: Decoder, held_out: Sequence[Tensor]) -> float:
    """The mean over held-out batches."""
    return statistics.mean(loss_of(model, batch).item() for batch in held_out)


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
