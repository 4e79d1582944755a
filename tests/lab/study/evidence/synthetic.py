"""Made results with a known truth: every arm's final loss is a power law that is only shifted.

An arm whose loss is `shift` below AdamW's at every length reaches AdamW's final loss after
N exp(-shift / SLOPE) steps.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from normuon_lab.study.evidence.protocol import (
    CELLS,
    CLAIM_SEEDS,
    SENSITIVITY,
    Cell,
    schedule_steps,
)
from normuon_lab.study.evidence.runs import StoredRun, write_run
from normuon_lab.train.runs.config import Experiment, TrainConfig
from normuon_lab.train.runs.records import RunRecord

SLOPE = 0.25
SHIFTS = {
    "adamw": 0.0,
    "muon": 0.03,
    "normuon": 0.08,
    "normuon-short": 0.075,
    "muon-adam": 0.05,
    "normuon-front": 0.06,
    "normuon-tall": 0.055,
    "muon-frobenius": 0.02,
    "adam-mini": -0.02,
}
RUNGS = range(-3, 3)
STEPS = 500
PROVENANCE: dict[str, Any] = {"corpus": {}, "machine": {}}
NUM_EVALS = 10
MATRICES = [
    f"model.layers.{layer}.{kind}.weight"
    for layer in (0, 3)
    for kind in ("self_attn.q_proj", "mlp.up_proj")
]


def truth(arm: str, baseline: str = "adamw", *, strength: float = 1.0) -> float:
    """Percent of the baseline's steps that the arm saves."""
    return 100 * (1 - math.exp(-strength * (SHIFTS[arm] - SHIFTS[baseline]) / SLOPE))


def cell(name: str = "bytes-small", other_arms: Sequence[str] = tuple(SHIFTS)[3:]) -> Cell:
    """A cell whose runs `write_cell` makes."""
    return Cell(
        name=name,
        task="Python source, bytes",
        size="0.5M",
        experiment=Experiment(training=TrainConfig(steps=STEPS)),
        other_arms=tuple(other_arms),
        varied=tuple(SENSITIVITY) if other_arms else (),
    )


def record(
    arm: str,
    seed: int,
    steps: int,
    *,
    noise: float = 0.002,
    num_parameters: int = 491_520,
    strength: float = 1.0,
) -> RunRecord:
    """A finished run; `strength` multiplies what the arm is ahead."""
    # Not `hash`, which differs between processes.
    draw = random.Random(f"{arm} {seed} {steps}")
    hardness = random.Random(seed).gauss(0.0, 0.02)
    final = (
        2.0
        - strength * SHIFTS[arm]
        - SLOPE * math.log(steps / STEPS)
        + hardness
        + draw.gauss(0, noise)
    )
    eval_steps = [round(i * steps / NUM_EVALS) for i in range(NUM_EVALS + 1)]
    losses = [final + 3.5 * (1 - n / steps) ** 3 for n in eval_steps]
    return RunRecord(
        arm=arm,
        seed=seed,
        learning_rate=0.004,
        num_parameters=num_parameters,
        steps=steps,
        eval_steps=eval_steps,
        eval_losses=losses,
        eval_seconds=[0.05 * n * (1.0 if arm == "adamw" else 1.1) for n in eval_steps],
        final_loss=losses[-1],
        updates=updates(arm) if seed == 0 and steps == STEPS else [],
    )


def updates(arm: str) -> list[dict[str, Any]]:
    """Measurements as `update_probe` makes them: AdamW's are steep, Muon's flat, NorMuon's rows
    equal."""
    steepness = {"adamw": 3.0, "adam-mini": 3.0}.get(arm, 0.2)
    unevenness = {"adamw": 0.8, "adam-mini": 0.8, "muon": 0.6}.get(arm, 0.05)

    def described(steep: float, uneven: float) -> dict[str, Any]:
        rank, rows = 32, 64
        return {
            "shape": [rows, rank],
            "frobenius_norm": 1.0,
            "singular_values": [math.exp(-steep * i / rank) for i in range(rank)],
            "row_norms": [math.exp(-uneven * i / rows) for i in range(rows)],
        }

    found = []
    for step in (50, 250, 450):
        for matrix in MATRICES:
            update = {"step": step, "matrix": matrix, **described(steepness, unevenness)}
            if arm not in ("adamw", "adam-mini"):
                update["momentum"] = described(4.0, 1.0)
            found.append(update)
    return found


