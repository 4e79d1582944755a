"""The paper's claims, one by one, with what our runs say of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from normuon_lab.plot_style import label_of
from normuon_lab.study.evidence import paper
from normuon_lab.study.evidence.protocol import CLAIM_SEEDS, FINAL_LOSS
from normuon_lab.study.evidence.runs import CellEvidence
from normuon_lab.study.evidence.table1 import Row, Table, more_steps, rows_of
from normuon_lab.study.evidence.table2 import expected_hidden_state
from normuon_lab.study.evidence.verdicts import (
    Finding,
    Verdict,
    overall,
    verdict_by_count,
    verdict_in_cell,
)

EARLY = 0.2
"""The share of the steps at which "early" is read."""


@dataclass(frozen=True, slots=True)
class CellVerdict:
    """One cell's result for a claim: the cell, the verdict, the figure, and the figure in words."""

    where: str
    verdict: Verdict
    short: str
    text: str


@dataclass(frozen=True, slots=True)
class ClaimResult:
    """A claim in one sentence, the paper's figure, and what each cell says."""

    claim: str
    paper: str
    cells: Sequence[CellVerdict]

    @property
    def verdict(self) -> Verdict:
        """Over all cells that were run."""
        return overall([cell.verdict for cell in self.cells])

    @property
    def words(self) -> str:
        """The verdict, and on how many cells it rests while some are missing."""
        count = sum(cell.verdict is not Verdict.NOT_RUN for cell in self.cells)
        if count in (0, len(self.cells)):
            return f"**{self.verdict.value}**"
        return f"**{self.verdict.value}** so far, in {count} of {len(self.cells)} cells"

    @property
    def figures(self) -> str:
        """The figures of the cells that were run."""
        return "; ".join(c.short for c in self.cells if c.verdict is not Verdict.NOT_RUN)


def paper_claims(
    evidence: Sequence[CellEvidence], table1: Table, table2: Table | None
) -> list[ClaimResult]:
    """Every claim, in the paper's order."""
    saved, larger = paper.STEPS_SAVED_1B, paper.STEPS_SAVED_5B
    on_text = [found for found in evidence if found.cell.target_accuracy is None]
    over_muon = rows_of(table1, "normuon", "muon")
    claims = [
        *(
            (
                f"{label_of(arm)} reaches AdamW's final loss in fewer steps.",
                f"{saved[arm]}% fewer at 1.1B, {larger[arm]}% at 5.4B",
                _steps(_on_losses(rows_of(table1, arm, "adamw")), paper_value=saved[arm]),
            )
            for arm in ("normuon", "muon")
        ),
        (
            "NorMuon saves steps over Muon too.",
            f"{paper.POINTS_OVER_MUON_1B} points more of AdamW's steps at 1.1B; here, percent of "
            "Muon's own steps",
            _steps(_on_losses(over_muon), paper_value=paper.POINTS_OVER_MUON_1B),
        ),
        (
            "Muon needs a longer schedule to reach NorMuon's loss.",
            f"{paper.MUON_MORE_STEPS_124M:.0f}% more steps at 124M, "
            f"{paper.MUON_MORE_STEPS_350M:.0f}% at 350M",
            _steps(_on_losses(table1["muon_rescale"]), paper_value=paper.MUON_MORE_STEPS_124M),
        ),
        *(
            (claim, stated, _variations(on_text, *compared))
            for claim, stated, compared in UPDATE_CLAIMS
        ),
        *(
            (claim, "Fig. 3 and 7", _lower_losses(on_text, *pair, share))
            for claim, pair, share in ABLATION_CLAIMS
        ),
        (
            "On hidden matrices NorMuon keeps m (n + 1) numbers, Muon m n, AdamW 2 m n.",
            "Table 2",
            _states(table2),
        ),
        (
            "On 16 GPUs NorMuon's training step is hardly longer than AdamW's.",
            f"{paper.STEP_TIME_OVER_ADAMW}% longer",
            _not_testable("it needs 16 GPUs; Table 2 has times of one thread on small models"),
        ),
        (
            "The savings hold at 1.1B and 5.4B parameters.",
            "Table 1",
            _not_testable("such models cannot be trained on two CPU cores"),
        ),
        (
            "The adverse case: NorMuon learns modular addition later than Muon.",
            "not in the paper: reported by a replication",
            _steps([more_steps(row) for row in over_muon if row["measure"] != FINAL_LOSS]),
        ),
    ]
    return [ClaimResult(*claim) for claim in claims]


UPDATE_CLAIMS = (
    (
        "Muon's updates have flatter spectra than AdamW's.",
        "Fig. 1, left: AdamW's and the momentum's are far steeper",
        ("adamw", "muon", "singular_values"),
    ),
    (
        "NorMuon's updates keep Muon's flat spectra.",
        "Fig. 1, left: far flatter than AdamW's",
        ("adamw", "normuon", "singular_values"),
    ),
    (
        "NorMuon's rows have more equal norms than Muon's.",
        "Fig. 1, right",
        ("muon", "normuon", "row_norms"),
    ),
)
"""The claim, the paper's figure, whose values vary more than whose, and which values."""

ABLATION_CLAIMS = (
    ("Muon + Adam, one scale per entry, ends below Muon.", ("muon-adam", "muon"), 1.0),
    ("NorMuon ends below Muon + Adam.", ("normuon", "muon-adam"), 1.0),
    ("Normalising before orthogonalisation ends higher.", ("normuon", "normuon-front"), 1.0),
    ("Normalising only matrices with m > n ends higher.", ("normuon", "normuon-tall"), 1.0),
    ("Muon with a fixed norm is ahead of Muon early.", ("muon-frobenius", "muon"), EARLY),
    ("At the end Muon is ahead of Muon with a fixed norm.", ("muon", "muon-frobenius"), 1.0),
)
"""The claim, which arm's loss is lower than which's, and at which share of the steps."""


