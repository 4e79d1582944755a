"""Table 1: by how many percent fewer steps each arm reaches its baselines' final loss.

Also Muon-rescale, the reverse: how many more steps Muon needs to reach NorMuon's final loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from normuon_lab.plot_style import label_of
from normuon_lab.study.evidence.protocol import CLAIM_SEEDS, baselines_of
from normuon_lab.study.evidence.runs import CellEvidence
from normuon_lab.study.statistics.estimates import Estimate, Interval, t_interval
from normuon_lab.study.statistics.schedules import (
    StepsSaved,
    steps_saved_by_schedules,
    steps_saved_to_threshold,
)
from normuon_lab.train.runs.records import MISSED_FACTOR

Row = Mapping[str, Any]
Table = Mapping[str, Any]
"""The contents of a file of a table."""

KIND = "normuon evidence table1"
SCHEMA_VERSION = 1
FILE = "table1.json"

METHOD = (
    "Steps saved: 100 (1 - n*/N), where N is the full length of the schedule and n* the length of "
    "the arm's own complete schedule whose mean final loss equals the baseline's mean final loss "
    "at N, interpolated linearly in log(steps) between neighbouring lengths, never beyond them. "
    "ci95: BCa bootstrap over claim seeds, all runs of a seed together; an end is null where it "
    "lies beyond the lengths run. ci95_t: Student's t over each seed's own saving. p_value: paired "
    "t test on final losses at N; p_value_sign_flip: permutation test on the same, which gives "
    "2 / 2^seeds at best. Where `measure` is an accuracy, steps are counted until a run first has "
    "it, all at one length and without decay: saved is then 100 (1 - ratio of mean steps), and the "
    "tests are on steps."
)


def table1(evidence: Sequence[CellEvidence]) -> dict[str, Any]:
    """The contents of table1.json."""
    saved = [
        (found, arm, baseline, steps_saved(found, arm, baseline))
        for found in evidence
        for arm in found.cell.arms
        for baseline in baselines_of(arm)
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "method": METHOD,
        "rows": [_row(*pair) for pair in saved],
        "muon_rescale": [_rescale_row(found) for found in evidence],
        "size_trends": _size_trends(saved),
    }


def rows_of(table: Table, arm: str, baseline: str) -> list[Row]:
    """The rows of an arm against a baseline, one for each cell."""
    return [row for row in table["rows"] if (row["arm"], row["baseline"]) == (arm, baseline)]


def by_baseline(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows against each baseline."""
    grouped: dict[str, list[Row]] = {}
    for row in rows:
        grouped.setdefault(row["baseline"], []).append(row)
    return grouped


def steps_saved(found: CellEvidence, arm: str, baseline: str) -> StepsSaved:
    """The share of a baseline's steps that an arm saves in a cell."""
    accuracy, full_steps = found.cell.target_accuracy, found.cell.full_steps
    runs = {name: found.full_runs(name) for name in (arm, baseline)}
    if accuracy is None:
        # Of the arm any length will do.
        runs[arm] = [run for run in found.runs if run.arm == arm]
    for name, there in runs.items():
        if not there:
            return StepsSaved(seeds=(), reason=f"{label_of(name)} has not been run")
    if accuracy is None:
        target = found.final_losses(baseline)[full_steps]
        return steps_saved_by_schedules(found.final_losses(arm), target, full_steps=full_steps)
    saved = steps_saved_to_threshold(*map(found.steps_to_accuracy, runs))
    notes = [
        f"{label_of(name)} never had the accuracy in {missed} of {len(there)} runs, "
        f"which count as {MISSED_FACTOR:g} times their length"
        for name, there in runs.items()
        if (missed := sum(run.steps_to_accuracy(accuracy) is None for run in there))
    ]
    return replace(saved, notes=(*saved.notes, *notes))