def write_cell(
    results: Path,
    made: Cell,
    *,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] = CLAIM_SEEDS,
    sensitivity: Mapping[str, Sequence[Any]] | None = None,
    **of_model: Any,
) -> None:
    """Write a cell's runs and the export of its tuning; `of_model` is `record`'s."""
    arms = made.arms if arms is None else arms
    provenance = {"experiment": made.experiment.to_json(), **PROVENANCE}
    for arm in arms:
        for seed in seeds:
            for rung in RUNGS:
                run = record(arm, seed, schedule_steps(STEPS, rung), **of_model)
                write_run(
                    results, StoredRun(cell=made.name, purpose="claim", record=run), provenance
                )
    for parameter, values in (sensitivity or {}).items():
        for i, value in enumerate(values):
            for seed in seeds:
                run = record("normuon", seed, STEPS)
                assert run.final_loss is not None
                run = replace(run, final_loss=run.final_loss + 0.01 * (i + 1))
                stored = StoredRun(
                    cell=made.name, purpose="sensitivity", record=run, varied=(parameter, value)
                )
                write_run(results, stored, provenance)
    write_sweep(results, made, arms)


LEARNED_AT = {"adamw": 400, "muon": 300, "normuon": 360}
"""Steps to 99% accuracy in `arithmetic_cell`, before each seed's own delay."""


def arithmetic_cell() -> Cell:
    """The protocol's cell of modular addition."""
    return CELLS["modular-addition"]


def write_arithmetic(results: Path, *, seeds: Sequence[int] = CLAIM_SEEDS) -> None:
    """Write the claim runs of `arithmetic_cell`; NorMuon's last seed never learns it."""
    made = arithmetic_cell()
    provenance = {"experiment": made.experiment.to_json(), **PROVENANCE}
    steps = made.experiment.training.steps
    for arm, learned_at in LEARNED_AT.items():
        for seed in seeds:
            reached = learned_at + 10 * seed
            is_missed = arm == "normuon" and seed == CLAIM_SEEDS[-1]
            # The accuracy of 0.99 lies half-way between the last two evaluations.
            accuracies = [0.0, 0.5, 0.5] if is_missed else [0.0, 0.98, 1.0]
            run = RunRecord(
                arm=arm,
                seed=seed,
                learning_rate=0.001,
                num_parameters=1,
                steps=steps,
                eval_steps=[0, reached - 10, reached + 10],
                eval_losses=[4.6, 0.1, 0.0],
                eval_seconds=[0.0, 1.0, 2.0],
                eval_accuracies=accuracies,
                final_loss=0.0,
            )
            write_run(results, StoredRun(cell=made.name, purpose="claim", record=run), provenance)
    write_sweep(results, made, made.arms)


def write_sweep(results: Path, made: Cell, arms: Sequence[str]) -> None:
    """The export of a tuning whose best learning rate is 0.004."""
    rates = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032]
    exported = {
        arm: {
            "axes": ["learning_rate", "weight_decay", "adam_lr"],
            "best": {"learning_rate": 0.004, "weight_decay": 0.1, "adam_lr": 0.004},
            "is_interior": True,
            "mean_objective": 2.0,
            "trials": [
                {
                    "number": i,
                    "learning_rate": rate,
                    "weight_decay": decay,
                    "adam_lr": 0.004,
                    "mean_objective": None
                    if rate > 0.03
                    else 2.0 - SHIFTS[arm] + 0.1 * math.log(rate / 0.004) ** 2 + decay / 10,
                    "objectives": {},
                }
                for i, (rate, decay) in enumerate((r, d) for r in rates for d in (0.1, 0.3))
            ],
        }
        for arm in arms
    }
    values = {
        "schema_version": 1,
        "kind": "normuon sweep",
        "cell": made.name,
        "config": made.experiment.to_json(),
        "corpus": {},
        "machine": {},
        "seeds": [1000, 1001],
        "arms": exported,
    }
    (results / made.name).mkdir(parents=True, exist_ok=True)
    (results / made.name / "sweep.json").write_text(json.dumps(values))
