"""The first lines of the page: where NorMuon was ahead or behind, and what mattered more."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.paper_claims import finding_of
from normuon_lab.train.arms.registry import MAIN_ARMS

Trial = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """In how many cells one arm is shown to need fewer steps than another, and in how many more.

    `num_cells` counts those in which both were run, all seeds; `saved` are their figures, in words.
    """

    num_shown: int
    num_behind: int
    num_cells: int
    saved: str


def lead(table1: Mapping[str, Any], arm: str, baseline: str) -> Lead:
    """An arm's lead over a baseline, over all cells of Table 1."""
    findings = [
        finding_of(row, "steps_saved_percent")
        for row in table1["rows"]
        if (row["arm"], row["baseline"]) == (arm, baseline)
    ]
    run = [finding for finding in findings if finding.was_run]
    return Lead(
        num_shown=sum(finding.is_shown for finding in run),
        num_behind=sum(finding.opposite().is_shown for finding in run),
        num_cells=len(run),
        saved=_range_in_words([found.estimate for found in run if found.estimate is not None]),
    )


def _range_in_words(percents: Sequence[float]) -> str:
    """
    >>> _range_in_words([44.71, 10.1]), _range_in_words([5.04]), _range_in_words([])
    ('10.1% to 44.7%', '5.0%', '')
    """
    if not percents:
        return ""
    low, high = f"{min(percents):.1f}%", f"{max(percents):.1f}%"
    return low if low == high else f"{low} to {high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRate:
    """What a separate learning rate for the AdamW parameters was worth to an arm, from its tuning.

    `shared` is the best trial with one rate for both, `own` the best of the same weight decay.
    """

    arm: str
    shared: Trial
    own: Trial

    @property
    def gain(self) -> float:
        """By how much the objective falls with a rate each; 0 where sharing was best."""
        shared, own = self.shared["mean_objective"], self.own["mean_objective"]
        return float(shared - own)


def own_rates(found: CellEvidence) -> list[OwnRate]:
    """Every arm that had both tried: one rate for both halves, and others."""
    rates = []
    for arm, tuned in found.tuning.items():
        if "adam_lr" not in tuned["axes"]:
            continue
        finished = [trial for trial in tuned["trials"] if trial["mean_objective"] is not None]
        shared = _best(t for t in finished if t["adam_lr"] == t["learning_rate"])
        if shared is not None:
            own = _best(t for t in finished if t["weight_decay"] == shared["weight_decay"])
            assert own is not None
            rates.append(OwnRate(arm=arm, shared=shared, own=own))
    return rates


def _best(trials: Iterable[Trial]) -> Trial | None:
    return min(trials, key=lambda trial: trial["mean_objective"], default=None)


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