def _on_losses(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["measure"] == FINAL_LOSS]


def _steps(rows: Sequence[Row], *, paper_value: float = 0.0) -> list[CellVerdict]:
    """What rows of table1.json say: of more steps where they have them, or else of steps saved."""
    cells = []
    for row in rows:
        key, what = "steps_saved_percent", "steps saved"
        if "more_steps_percent" in row:
            key, what = "more_steps_percent", "more steps"
        text, short = row["reason_if_missing"], "none"
        if row[key] is not None:
            ends, p_value = interval_words(row["ci95"]), p_words(row["p_value"])
            short = f"{row[key]:.1f}%"
            text = f"{what} {short} (bootstrap {ends}; {p_value})"
        num_seeds = len(row["claim_seeds"])
        if 0 < num_seeds < len(CLAIM_SEEDS):
            text += f" ({num_seeds} of {len(CLAIM_SEEDS)} seeds so far)"
        verdict = verdict_in_cell(finding_of(row, key), paper_value=paper_value)
        where = f"{row['task']}, {row['size']}"
        cells.append(CellVerdict(where, verdict, short, text))
    return cells


def finding_of(row: Row, key: str = "steps_saved_percent") -> Finding:
    """What a row says; where only a bound above zero is known, more schedules are to be run."""
    low, high = row["ci95"] or (None, None)
    was_run = len(row["claim_seeds"]) == len(CLAIM_SEEDS) and row["at_least_percent"] is None
    return Finding(estimate=row[key], low=low, high=high, p_value=row["p_value"], was_run=was_run)


def interval_words(bounds: Sequence[float | None] | None) -> str:
    """An interval in words, its open ends too.

    Example:
        >>> interval_words([1.04, 2.0]), interval_words([None, 2.0]), interval_words(None)
        ('1.0 to 2.0', 'up to 2.0', 'no interval')
    """
    if bounds is None:
        return "no interval"
    low, high = bounds
    if low is None:
        return f"up to {high:.1f}"
    return f"{low:.1f} or more" if high is None else f"{low:.1f} to {high:.1f}"


def p_words(p_value: float | None) -> str:
    """A p value in words.

    Example:
        >>> p_words(0.0123), p_words(1e-7), p_words(None)
        ('p = 0.012', 'p < 0.0001', 'no test')
    """
    if p_value is None:
        return "no test"
    return "p < 0.0001" if p_value < 1e-4 else f"p = {p_value:.2g}"


def _variations(
    evidence: Sequence[CellEvidence], rough: str, even: str, key: str
) -> list[CellVerdict]:
    """Count the matrices and stages at which the first arm's values vary more than the second's."""
    cells = []
    for found in evidence:
        updates = found.measured_updates()
        if rough not in updates or even not in updates:
            continue
        shared = updates[rough].keys() & updates[even].keys()
        count = sum(
            _variation(updates[rough][place][key]) > _variation(updates[even][place][key])
            for place in shared
        )
        verdict, short = verdict_by_count(count, len(shared)), f"{count} of {len(shared)}"
        text = f"{short} measured matrices and stages of one seed"
        cells.append(CellVerdict(found.cell.title, verdict, short, text))
    return cells


def _variation(values: Sequence[float]) -> float:
    """Standard deviation over mean; 0 for zeros."""
    array = np.asarray(values)
    return float(array.std() / array.mean()) if array.any() else 0.0


def _lower_losses(
    evidence: Sequence[CellEvidence], better: str, worse: str, share: float
) -> list[CellVerdict]:
    """By how much the better arm's loss is lower, paired, in the cells that have both arms."""
    cells = []
    for found in evidence:
        if not {better, worse} <= set(found.cell.arms):
            continue
        differences = found.loss_differences(worse, better)
        if differences is None:
            was_run = bool(found.full_runs(better) and found.full_runs(worse))
            finding, short = Finding(estimate=None, was_run=was_run), "none"
            text = "a run diverged" if was_run else "some runs are missing"
        else:
            values = differences[:, round(share * (differences.shape[1] - 1))].tolist()
            finding = Finding.over_seeds(values, was_run=len(values) == len(CLAIM_SEEDS))
            interval = "no interval"
            if finding.low is not None:
                interval = f"t interval {finding.low:.4f} to {finding.high:.4f}"
            short = f"{finding.estimate:+.4f} nats"
            text = (
                f"loss of {label_of(worse)} minus that of {label_of(better)}: "
                f"{short} ({interval}; {p_words(finding.p_value)})"
            )
        verdict = verdict_in_cell(finding)
        cells.append(CellVerdict(found.cell.title, verdict, short, text))
    return cells


def _states(table2: Table | None) -> list[CellVerdict]:
    cells = []
    for name, measured in (table2 or {"cells": {}})["cells"].items():
        expected = expected_hidden_state(measured["hidden_matrices"])
        kept = {arm: measured["arms"][arm]["hidden_state_elements"] for arm in expected}
        verdict = Verdict.REPRODUCED if kept == expected else Verdict.NOT_REPRODUCED
        share = f"{kept['normuon'] / kept['adamw']:.3f} of AdamW's"
        text = f"NorMuon keeps {share} elements, counted"
        cells.append(CellVerdict(name, verdict, share, text))
    return cells


def _not_testable(why: str) -> list[CellVerdict]:
    return [CellVerdict("no cell", Verdict.NOT_TESTABLE, "", why)]
