"""The contents of the results' folder, cell by cell, for the tables and figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence.protocol import CELLS, CLAIM_SEEDS, Cell
from normuon_lab.study.evidence.runs_store import SWEEP_FILE, StoredRun, read_runs
from normuon_lab.study.search.sweep import read_tuned_arms
from normuon_lab.train.runs.records import RunRecord, objective

FINAL_LOSS = "final loss"

UPDATES_OF = ("adamw", "adam-mini", "muon", "normuon")
"""The arms of the paper's Fig. 1."""

MOMENTUM_OF = "muon"
"""Whose momentum stands for the raw one."""

Updates = Mapping[tuple[str, int], Mapping[str, Any]]
"""By matrix and step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CellEvidence:
    """The runs of one cell; any part may be missing.

    `runs` are the claim runs; `tuning` is each arm's part of the sweep's export.
    """

    cell: Cell
    runs: list[RunRecord] = field(default_factory=list)
    sensitivity: list[StoredRun] = field(default_factory=list)
    tuning: Mapping[str, Any] = field(default_factory=dict)

    @property
    def full_steps(self) -> int:
        """The full length N of the cell's schedules."""
        return self.cell.experiment.training.steps

    @property
    def is_empty(self) -> bool:
        """Whether the cell has no files."""
        return not (self.runs or self.sensitivity or self.tuning)

    @property
    def title(self) -> str:
        """The cell's task and size, for figures."""
        return f"{self.cell.title} parameters"

    @property
    def target_accuracy(self) -> float | None:
        """The held-out accuracy to which steps are counted; None where final losses count."""
        return self.cell.experiment.training.stop_at_accuracy

    @property
    def measure(self) -> str:
        """What the cell's steps are counted to, in words."""
        accuracy = self.target_accuracy
        return FINAL_LOSS if accuracy is None else f"{100 * accuracy:g}% held-out accuracy"

    def steps_to_accuracy(self, arm: str) -> dict[int, float]:
        """By seed, an arm's steps to the target accuracy; see `objective` for runs that miss it."""
        training = self.cell.experiment.training
        assert training.stop_at_accuracy is not None
        found = {run.seed: objective(run, training) for run in self.full_runs(arm)}
        return {seed: steps for seed, steps in found.items() if steps is not None}

    def missed_accuracy(self, arm: str) -> list[int]:
        """Seeds on which an arm never reached the target accuracy."""
        accuracy = self.target_accuracy
        assert accuracy is not None
        return [r.seed for r in self.full_runs(arm) if r.steps_to_accuracy(accuracy) is None]

    def final_losses(self, arm: str) -> dict[int, dict[int, float | None]]:
        """An arm's final losses by schedule length and seed; None where a run diverged."""
        found: dict[int, dict[int, float | None]] = {}
        for record in self.runs:
            if record.arm == arm:
                assert record.steps is not None
                found.setdefault(record.steps, {})[record.seed] = record.final_loss
        return dict(sorted(found.items()))

    def full_runs(self, arm: str) -> list[RunRecord]:
        """An arm's runs at the full length, in order of seeds."""
        runs = [run for run in self.runs if run.arm == arm and run.steps == self.full_steps]
        return sorted(runs, key=lambda run: run.seed)

    def loss_differences(self, arm: str, reference: str) -> npt.NDArray[np.float64] | None:
        """An arm's validation losses minus another's, `[seeds, evaluations]`, full length, paired.

        None where no seed has finished both, or where one diverged.
        """
        ours, theirs = ({r.seed: r for r in self.full_runs(name)} for name in (arm, reference))
        seeds = sorted(set(ours) & set(theirs))
        if not seeds or any(ours[seed].diverged or theirs[seed].diverged for seed in seeds):
            return None
        return np.array(
            [np.subtract(ours[seed].eval_losses, theirs[seed].eval_losses) for seed in seeds]
        )

    def measured_updates(self) -> dict[str, Updates]:
        """By arm, the measurements of one seed's full-length run, `momentum` included."""
        updates: dict[str, Updates] = {}
        for arm in UPDATES_OF:
            for run in self.full_runs(arm):
                if run.updates:
                    updates[arm] = {(u["matrix"], u["step"]): u for u in run.updates}
                    break
        with_momentum = {
            key: update["momentum"]
            for key, update in updates.get(MOMENTUM_OF, {}).items()
            if "momentum" in update
        }
        return {"momentum": with_momentum, **updates} if with_momentum else updates


def shortfalls(what: str, counts: Mapping[str, int], wanted: int) -> list[str]:
    """A sentence for each incomplete count, with the arms that have it.

    Example:
        >>> shortfalls("Claim runs", {"adamw": 6, "muon": 3, "normuon": 3}, 6)
        ['Claim runs, 3 of 6: Muon; NorMuon.']
    """
    arms: dict[int, list[str]] = {}
    for arm, count in counts.items():
        arms.setdefault(count, []).append(label_of(arm))
    return [
        f"{what}, {count} of {wanted}: {'; '.join(arms[count])}."
        for count in sorted(arms)
        if count < wanted
    ]


def collect(results: Path, cells: Mapping[str, Cell] = CELLS) -> list[CellEvidence]:
    """Read all files of the cells, in their order.

    Raises:
        InputError: a file is not what it should be.
    """
    return [
        CellEvidence(
            cell=cell,
            runs=[
                run.record
                for run in read_runs(results, cell.name)
                if run.record.seed in CLAIM_SEEDS
            ],
            sensitivity=read_runs(results, cell.name, purpose="sensitivity"),
            tuning=read_tuned_arms(results / cell.name / SWEEP_FILE),
        )
        for cell in cells.values()
    ]
