"""Table 2: what each arm's optimizer keeps and how long its step takes, on a cell's own model.

One thread, one process, arms in turn: in every round each arm takes one training step, forward and
backward pass and optimizer step timed apart. Times are the processor's, so that other work on the
machine changes them little; on a quiet machine they are those of the clock.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.atomic_files import prove_file, read_json, write_json
from normuon_lab.bench.measure import (
    profile_step,
    quartiles,
    tensor_bytes,
    tensor_elements,
    tracked_memory,
)
from normuon_lab.command_line import recorded_command
from normuon_lab.machine import describe_machine, utc_now
from normuon_lab.study.evidence.protocol import Cell
from normuon_lab.train.arms.builders import split_parameters
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.train.model import build_model, next_token_loss
from normuon_lab.train.runs.config import ModelConfig

KIND = "normuon evidence table2"
SCHEMA_VERSION = 1
FILE = "table2.json"

LEARNING_RATE = 1e-4
"""Small, so that hundreds of steps on one batch stay in the range of ordinary training."""
WARMUP_ROUNDS = 3
CPU = torch.device("cpu")
Say = Callable[[str], None]


@dataclass(slots=True)
class _Runner:
    """An arm ready to step, and its times so far.

    Attributes:
        kept: the bytes of state of all parameters; the elements of state of hidden matrices, step
            counts apart; and the bytes of scratch: what is held between steps besides parameters,
            gradients and state, plus the most that one step allocates beyond that.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    kept: dict[str, int]
    step_ms: list[float] = field(default_factory=list)
    passes_ms: list[float] = field(default_factory=list)

    def train_step(self, inputs: Tensor, targets: Tensor) -> None:
        started = time.process_time()
        next_token_loss(self.model, inputs, targets).backward()
        between = time.process_time()
        for optimizer in self.optimizers:
            optimizer.step()
        self.step_ms.append(1e3 * (time.process_time() - between))
        self.passes_ms.append(1e3 * (between - started))
        self.model.zero_grad(set_to_none=True)

    def to_json(self) -> dict[str, Any]:
        steps, passes = self.step_ms[WARMUP_ROUNDS:], self.passes_ms[WARMUP_ROUNDS:]
        shares = [100 * s / (s + p) for s, p in zip(steps, passes, strict=True)]
        return {
            **self.kept,
            "step_ms": round(statistics.median(steps), 3),
            "step_ms_quartiles": [round(end, 3) for end in quartiles(steps)],
            "passes_ms": round(statistics.median(passes), 3),
            "share_percent": round(statistics.median(shares), 1),
            "share_percent_quartiles": [round(end, 3) for end in quartiles(shares)],
        }


def write_table2(results: Path, cells: Iterable[Cell], *, rounds: int, say: Say) -> None:
    """Measure cells, `rounds` timed steps of every arm, and write them to table2.json.

    Other cells in the file are kept.
    """
    path = results / FILE
    prove_file(path, f"--results {results}")
    known = read_table2(results)
    measured = dict(known["cells"]) if known else {}
    for cell in cells:
        say(f"{cell.name}: {len(cell.arms)} arms")
        measured[cell.name] = {
            "command": recorded_command(),
            "created": utc_now(),
            "machine": describe_machine(num_workers=1),
            **_measured(cell, rounds=rounds),
        }
    write_json(path, {"schema_version": SCHEMA_VERSION, "kind": KIND, "cells": measured})


def read_table2(results: Path) -> dict[str, Any] | None:
    """The contents of table2.json; None where it is not there."""
    path = results / FILE
    return read_json(path, kind=KIND, schema_version=SCHEMA_VERSION) if path.exists() else None


def _measured(cell: Cell, *, rounds: int) -> dict[str, Any]:
    """Measure the arms on the cell's model and batch size, interleaved.

    The text does not matter to the times.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = cell.experiment.model
        generator = torch.Generator().manual_seed(0)
        shape = (cell.experiment.training.batch_size, model.sequence_length)
        inputs, targets = (
            torch.randint(model.vocab_size, shape, generator=generator) for _ in range(2)
        )
        runners = {arm: _prepared(arm, model, inputs, targets) for arm in cell.arms}
        for _ in range(WARMUP_ROUNDS + rounds):
            for runner in runners.values():
                runner.train_step(inputs, targets)
    finally:
        torch.set_num_threads(threads)
    hidden, _ = split_parameters(runners[cell.arms[0]].model)
    return {
        "rounds": rounds,
        "batch": list(shape),
        "hidden_matrices": [list(matrix.shape) for _, matrix in hidden],
        "arms": {arm: runner.to_json() for arm, runner in runners.items()},
    }


def expected_hidden_state(matrices: Sequence[Sequence[int]]) -> Mapping[str, int]:
    """Elements of state for hidden matrices, by formula: AdamW 2mn, Muon mn, NorMuon m (n + 1).

    Example:
        >>> dict(expected_hidden_state([(2, 3)]))
        {'adamw': 12, 'muon': 6, 'normuon': 8}
    """
    return {
        "adamw": sum(2 * m * n for m, n in matrices),
        "muon": sum(m * n for m, n in matrices),
        "normuon": sum(m * (n + 1) for m, n in matrices),
    }


def _prepared(arm: str, config: ModelConfig, inputs: Tensor, targets: Tensor) -> _Runner:
    model = build_model(config.to_transformers(), seed=0)
    next_token_loss(model, inputs, targets).backward()

    def step() -> None:
        for optimizer in optimizers:
            optimizer.step()

    with tracked_memory(CPU) as kept:
        optimizers = ARMS[arm].build(model, LEARNING_RATE)
        step()
        gc.collect()
    profile = profile_step(step, CPU)
    model.zero_grad(set_to_none=True)
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    state_bytes = tensor_bytes(states)
    of_hidden = [
        dict(optimizer.state[matrix])
        for optimizer in optimizers
        for _, matrix in split_parameters(model)[0]
        if matrix in optimizer.state
    ]
    scratch_bytes = max(0, kept.net - state_bytes) + profile.memory.peak
    counts = {
        "state_bytes": state_bytes,
        "hidden_state_elements": sum(map(tensor_elements, of_hidden)),
        "scratch_bytes": scratch_bytes,
    }
    return _Runner(model=model, optimizers=optimizers, kept=counts)
