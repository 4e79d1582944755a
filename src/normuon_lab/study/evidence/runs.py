"""The runs of the evidence, one JSON file each, under ``<results>/<cell>``, and what a cell's say.

A file is written when its run is finished and never changed: what is missing is what is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from normuon_lab.atomic_files import damage_named, read_json, write_text
from normuon_lab.plot_style import label_of
from normuon_lab.study.evidence.protocol import CELLS, CLAIM_SEEDS, Cell
from normuon_lab.study.search.sweep import read_tuned_arms
from normuon_lab.train.runs.config import RunSpec
from normuon_lab.train.runs.records import RunRecord, objective

KIND = "normuon evidence run"
SCHEMA_VERSION = 1

FOLDERS = {"claim": "runs", "sensitivity": "sensitivity", "tuning": "tuning"}
"""Inside a cell's folder, by what the runs were for."""
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRun:
    """A run and what it was for.

    Attributes:
        purpose: ``"claim"``, ``"sensitivity"`` or ``"tuning"``; tunings that are kept in a sweep's
            export have no files of their own.
        varied: for a sensitivity run, the hyperparameter and its value; otherwise None.
        processor: on which a run that was read was made; empty where that was not kept.
        corpus_digest: SHA-256 of the text, of a run that was read; empty for arithmetic.
    """

    cell: str
    purpose: str
    record: RunRecord
    varied: tuple[str, Any] | None = None
    processor: str = ""
    corpus_digest: str = ""

    @property
    def path(self) -> Path:
        """The file's path, relative to the results' folder."""
        return path_of(self.cell, self.purpose, self.record, self.varied)


def path_of(
    cell: str, purpose: str, run: RunRecord | RunSpec, varied: tuple[str, Any] | None = None
) -> Path:
    """The path of a run's file, relative to the results' folder.

    Example:
        >>> run = RunSpec(arm="muon", seed=2, learning_rate=1.0, steps=9)
        >>> path_of("bytes", "claim", run).as_posix()
        'bytes/runs/muon-n9-s2.json'
    """
    what = run.arm if varied is None else "{}-{}".format(*varied)
    rate = f"-lr{run.learning_rate:.4g}" if purpose == "tuning" else ""
    return Path(cell, FOLDERS[purpose], f"{what}{rate}-n{run.steps}-s{run.seed}.json")


def write_run(folder: Path, run: StoredRun, provenance: Mapping[str, Any]) -> None:
    """Keep a run, with further fields of `provenance`: experiment, corpus, machine, date."""
    record = run.record.to_json()
    # Curves of hundreds of steps, in hundreds of files: four digits say all that a plot can show.
    record["train_losses"] = [round(loss, 4) for loss in record["train_losses"]]
    values = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "cell": run.cell,
        "purpose": run.purpose,
        **dict(zip(("parameter", "value"), run.varied or (), strict=False)),
        **provenance,
        "run": record,
    }
    path = folder / run.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n")


def read_runs(folder: Path, cell: str, *, purpose: str = "claim") -> list[StoredRun]:
    """All runs of a cell that were kept for a purpose, by file name."""
    found = []
    for path in sorted((folder / cell / FOLDERS[purpose]).glob("*.json")):
        values = read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)
        with damage_named(path):
            varied = (values["parameter"], values["value"]) if "parameter" in values else None
            record = RunRecord.from_json(values["run"])
            machine = values["machine"]
            processor = ""
            if "processor" in machine:
                processor = f"{machine['processor']}, {machine['cpu_capability']}"
            found.append(
                StoredRun(
                    cell=cell,
                    purpose=purpose,
                    record=record,
                    varied=varied,
                    processor=processor,
                    corpus_digest=values["corpus"].get("sha256", ""),
                )
            )
    return found


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
    def is_empty(self) -> bool:
        """Whether the cell has no files."""
        return not (self.runs or self.sensitivity or self.tuning)

    @property
    def title(self) -> str:
        """The cell's task and size, for figures."""
        return f"{self.cell.title} parameters"

    def steps_to_accuracy(self, arm: str) -> dict[int, float]:
        """By seed, an arm's steps to the target accuracy; see `objective` for runs that miss it."""
        training = self.cell.experiment.training
        found = {run.seed: objective(run, training) for run in self.full_runs(arm)}
        return {seed: steps for seed, steps in found.items() if steps is not None}

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
        runs = [run for run in self.runs if run.arm == arm and run.steps == self.cell.full_steps]
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

    def varied_losses(self) -> dict[str, dict[Any, list[tuple[float | None, float | None]]]]:
        """By hyperparameter and value: for each seed, NorMuon's final loss with it, and without.

        None where a run diverged.
        """
        plain = {run.seed: run.final_loss for run in self.full_runs("normuon")}
        pairs: dict[str, dict[Any, list[tuple[float | None, float | None]]]] = {}
        for run in self.sensitivity:
            if run.varied is not None and run.record.seed in plain:
                name, value = run.varied
                pair = (run.record.final_loss, plain[run.record.seed])
                pairs.setdefault(name, {}).setdefault(value, []).append(pair)
        return pairs

    def measured_updates(self) -> dict[str, Updates]:
        """By arm, the measurements of one seed's full-length run, `momentum` included."""
        updates: dict[str, Updates] = {}
        for arm in UPDATES_OF:
            measured = next((run.updates for run in self.full_runs(arm) if run.updates), None)
            if measured is not None:
                updates[arm] = {(u["matrix"], u["step"]): u for u in measured}
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
    """Read all files of the cells, in their order."""
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
