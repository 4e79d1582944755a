"""results.json, the file of a comparison; docs/lab/results-schema.md has its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import damage_named, prove_folder, read_json
from normuon_lab.command_line import command_with
from normuon_lab.config_difference import first_difference
from normuon_lab.errors import InputError, require
from normuon_lab.study.statistics.curves import (
    METHOD,
    Comparison,
    PointsBetween,
    compare_arms,
    points_between,
)
from normuon_lab.train.runs.config import flag_of
from normuon_lab.train.runs.records import RunRecord

KIND = "normuon compare"
SCHEMA_VERSION = 1
RESULTS_FILE = "results.json"
REPORT_FILE = "report.html"


@dataclass(slots=True, kw_only=True)
class Results:
    """Everything a comparison knows; `records` grows as runs finish.

    Attributes:
        config: arms, seeds, learning rates, model, training and data; `--resume` requires
            it to be equal.
        learning_rates: per arm the rate, where it comes from and the trials it was chosen from.
    """

    config: dict[str, Any]
    corpus: dict[str, Any]
    learning_rates: dict[str, Any]
    machine: dict[str, Any]
    created: str
    records: list[RunRecord] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """The arms in the order in which they were asked for."""
        return list(self.config["arms"])

    @property
    def seeds(self) -> list[int]:
        """The seeds in ascending order."""
        return list(self.config["seeds"])

    @property
    def reference_arm(self) -> str:
        """The arm whose final loss is the target: AdamW, or the first if AdamW is not among
        them."""
        return "adamw" if "adamw" in self.arms else self.arms[0]

    @property
    def num_runs(self) -> int:
        """How many runs the comparison has when it is complete."""
        return len(self.arms) * len(self.seeds)

    @property
    def is_complete(self) -> bool:
        """Whether every arm has every seed."""
        return len(self.records) == self.num_runs

    def of_arm(self, arm: str) -> list[RunRecord]:
        """The arm's finished runs that did not diverge, by seed."""
        chosen = [record for record in self.records if record.arm == arm and not record.diverged]
        return sorted(chosen, key=lambda record: record.seed)

    def missing_runs(self) -> list[tuple[str, int]]:
        """Arm and seed of the runs still to do: all arms of a seed before the next seed."""
        done = {(record.arm, record.seed) for record in self.records}
        pairs = [(arm, seed) for seed in self.seeds for arm in self.arms]
        return [pair for pair in pairs if pair not in done]

    def comparisons(self) -> list[Comparison]:
        """Every arm against every arm named before it, the reference first."""
        order = sorted(self.arms, key=lambda arm: arm != self.reference_arm)
        return [
            compare_arms(arm, baseline, self.records)
            for i, arm in enumerate(order)
            for baseline in order[:i]
        ]

    def points(self) -> list[PointsBetween]:
        """Differences of efficiency between the arms that are compared with the reference."""
        against_reference = [c for c in self.comparisons() if c.baseline == self.reference_arm]
        return [
            points_between(ours, theirs)
            for i, ours in enumerate(against_reference)
            for theirs in against_reference[:i]
        ]

    def to_json(self) -> dict[str, Any]:
        """The contents of results.json."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "status": "complete" if self.is_complete else "partial",
            "created": self.created,
            "config": self.config,
            "corpus": self.corpus,
            "learning_rates": self.learning_rates,
            "machine": self.machine,
            "analysis": {
                "reference_arm": self.reference_arm,
                "method": METHOD,
                "comparisons": [_plain(comparison) for comparison in self.comparisons()],
                "efficiency_differences": [_plain(difference) for difference in self.points()],
            },
            "runs": [record.to_json() for record in self.records],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Results:
        """The inverse of `to_json`; the analysis is computed again from the runs."""
        kept = ("config", "corpus", "learning_rates", "machine", "created")
        records = [RunRecord.from_json(run) for run in values["runs"]]
        return cls(**{name: values[name] for name in kept}, records=records)


def open_results(out: Path, new: Results, *, resume: bool) -> Results:
    """The results to continue in folder `out`: those it holds, or `new`.

    The folder is made if it is not there. A finished comparison needs no `resume`.

    Raises:
        InputError: `out` is not a folder, holds files of others, holds results of another
            configuration or of another text, or holds some of the runs and `resume` was not asked
            for.
    """
    require(not out.exists() or out.is_dir(), f"--out {out} is a file; give a folder")
    path = out / RESULTS_FILE
    if not path.exists():
        require(
            not out.exists() or not any(out.iterdir()),
            f"--out {out} holds other files; give an empty or a new folder",
        )
        prove_folder(out, f"--out {out}")
        return new
    old = _read_results(path)
    difference = first_difference(old.config, new.config)
    if difference is not None:
        name, before, after = difference
        raise InputError(
            f"--out {out} holds results made with {_shown(name, before)}, not "
            f"{_shown(name, after)}; give the same, or another --out"
        )
    is_whole = old.learning_rates.keys() == new.learning_rates.keys()
    require(is_whole, f"{path} is damaged: it lacks the learning rate of an arm")
    require(
        old.corpus["sha256"] == new.corpus["sha256"],
        f"--out {out} holds results made from another text (SHA-256 {old.corpus['sha256'][:12]}"
        f"..., not {new.corpus['sha256'][:12]}...); give another --out",
    )
    require(
        resume or old.is_complete,
        f"--out {out} holds {len(old.records)} of the {old.num_runs} runs of "
        f"this comparison; continue with: {command_with('--resume')}, or give another --out",
    )
    return old


def _read_results(path: Path) -> Results:
    values = read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)
    with damage_named(path):
        results = Results.from_json(values)
        # The analysis goes through every run.
        results.to_json()
        for rate in results.learning_rates.values():
            require(isinstance(rate["source"], str), f"{path} does not say where a rate is from")
            _ = float(rate["value"]), list(rate["trials"])
        require(isinstance(results.corpus["sha256"], str), f"{path} does not name its text")
    return results


def _plain(found: Comparison | PointsBetween) -> Any:
    """As JSON has it: lists for tuples."""
    return json.loads(json.dumps(asdict(found)))


def _shown(name: str, value: Any) -> str:
    """A field of a configuration as the flag that gives it.

    >>> _shown("seeds", [0, 1]), _shown("learning_rates.muon", 0.01), _shown("data", ["a", "b"])
    ('--seeds 2', '--lr muon=0.01', '--data a b')
    """
    if name.startswith("learning_rates."):
        return f"--lr {name.rpartition('.')[2]}={value}"
    if name == "seeds" and value is not None:
        value = len(value)
    words = value if isinstance(value, list) else ["nothing" if value is None else value]
    return f"{flag_of(name)} {' '.join(map(str, words))}"
