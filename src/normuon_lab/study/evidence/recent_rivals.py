"""The rivals of 2026: a small tuning of the learning rate, seeds paired with Muon's, their tables.

They have a folder of their own under ``results``, with a file for every run, the tuning's too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from normuon_lab.errors import require
from normuon_lab.study.evidence import protocol
from normuon_lab.study.evidence.protocol import RECENT_CELLS, RECENT_PARENT, RECENT_RIVALS, Cell
from normuon_lab.study.evidence.running import do_runs, final_losses_alone, tuned_setting
from normuon_lab.study.evidence.runs import CellEvidence, StoredRun, read_runs, shortfalls
from normuon_lab.study.evidence.verdicts import Finding
from normuon_lab.study.search.lattice import Losses, best_place, is_interior, next_round
from normuon_lab.study.search.searching import AXES, Place, spec_of
from normuon_lab.train.runs.records import RunRecord

FOLDER = "recent-rivals"
RATES = AXES["learning_rate"]
BASELINES = (RECENT_PARENT, "normuon")
COMPARED_WITH = (*BASELINES, "normuon-equilibrated")
"""The last is the library's own equilibration, by rows and columns: where a cell has it."""


def tune_rivals(cell: Cell, arms: Sequence[str], *, results: Path, console: Console) -> None:
    """Tune the learning rate of each arm, all else as tuned for Muon; finished runs are kept."""
    while True:
        known = tuning_losses(results, cell)
        wanted = next_round(
            {arm: known.get(arm, {}) for arm in arms},
            {arm: (protocol.RECENT_STARTS[arm],) for arm in arms},
            min_trials=protocol.RECENT_TRIALS,
            max_trials=protocol.MAX_TUNING_TRIALS,
        )
        if not wanted:
            return
        runs = [
            (arm, seed, place)
            for seed in protocol.RECENT_TUNING_SEEDS
            for arm, places in wanted.items()
            for place in places
        ]
        _do_runs(cell, runs, "tuning", results=results, console=console)


def compare_rivals(cell: Cell, arms: Sequence[str], *, results: Path, console: Console) -> None:
    """Train each arm at its best rate on the seeds that are compared, one seed after another."""
    known = tuning_losses(results, cell)
    for arm in arms:
        require(bool(known.get(arm)), f"tune {arm} in {cell.name} before its claim runs")
    runs = [(arm, seed, best_place(known[arm])) for seed in protocol.RECENT_SEEDS for arm in arms]
    _do_runs(cell, runs, "claim", results=results, console=console)


def _do_runs(
    cell: Cell,
    wanted: Sequence[tuple[str, int, Place]],
    purpose: str,
    *,
    results: Path,
    console: Console,
) -> None:
    """Do runs, each an arm, a seed and a place on the axis of rates."""
    parent = tuned_setting(results, cell, RECENT_PARENT, before=wanted[0][0])
    specs = [
        spec_of(arm, seed, {**parent, "learning_rate": RATES.value(k)}, steps=cell.full_steps)
        for arm, seed, (k,) in wanted
    ]
    do_runs(
        cell,
        specs,
        purpose,
        experiment=final_losses_alone(cell.experiment),
        folder=results / FOLDER,
        console=console,
    )


def tuning_losses(results: Path, cell: Cell) -> dict[str, dict[Place, float]]:
    """By arm and place on the axis of rates, the mean final loss of the tuning seeds.

    Infinite where a run diverged. Places are in the order of a search, and those without all seeds
    are left out.
    """
    found: dict[str, dict[Place, dict[int, float]]] = {}
    for run in (r.record for r in read_runs(results / FOLDER, cell.name, purpose="tuning")):
        place = (round(2 * math.log(run.learning_rate / RATES.base, RATES.ratio)) / 2,)
        loss = math.inf if run.final_loss is None else run.final_loss
        found.setdefault(run.arm, {}).setdefault(place, {})[run.seed] = loss
    starts, seeds = protocol.RECENT_STARTS, protocol.RECENT_TUNING_SEEDS
    return {
        arm: {
            place: math.fsum(by_place[place].values()) / len(seeds)
            # Nearest to the start first: of equal places the search keeps the one it tried first.
            for place in sorted(by_place, key=lambda p: (abs(p[0] - starts[arm]), p))
            if set(by_place[place]) == set(seeds)
        }
        for arm, by_place in found.items()
    }


