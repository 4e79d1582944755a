"""What a learning rate of its own was worth to AdamW's half, from the trials of the tuning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normuon_lab.arms import MAIN_ARMS
from normuon_lab.evidence.collected import CellEvidence


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRate:
    """An arm's best trial with one rate for both halves, and its best of all.

    Attributes:
        arm: whose.
        shared: the trial with one rate for both.
        own: the best trial.
    """

    arm: str
    shared: Mapping[str, Any]
    own: Mapping[str, Any]

    @property
    def gain(self) -> float:
        """By how much the objective falls with a rate each; 0 where sharing was best."""
        shared, own = self.shared["mean_objective"], self.own["mean_objective"]
        return float(shared - own)


def own_rates(found: CellEvidence) -> list[OwnRate]:
    """Every arm that had both tried: one rate for both halves, and others."""
    return [
        OwnRate(
            arm=arm,
            shared=min(shared, key=lambda trial: trial["mean_objective"]),
            own=min(finished, key=lambda trial: trial["mean_objective"]),
        )
        for arm, tuned in found.tuning.items()
        if "adam_lr" in tuned["axes"]
        and (finished := [t for t in tuned["trials"] if t["mean_objective"] is not None])
        and (shared := [t for t in finished if t["adam_lr"] == t["learning_rate"]])
    ]


def own_rates_matter_more(evidence: Sequence[CellEvidence], table1: Mapping[str, Any]) -> bool:
    """Whether even the smallest gain exceeds the largest difference between NorMuon and Muon.

    Over all cells that count losses; False where either is not known.
    """
    gains = [
        rate.gain
        for found in evidence
        if found.target_accuracy is None
        for rate in own_rates(found)
        if rate.arm in MAIN_ARMS[1:]
    ]
    differences = [
        abs(row["loss_difference"])
        for row in table1["rows"]
        if (row["arm"], row["baseline"]) == ("normuon", "muon")
        and row["loss_difference"] is not None
    ]
    return bool(gains and differences) and min(gains) > max(differences)
