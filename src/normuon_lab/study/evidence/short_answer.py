"""The page's first paragraph: in how many cells NorMuon was ahead or behind, and by how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from normuon_lab.study.evidence.paper_claims import table_finding
from normuon_lab.study.evidence.verdicts import Verdict, verdict_in_cell


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """How often one arm needs fewer steps than another.

    Attributes:
        num_shown: cells in which that is shown, by the rule of `verdicts`.
        num_behind: cells in which the opposite is shown, by the same rule.
        num_cells: cells in which both were run, all seeds.
        saved: their figures, in words; empty without any.
    """

    num_shown: int
    num_behind: int
    num_cells: int
    saved: str


def lead(table1: Mapping[str, Any], arm: str, baseline: str) -> Lead:
    """An arm's lead over a baseline, over all cells of Table 1."""
    rows = [row for row in table1["rows"] if (row["arm"], row["baseline"]) == (arm, baseline)]
    findings = [table_finding(row, "steps_saved_percent", "steps saved") for row in rows]
    verdicts = [verdict_in_cell(finding, paper_value=0.0) for finding in findings]
    opposites = [verdict_in_cell(finding.opposite(), paper_value=0.0) for finding in findings]
    was_run = [verdict is not Verdict.NOT_RUN for verdict in verdicts]
    saved = [
        row["steps_saved_percent"]
        for row, counts in zip(rows, was_run, strict=True)
        if counts and row["steps_saved_percent"] is not None
    ]
    return Lead(
        num_shown=verdicts.count(Verdict.REPRODUCED),
        num_behind=opposites.count(Verdict.REPRODUCED),
        num_cells=sum(was_run),
        saved=_range_in_words(saved),
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