def recent_tables(results: Path, evidence: Sequence[CellEvidence]) -> list[dict[str, Any]]:
    """The tables of every cell of the rivals, and what is missing there; none without any run.

    `evidence` has the protocol's own runs, which the rivals are paired with.
    """
    cells = [found for found in evidence if found.cell.name in RECENT_CELLS]
    tables = [_tables(results, found) for found in cells]
    return tables if any(table["tuning"] or table["compared"] for table in tables) else []


def _tables(results: Path, found: CellEvidence) -> dict[str, Any]:
    name, wanted = found.cell.name, RECENT_CELLS[found.cell.name]
    tuned = tuning_losses(results, found.cell)
    tuning, claims = (
        read_runs(results / FOLDER, name, purpose=purpose) for purpose in ("tuning", "claim")
    )
    rivals = CellEvidence(cell=found.cell, runs=[run.record for run in claims])
    tried = {arm: len(tuned.get(arm, ())) for arm in wanted}
    seeds = {arm: len(rivals.full_runs(arm)) for arm in wanted}
    return {
        "title": found.cell.title,
        "tuning": [_tuning_row(arm, tuned[arm], found) for arm in RECENT_RIVALS if arm in tuned],
        "compared": [
            _compared_row(arm, rivals.full_runs(arm), baseline, found.full_runs(baseline))
            for baseline in COMPARED_WITH
            for arm in RECENT_RIVALS
            if found.full_runs(baseline) and rivals.full_runs(arm)
        ],
        "missing": [
            *shortfalls("Rates tried", tried, protocol.RECENT_TRIALS),
            *shortfalls("Compared seeds", seeds, len(protocol.RECENT_SEEDS)),
        ],
        "processors": _processors([*tuning, *claims]),
        "published_processors": _processors(read_runs(results, name)),
    }


def _processors(runs: Sequence[StoredRun]) -> list[str]:
    """Where the runs of the rivals or of what they are compared with were made."""
    arms = (*RECENT_RIVALS, *COMPARED_WITH)
    return sorted({run.processor for run in runs if run.record.arm in arms and run.processor})


def _tuning_row(arm: str, losses: Losses, found: CellEvidence) -> dict[str, Any]:
    best = best_place(losses)
    tuned = {baseline: _tuned_loss(found, baseline) for baseline in BASELINES}
    return {
        "arm": arm,
        "rates": sorted(RATES.value(place[0]) for place in losses),
        "best": RATES.value(best[0]),
        "is_interior": is_interior(losses),
        "loss": losses[best] if math.isfinite(losses[best]) else None,
        "minus": {name: None if x is None else losses[best] - x for name, x in tuned.items()},
    }


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
    losses = [best["objectives"].get(str(seed)) for seed in protocol.RECENT_TUNING_SEEDS]
    return None if None in losses else math.fsum(losses) / len(losses)


def _compared_row(
    arm: str, runs: Sequence[RunRecord], baseline: str, baseline_runs: Sequence[RunRecord]
) -> dict[str, Any]:
    ours, theirs = (
        {run.seed: run.final_loss for run in some if run.final_loss is not None}
        for some in (runs, baseline_runs)
    )
    above = Finding.over_seeds([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    verdict = "not shown to differ"
    if above.is_shown or above.opposite().is_shown:
        verdict = "above" if above.is_shown else "below"
    elif above.low is None:
        verdict = "too few seeds"
    return {
        "arm": arm,
        "baseline": baseline,
        "seeds": [run.seed for run in runs],
        "diverged": [run.seed for run in runs if run.diverged],
        "difference": above,
        "verdict": verdict,
    }
