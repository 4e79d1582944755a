"""Reads what `normuon tune` wrote: the learning rate of every arm and how it was chosen.

The file shipped with the package, tuned.json, holds the rates of the default comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import read_json
from normuon_lab.config_difference import first_difference
from normuon_lab.errors import InputError, require
from normuon_lab.train.runs.config import Experiment

SCHEMA_VERSION = 1
KIND = "normuon tune"


@dataclass(frozen=True, slots=True)
class TunedRates:
    """A tuning file that was read: what it chose, and for what."""

    source: str
    values: Mapping[str, Any]

    @property
    def seeds(self) -> list[int]:
        """The seeds the rates were tuned on."""
        return list(self.values["seeds"])

    @classmethod
    def load(cls, path: str | None = None) -> TunedRates:
        """Read `path`, or the file shipped with the package."""
        if path is None:
            with resources.as_file(
                resources.files("normuon_lab.study.tune") / "tuned.json"
            ) as shipped:
                require(shipped.exists(), "no tuned rates are shipped: give --lr ARM=VALUE")
                return cls("shipped tuned.json", _read(shipped))
        require(Path(path).is_file(), f"--tuned: no such file: {path}")
        return cls(path, _read(Path(path)))

    def learning_rate(self, arm: str) -> float:
        """The chosen rate of `arm`."""
        if arm not in self.values["arms"]:
            raise InputError(
                f"{self.source} has no learning rate for {arm}: give --lr {arm}=VALUE, "
                f"or tune it with `normuon tune --arms {arm}`"
            )
        return float(self.values["arms"][arm]["learning_rate"])

    def summary(self, arm: str, experiment: Experiment, corpus_digest: str) -> str:
        """One sentence: how the rate of `arm` was chosen, and whether for this experiment."""
        chosen = self.values["arms"][arm]
        rates = [trial["learning_rate"] for trial in chosen["trials"]]
        text = (
            f"tuned: {len(rates)} rates from {min(rates):.3g} to {max(rates):.3g}, "
            f"seeds {', '.join(map(str, self.seeds))}, "
            f"mean final loss {chosen['mean_final_loss']:.4f} ({self.source})"
        )
        difference = first_difference(self.values["config"], experiment.to_json())
        if difference is not None:
            name, before, after = difference
            text += f"; tuned for another configuration ({name} = {before}, here {after})"
        elif self.values["corpus"]["sha256"] != corpus_digest:
            # The standard library of another Python, say.
            text += "; tuned on another version of the text"
        return text


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)
