"""Tokens per second of `normuon train` beside a bare loop with the same model and optimizer.

Both train in one process, a few steps of the one, then of the other, so that both meet the same
machine. Ratios are medians over such pairs, ours over theirs. The bare loop takes its batches from
memory and measures nothing; `normuon train` reads its data, clips, schedules and logs every step.

$ python benchmarks/pretrain_throughput.py --out benchmarks/results/pretrain_throughput.json
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.nn import functional

from normuon_lab.atomic_files import write_json
from normuon_lab.data.loading import open_data
from normuon_lab.machine import describe_machine, utc_now
from normuon_lab.train.display import RunDisplay
from normuon_lab.train.model import build_named_model
from normuon_lab.train.pretrain.command import pretrain_preset
from normuon_lab.train.pretrain.config import EvaluationConfig, PretrainConfig
from normuon_lab.train.pretrain.metrics import MetricsLog
from normuon_lab.train.pretrain.parallel import compute_dtype, joined
from normuon_lab.train.pretrain.trainer import Trainer, build_optimizers


class BareLoop:
    """What one would write by hand: forward, backward, step."""

    def __init__(self, config: PretrainConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self._model = build_named_model(config.model.model, seed=config.seed).to(device).train()
        dtype = compute_dtype(config.model, device)
        self._optimizers = build_optimizers(self._model, config.optimizer, forward_dtype=dtype)
        self._autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)
        vocabulary = self._model.config.vocab_size
        size = (config.batch.micro_batch_size, config.batch.sequence_length + 1)
        self._tokens = torch.randint(vocabulary, size, device=device)

    def advance(self) -> None:
        """One step."""
        batch = self._config.batch
        num_micro_batches = batch.batch_size // batch.micro_batch_size
        for _ in range(num_micro_batches):
            with self._autocast:
                logits = self._model(input_ids=self._tokens[:, :-1], use_cache=False).logits
                loss = functional.cross_entropy(
                    logits.flatten(0, 1).float(), self._tokens[:, 1:].flatten()
                )
            (loss / num_micro_batches).backward()
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()


def seconds_of(
    loop: BareLoop | Trainer, *, steps: int, device: torch.device
) -> tuple[float, float]:
    """Wall and CPU time of some steps, the device's work included.

    The CPU time is this process': other users of the machine and the process that loads data are
    not in it.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loop.advance()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, time.process_time() - cpu_started


def measure(config: PretrainConfig, *, pairs: int, steps: int) -> dict[str, object]:
    """Steps of both loops in turn, after one of each to warm up."""
    with tempfile.TemporaryDirectory() as folder, joined(config.parallel) as ranks:
        if ranks.device.type == "cpu":
            torch.set_flush_denormal(True)
        bare = BareLoop(config, ranks.device)
        model = build_named_model(config.model.model, seed=config.seed)
        data = open_data(
            config.data, sequence_length=config.batch.sequence_length, seed=config.seed
        )
        out = Path(folder)
        display = RunDisplay(Console(quiet=True), step=0, steps=config.batch.steps, enabled=True)
        with MetricsLog(out, config, step=0) as metrics:
            trainer = Trainer(config, out, ranks, model, data, display)
            trainer.metrics = metrics
            for loop in (bare, trainer):
                seconds_of(loop, steps=1, device=ranks.device)
            found: dict[str, list[tuple[float, float]]] = {"bare": [], "normuon train": []}
            for number in range(pairs):
                # Whoever comes second finds the caches of the other: they take turns.
                order = [("bare", bare), ("normuon train", trainer)]
                for name, loop in order if number % 2 == 0 else reversed(order):
                    found[name].append(seconds_of(loop, steps=steps, device=ranks.device))
        trainer.batches.close()
    tokens = steps * config.batch.tokens_per_step
    return {
        kind: {
            "seconds": {name: [pair[place] for pair in values] for name, values in found.items()},
            "tokens_per_second": {
                name: tokens / statistics.median(pair[place] for pair in values)
                for name, values in found.items()
            },
            "ratio_median": statistics.median(
                ours[place] / theirs[place]
                for ours, theirs in zip(found["normuon train"], found["bare"], strict=True)
            ),
        }
        for place, kind in enumerate(("wall_time", "cpu_time"))
    }


def main() -> None:
    """Measure one preset and print or write what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="llama-small")
    parser.add_argument("--arm", default="normuon")
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="steps of each loop per pair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    preset = pretrain_preset(given.preset)
    config = dataclasses.replace(
        preset,
        optimizer=dataclasses.replace(preset.optimizer, arm=given.arm),
        evaluation=EvaluationConfig(eval_every=0),
        checkpoint=dataclasses.replace(preset.checkpoint, save_every=0),
    )
    contents: dict[str, Any] = {
        "kind": "benchmarks/pretrain_throughput.py",
        "schema_version": 1,
        "date": utc_now(),
        "machine": describe_machine(num_workers=1) | {"threads_per_worker": given.threads},
        "preset": given.preset,
        "arm": given.arm,
        "pairs": given.pairs,
        "steps_per_pair": given.steps,
        **measure(config, pairs=given.pairs, steps=given.steps),
    }
    for kind in ("wall_time", "cpu_time"):
        found = contents[kind]
        rates = {name: round(rate) for name, rate in found["tokens_per_second"].items()}
        print(f"{kind}: {rates} tokens/s, ratio {found['ratio_median']:.3f}", flush=True)
    if given.out is not None:
        write_json(given.out, contents)


if __name__ == "__main__":
    main()
