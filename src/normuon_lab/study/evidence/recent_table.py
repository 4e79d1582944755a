"""What the runs of the rivals of 2026 say: their tuning, and differences from Muon and NorMuon."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.paper_claims import p_words
from normuon_lab.study.evidence.protocol import (
    RECENT_CELLS,
    RECENT_PARENT,
    RECENT_RIVALS,
    RECENT_SEEDS,
    RECENT_TRIALS,
    RECENT_TUNING_SEEDS,
)
from normuon_lab.study.evidence.recent_rivals import (
    FOLDER,
    RATES,
    compared_runs,
    tuning_losses,
)
from normuon_lab.study.evidence.runs_store import read_runs
from normuon_lab.study.evidence.verdicts import ALPHA
from normuon_lab.study.search.lattice import Losses, best_place, is_interior
from normuon_lab.study.statistics.estimates import paired_test, t_interval
from normuon_lab.train.runs.records import RunRecord

BASELINES = (RECENT_PARENT, "normuon")


def recent_tables(results: Path, evidence: Sequence[CellEvidence]) -> list[dict[str, Any]]:
    """A table for every cell in which a rival was run, and what is missing there.

    Args:
        results: the results' folder.
        evidence: the protocol's own runs, which the rivals are paired with.
    """
    cells = [found for found in evidence if found.cell.name in RECENT_CELLS]
    tables = [_table(results, found) for found in cells]
    return [table for table in tables if table["tuning"] or table["compared"]]


def _table(results: Path, found: CellEvidence) -> dict[str, Any]:
    tuned, compared = tuning_losses(results, found.cell), compared_runs(results, found.cell)
    return {
        "title": f"{found.cell.task}, {found.cell.size}",
        "tuning": [_tuning_row(arm, tuned[arm], found) for arm in RECENT_RIVALS if arm in tuned],
        "compared": [
            _compared_row(arm, compared[arm], baseline, found)
            for baseline in BASELINES
            for arm in RECENT_RIVALS
            if arm in compared
        ],
        "missing": _missing(tuned, compared),
        "processors": _processors(results / FOLDER, found, "tuning", "claim"),
        "published_processors": _processors(results, found, "claim"),
    }


def _processors(folder: Path, found: CellEvidence, *purposes: str) -> list[str]:
    """The processors that a folder's runs of the rivals or of the baselines were made on."""
    arms = (*RECENT_RIVALS, *BASELINES)
    runs = [run for what in purposes for run in read_runs(folder, found.cell.name, purpose=what)]
    return sorted({run.processor for run in runs if run.record.arm in arms and run.processor})


def _missing(tuned: Mapping[str, Losses], compared: Mapping[str, Sequence[RunRecord]]) -> list[str]:
    """What of the budget is not there, in sentences."""
    sentences = []
    for count in sorted({len(tuned.get(arm, {})) for arm in RECENT_RIVALS}):
        names = [label_of(arm) for arm in RECENT_RIVALS if len(tuned.get(arm, {})) == count]
        if count < RECENT_TRIALS:
            sentences.append(f"Rates tried, {count} of {RECENT_TRIALS}: {'; '.join(names)}.")
    for count in sorted({len(compared.get(arm, ())) for arm in RECENT_RIVALS}):
        names = [label_of(arm) for arm in RECENT_RIVALS if len(compared.get(arm, ())) == count]
        if count < len(RECENT_SEEDS):
            sentences.append(f"Compared seeds, {count} of {len(RECENT_SEEDS)}: {'; '.join(names)}.")
    return sentences


def _tuning_row(arm: str, losses: Losses, found: CellEvidence) -> dict[str, str]:
    rates = sorted(RATES.value(place[0]) for place in losses)
    best = best_place(losses)
    row = {
        "arm": label_of(arm),
        "rates": ", ".join(f"{rate:.3g}" for rate in rates),
        "best": f"{RATES.value(best[0]):.3g}",
        "is_interior": "yes" if is_interior(losses) else "no",
        "loss": _loss(losses[best]),
    }
    for baseline in BASELINES:
        theirs = _tuned_loss(found, baseline)
        row[baseline] = "" if theirs is None else f"{losses[best] - theirs:+.4f}"
    return row


def _tuned_loss(found: CellEvidence, arm: str) -> float | None:
    """An arm's mean loss at its best setting over the seeds that the rivals were tuned on."""
    tuned = found.tuning.get(arm)
    if tuned is None:
        return None
    best = next(
        trial
        for trial in tuned["trials"]
        if all(trial[name] == value for name, value in tuned["best"].items())
    )
    losses = [best["objectives"].get(str(seed)) for seed in RECENT_TUNING_SEEDS]
    return None if None in losses else math.fsum(losses) / len(losses)


def _compared_row(
    arm: str, runs: Sequence[RunRecord], baseline: str, found: CellEvidence
) -> dict[str, str]:
    ours, theirs = _final_losses(runs), _final_losses(found.full_runs(baseline))
    seeds = [seed for seed in ours if seed in theirs]
    difference = t_interval([ours[seed] - theirs[seed] for seed in seeds])
    test = paired_test([ours[seed] for seed in seeds], [theirs[seed] for seed in seeds])
    has_interval = difference.low is not None and difference.high is not None
    return {
        "arm": label_of(arm),
        "baseline": label_of(baseline),
        "seeds": ", ".join(str(run.seed) for run in runs),
        "diverged": ", ".join(str(run.seed) for run in runs if run.diverged),
        "difference": "" if difference.mean is None else f"{difference.mean:+.4f}",
        "interval": f"{difference.low:+.4f} to {difference.high:+.4f}" if has_interval else "",
        "p_value": "" if test is None else p_words(test.p_value),
        "verdict": _verdict(difference.low, difference.high, test.p_value if test else None),
    }


def _final_losses(runs: Sequence[RunRecord]) -> dict[int, float]:
    return {run.seed: run.final_loss for run in runs if run.final_loss is not None}


def _verdict(low: float | None, high: float | None, p_value: float | None) -> str:
    """Below or above where the interval is wholly there and the test agrees."""
    if low is None or high is None or p_value is None:
        return "too few seeds"
    if p_value < ALPHA and high < 0:
        return "below"
    return "above" if p_value < ALPHA and low > 0 else "not shown to differ"


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "diverged"
