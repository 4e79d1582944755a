"""The runs of a cell, one JSON file each, under ``<results>/<cell>/runs``.

A file is written when its run is finished and never changed: what is missing is what is not there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import damage_named, read_json, write_text
from normuon_lab.train.runs.records import RunRecord

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
        """The file's path, relative to the results' folder.

        Example:
            >>> record = RunRecord(arm="muon", seed=2, learning_rate=1.0, num_parameters=1, steps=9)
            >>> StoredRun(cell="bytes", purpose="claim", record=record).path.as_posix()
            'bytes/runs/muon-n9-s2.json'
        """
        folder, record = Path(self.cell, FOLDERS[self.purpose]), self.record
        length = f"n{record.steps}-s{record.seed}.json"
        if self.varied is not None:
            parameter, value = self.varied
            return folder / f"{parameter}-{value}-{length}"
        if self.purpose == "tuning":
            return folder / f"{record.arm}-lr{record.learning_rate:.4g}-{length}"
        return folder / f"{record.arm}-{length}"


def write_run(folder: Path, run: StoredRun, provenance: Mapping[str, Any]) -> None:
    """Keep a run, with further fields of `provenance`: experiment, corpus, machine, date."""
    values: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "cell": run.cell,
        "purpose": run.purpose,
    }
    if run.varied is not None:
        values["parameter"], values["value"] = run.varied
    record = run.record.to_json()
    # Curves of hundreds of steps, in hundreds of files: four digits say all that a plot can show.
    record["train_losses"] = [round(loss, 4) for loss in record["train_losses"]]
    values |= {**provenance, "run": record}
    path = folder / run.path
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(values, allow_nan=False, separators=(",", ":")) + "\n")


def read_runs(folder: Path, cell: str, *, purpose: str = "claim") -> list[StoredRun]:
    """All runs of a cell that were kept for a purpose, by file name.

    Raises:
        InputError: a file is not what it should be.
    """
    found = []
    for path in sorted((folder / cell / FOLDERS[purpose]).glob("*.json")):
        values = read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)
        with damage_named(path):
            varied = (values["parameter"], values["value"]) if "parameter" in values else None
            record = RunRecord.from_json(values["run"])
            found.append(
                StoredRun(
                    cell=cell,
                    purpose=purpose,
                    record=record,
                    varied=varied,
                    processor=_processor(values["machine"]),
                    corpus_digest=values["corpus"].get("sha256", ""),
                )
            )
    return found


def _processor(machine: Mapping[str, Any]) -> str:
    if "processor" not in machine:
        return ""
    return f"{machine['processor']}, {machine['cpu_capability']}"
