"""What measuring a step costs, as a share of an optimizer step and of a training step.

    python benchmarks/statistics_cost.py --out benchmarks/results/statistics_cost.json

One model and one optimizer. In every round a whole training step's forward and backward passes are
timed, then optimizer steps that are measured and others that are not, in turn, on the same
gradients. Shares are medians over pairs of such steps. The CPU time is this process' own: other
users of the machine are not in it. Reading the numbers (`to_dict`) is timed apart.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from normuon import NorMuon, param_groups
from normuon.orthogonalize import multiplies_bfloat16_natively
from normuon_lab.atomic_files import write_json
from normuon_lab.bench.measure import synchronize
from normuon_lab.bench.suite.decoder import make_decoder
from normuon_lab.bench.suite.options import DecoderSize
from normuon_lab.machine import describe_machine, utc_now

COMMAND = "python benchmarks/statistics_cost.py --out benchmarks/results/statistics_cost.json"
KINDS = ("wall", "cpu")


def seconds_of(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Wall and CPU time of a call, the device's work included."""
    synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    synchronize(device)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def measure(size: DecoderSize, *, tokens: int, rounds: int, pairs: int) -> dict[str, Any]:
    """Times of passes and of steps, by kind of time."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = make_decoder(size, seed=0, device=device)
    optimizer = NorMuon(param_groups(model), lr=1e-3)
    shape = (size.micro_batch, size.sequence_length + 1)
    num_batches = max(1, tokens // (size.micro_batch * size.sequence_length))
    batches = [torch.randint(size.vocabulary, shape, device=device) for _ in range(num_batches)]
    is_half = multiplies_bfloat16_natively(device.type)

    def passes() -> None:
        optimizer.zero_grad()
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=is_half):
                logits = model(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
            (loss / num_batches).backward()

    def step(measured: bool) -> dict[str, float]:
        if measured:
            optimizer.record_statistics()
        return seconds_of(optimizer.step, device)

    passes()
    for measured in (True, False):
        step(measured)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("passes", "off", "on")}
    for number in range(rounds):
        found["passes"].append(seconds_of(passes, device))
        for pair in range(pairs):
            for measured in (False, True) if (number + pair) % 2 else (True, False):
                found["on" if measured else "off"].append(step(measured))
    asked = [seconds_of(lambda: optimizer.statistics().to_dict(), device) for _ in range(5)]
    return {
        "device": str(device),
        "hidden_elements": sum(
            param.numel()
            for group in optimizer.param_groups
            if group["algorithm"] != "adamw"
            for param in group["params"]
        ),
        "elements": sum(param.numel() for param in model.parameters()),
        "tokens_per_step": num_batches * size.micro_batch * size.sequence_length,
        **{kind: shares(found, asked, kind) for kind in KINDS},
    }


def shares(
    found: dict[str, list[dict[str, float]]], asked: list[dict[str, float]], kind: str
) -> dict[str, Any]:
    """Medians of seconds, and the shares they come to."""
    seconds = {name: [times[kind] for times in values] for name, values in found.items()}
    passes, off = (statistics.median(seconds[name]) for name in ("passes", "off"))
    extra = statistics.median(
        on - off for on, off in zip(seconds["on"], seconds["off"], strict=True)
    )
    return {
        "seconds": seconds,
        "extra_seconds": extra,
        "share_of_optimizer_step": extra / off,
        "share_of_training_step": extra / (passes + off),
        "to_dict_seconds": statistics.median(times[kind] for times in asked),
    }


def main() -> None:
    """Measure, print, and write where told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=8192, help="of a training step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=3, help="of steps in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    size = DecoderSize(
        layers=given.layers,
        width=given.width,
        heads=given.width // 64,
        vocabulary=given.vocabulary,
        sequence_length=512,
        micro_batch=2,
    )
    found = measure(size, tokens=given.tokens, rounds=given.rounds, pairs=given.pairs)
    contents = {
        "kind": "benchmarks/statistics_cost.py",
        "command": COMMAND,
        "date": utc_now(),
        "machine": describe_machine(num_workers=1) | {"threads_per_worker": given.threads},
        "layers": given.layers,
        "width": given.width,
        "vocabulary": given.vocabulary,
        "rounds": given.rounds,
        "pairs_per_round": given.pairs,
        **found,
    }
    for kind in KINDS:
        of_kind = found[kind]
        print(
            f"{kind} time: a measured step takes {1e3 * of_kind['extra_seconds']:.1f} ms more, "
            f"{of_kind['share_of_optimizer_step']:.2%} of an optimizer step and "
            f"{of_kind['share_of_training_step']:.2%} of a training step of "
            f"{found['tokens_per_step']} tokens; the numbers take "
            f"{1e3 * of_kind['to_dict_seconds']:.1f} ms"
        )
    if given.out is not None:
        write_json(given.out, contents)


if __name__ == "__main__":
    main()