def _row(found: CellEvidence, arm: str, baseline: str, saved: StepsSaved) -> dict[str, Any]:
    cell, test = found.cell, saved.test
    counts_losses = cell.target_accuracy is None
    notes = list(saved.notes)
    num_missing = len(CLAIM_SEEDS) - len(saved.seeds)
    if saved.seeds and num_missing:
        notes.append(f"{num_missing} of {len(CLAIM_SEEDS)} claim seeds have not been run yet")
    return {
        "task": cell.task,
        "size": cell.size,
        "cell": cell.name,
        "arm": arm,
        "baseline": baseline,
        "measure": cell.measure,
        "steps_saved_percent": _rounded(saved.percent),
        "ci95": _bounds(saved.interval),
        "ci95_method": saved.interval.method if saved.interval else None,
        "ci95_t": _bounds(saved.by_seed),
        "loss_difference": round(test.mean_difference, 5) if test and counts_losses else None,
        "p_value": float(f"{test.p_value:.4g}") if test else None,
        "p_value_sign_flip": float(f"{test.sign_flip_p_value:.4g}") if test else None,
        "smallest_p_value_sign_flip": test.smallest_sign_flip_p_value if test else None,
        "claim_seeds": list(saved.seeds),
        "tuning_trials": len(found.tuning[arm]["trials"]) if arm in found.tuning else None,
        "tuning_is_interior": found.tuning.get(arm, {}).get("is_interior"),
        "reason_if_missing": saved.reason,
        "at_least_percent": _rounded(saved.at_least),
        "at_most_percent": _rounded(saved.at_most),
        "notes": notes,
    }


def _rescale_row(found: CellEvidence) -> dict[str, Any]:
    """How many percent more steps Muon needs to reach NorMuon's mean final loss at full length."""
    row = more_steps(_row(found, "muon", "normuon", steps_saved(found, "muon", "normuon")))
    return {name: value for name, value in row.items() if name not in NOT_OF_RESCALE}


NOT_OF_RESCALE = ("arm", "baseline", "ci95_method", "tuning_trials", "tuning_is_interior")


def more_steps(row: Row) -> dict[str, Any]:
    """A row the other way round: how many percent more steps the arm needs."""
    turned: dict[str, Any] = {
        "steps_saved_percent": _negative(row["steps_saved_percent"]),
        "at_least_percent": _negative(row["at_most_percent"]),
        "at_most_percent": _negative(row["at_least_percent"]),
    }
    for name in ("ci95", "ci95_t"):
        ends = row[name]
        turned[name] = None if ends is None else [_negative(end) for end in reversed(ends)]
    new_names = {"steps_saved_percent": "more_steps_percent"}
    return {new_names.get(name, name): value for name, value in {**row, **turned}.items()}


def _size_trends(
    saved: Sequence[tuple[CellEvidence, str, str, StepsSaved]],
) -> list[dict[str, Any]]:
    """How savings change with the size of the model: per task, arm and baseline with two sizes."""
    at_sizes: dict[tuple[str, str, str], list[tuple[int, str, StepsSaved]]] = {}
    for found, arm, baseline, here in saved:
        if found.cell.target_accuracy is None and here.percent is not None:
            point = (found.full_runs(arm)[0].num_parameters, found.cell.size, here)
            at_sizes.setdefault((found.cell.task, arm, baseline), []).append(point)
    trends = []
    for (task, arm, baseline), unordered in at_sizes.items():
        points = sorted(unordered, key=lambda point: point[0])
        first, last = points[0][2], points[-1][2]
        if len(points) > 1 and first.percent is not None and last.percent is not None:
            sizes = [
                {
                    "size": size,
                    "num_parameters": num_parameters,
                    "steps_saved_percent": _rounded(here.percent),
                    "ci95": _bounds(here.interval),
                    "ci95_t": _bounds(here.by_seed),
                }
                for num_parameters, size, here in points
            ]
            trends.append(
                {
                    "task": task,
                    "arm": arm,
                    "baseline": baseline,
                    "sizes": sizes,
                    "change_points": _rounded(last.percent - first.percent),
                    "change_ci95_t": _bounds(_change_by_seed(first, last)),
                }
            )
    return trends


def _change_by_seed(first: StepsSaved, last: StepsSaved) -> Estimate | None:
    """The change for each seed, which decides the order of the data at either size.

    None where some seed has no saving of its own at one of the two.
    """
    if first.by_seed.mean is None or last.by_seed.mean is None:
        return None
    before, after = (dict(zip(s.seeds, s.by_seed.values, strict=True)) for s in (first, last))
    return t_interval([after[seed] - before[seed] for seed in sorted(before.keys() & after.keys())])


def _rounded(value: float | None) -> float | None:
    # -0.0 would read as a saving of its own.
    return None if value is None else round(value, 2) + 0.0


def _negative(value: float | None) -> float | None:
    return None if value is None else _rounded(-value)


def _bounds(interval: Interval | Estimate | None) -> list[float | None] | None:
    """Both ends; None where there is no interval at all."""
    if interval is None or (interval.low is None and interval.high is None):
        return None
    return [_rounded(interval.low), _rounded(interval.high)]
