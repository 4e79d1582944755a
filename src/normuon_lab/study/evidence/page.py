"""The results page: its tables, sentences and figures, all from the files under ``results``.

The words are the template's; code fills in every number and every verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2

from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence import paper
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.paper_claims import interval_words, p_words, paper_claims
from normuon_lab.study.evidence.protocol import (
    CLAIM_SEEDS,
    FULL_TUNING_TRIALS,
    RECENT_SEEDS,
    RECENT_TRIALS,
    RECENT_TUNING_SEEDS,
    TUNING_SEEDS,
)
from normuon_lab.study.evidence.short_answer import (
    OwnRate,
    lead,
    own_rates,
    own_rates_matter_more,
)
from normuon_lab.study.evidence.table1 import measure_of
from normuon_lab.study.evidence.verdicts import ALPHA

FIGURES_FOLDER = "figures/results"

AXIS_WORDS = {
    "learning_rate": "learning rate",
    "adam_lr": "AdamW's",
    "weight_decay": "weight decay",
}

UPDATE_FIGURES = ("singular-values", "row-norms")


def render_page(
    evidence: Sequence[CellEvidence],
    table1: Mapping[str, Any],
    table2: Mapping[str, Any] | None,
    recent: Sequence[Mapping[str, Any]],
    figures: Collection[str],
) -> str:
    """The page as Markdown.

    Args:
        evidence: what was run.
        table1: the contents of table1.json.
        table2: those of table2.json; None where it was not measured.
        recent: what `recent_table.recent_tables` found.
        figures: names of those that were drawn.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("normuon_lab.study.evidence"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["unbroken"] = lambda text: text.replace(" ", "&nbsp;")
    return environment.get_template("results.md.j2").render(
        over_adamw=lead(table1, "normuon", "adamw"),
        over_muon=lead(table1, "normuon", "muon"),
        options_over_muon=lead(table1, "normuon-heads-equilibrated", "muon"),
        options_over_options=lead(table1, "normuon-heads-equilibrated", "muon-heads-equilibrated"),
        own_rates_matter_more=own_rates_matter_more(evidence, table1),
        claims=paper_claims(evidence, table1, table2),
        alpha=ALPHA,
        paper=paper,
        cells=[_cell(found, table1, figures) for found in evidence],
        rescale=[_rescale(row) for row in table1["muon_rescale"]],
        trends=[_trend(row) for row in table1["size_trends"]],
        table2=_table2(table2),
        recent=recent,
        full_trials=FULL_TUNING_TRIALS,
        recent_seeds=RECENT_SEEDS,
        recent_trials=RECENT_TRIALS,
        recent_tuning_seeds=RECENT_TUNING_SEEDS,
        figures=set(figures),
        folder=FIGURES_FOLDER,
        claim_seeds=CLAIM_SEEDS,
        tuning_seeds=TUNING_SEEDS,
    )


def missing_words(found: CellEvidence) -> list[str]:
    """What a cell lacks, in sentences; empty if nothing."""
    if found.is_empty:
        return ["No runs of this cell yet."]
    missing = []
    untuned = [label_of(arm) for arm in found.cell.arms if arm not in found.tuning]
    if untuned:
        missing.append(f"Not tuned yet: {'; '.join(untuned)}.")
    at_an_end = [
        label_of(arm)
        for arm in found.cell.arms
        if arm in found.tuning and not found.tuning[arm]["is_interior"]
    ]
    if at_an_end:
        missing.append(
            "The best setting is at the edge of the values tried, so there may be a better one: "
            f"{'; '.join(at_an_end)}."
        )
    counts = {arm: len(found.full_runs(arm)) for arm in found.cell.arms}
    for count in sorted(set(counts.values()) - {len(CLAIM_SEEDS)}):
        names = "; ".join(label_of(arm) for arm in counts if counts[arm] == count)
        missing.append(f"Claim runs at full length, {count} of {len(CLAIM_SEEDS)}: {names}.")
    diverged = [run for run in found.runs if run.diverged]
    missing.extend(
        f"Diverged: {label_of(run.arm)}, seed {run.seed}, {run.steps} steps." for run in diverged
    )
    return missing


def _cell(
    found: CellEvidence, table1: Mapping[str, Any], figures: Collection[str]
) -> dict[str, Any]:
    name = found.cell.name
    return {
        "name": name,
        "title": f"{found.cell.task}, {found.cell.size}",
        "is_empty": found.is_empty,
        "missing": missing_words(found),
        "num_runs": len(found.runs),
        "num_sensitivity": len(found.sensitivity),
        "full_steps": found.full_steps,
        "measure": measure_of(found),
        "counts_losses": found.target_accuracy is None,
        "tables": _tables(found, table1),
        "settings": [_setting(found, arm) for arm in found.cell.arms if arm in found.tuning],
        "own_rates": [
            _own_rate(rate, counts_losses=found.target_accuracy is None)
            for rate in own_rates(found)
        ],
        "update_figures": [
            figure
            for what in UPDATE_FIGURES
            for figure in sorted(figures)
            if figure.startswith(f"{name}-{what}-")
        ],
    }


def _tables(found: CellEvidence, table1: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table per baseline: the rows that have a figure, and why the others have none.

    Arms that were never run are left out: `missing_words` names them once for the whole cell.
    """
    tables = []
    run = {record.arm for record in found.runs}
    of_cell = [
        row for row in table1["rows"] if row["cell"] == found.cell.name and row["arm"] in run
    ]
    for baseline in dict.fromkeys(row["baseline"] for row in of_cell):
        rows = [row for row in of_cell if row["baseline"] == baseline]
        tables.append(
            {
                "baseline": label_of(baseline),
                "rows": [_row(row) for row in rows if row["steps_saved_percent"] is not None],
                "without": [
                    f"{label_of(row['arm'])}: {row['reason_if_missing']}"
                    for row in rows
                    if row["steps_saved_percent"] is None
                ],
                "notes": [
                    f"{label_of(row['arm'])}: {note}" for row in rows for note in row["notes"]
                ],
            }
        )
    return tables


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "arm": label_of(row["arm"]),
        "saved": f"{row['steps_saved_percent']:.1f}%",
        "ci95": interval_words(row["ci95"]),
        "ci95_t": interval_words(row["ci95_t"]),
        "loss": "" if row["loss_difference"] is None else f"{row['loss_difference']:+.4f}",
        "p_value": "" if row["p_value"] is None else p_words(row["p_value"]),
    }


def _rescale(row: Mapping[str, Any]) -> dict[str, str]:
    more = row["more_steps_percent"]
    has_figure = more is not None
    return {
        "title": f"{row['task']}, {row['size']}",
        "measure": row["measure"],
        "more": f"{more:+.1f}%" if has_figure else "none",
        "ci95": interval_words(row["ci95"]) if has_figure else "",
        "ci95_t": interval_words(row["ci95_t"]) if has_figure else "",
        "notes": [note for note in (row["reason_if_missing"], *row["notes"]) if note],
    }


def _trend(row: Mapping[str, Any]) -> dict[str, Any]:
    first, last = row["sizes"][0], row["sizes"][-1]
    return {
        "task": row["task"],
        "arm": label_of(row["arm"]),
        "baseline": label_of(row["baseline"]),
        "points": "; ".join(
            f"{point['steps_saved_percent']:.1f}% at {point['size']}" for point in row["sizes"]
        ),
        "times": f"{last['num_parameters'] / first['num_parameters']:.1f}",
        "change": f"{row['change_points']:+.1f}",
        "ci95_t": interval_words(row["change_ci95_t"]),
    }


def _setting(found: CellEvidence, arm: str) -> dict[str, str]:
    tuned = found.tuning[arm]
    best = tuned["best"]
    same = "the same"
    return {
        "arm": label_of(arm),
        "learning_rate": f"{best['learning_rate']:.3g}",
        "adam_lr": same if best["adam_lr"] is None else f"{best['adam_lr']:.3g}",
        "weight_decay": f"{best['weight_decay']:.3g}",
        "axes": ", ".join(AXIS_WORDS[axis] for axis in tuned["axes"]),
        "trials": str(len(tuned["trials"])),
        "is_interior": "yes" if tuned["is_interior"] else "no",
    }


def _own_rate(rate: OwnRate, *, counts_losses: bool) -> dict[str, str]:
    digits = 3 if counts_losses else 0
    shared, own = rate.shared, rate.own
    return {
        "arm": label_of(rate.arm),
        "shared": f"{shared['mean_objective']:.{digits}f} at {shared['learning_rate']:.3g}",
        "own": f"{own['mean_objective']:.{digits}f} "
        f"at {own['learning_rate']:.3g} and {own['adam_lr']:.3g}",
        "gain": f"{0.0 - rate.gain:+.{digits}f}",
    }


def _table2(table2: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    if table2 is None:
        return []
    return [
        {
            "name": name,
            "machine": measured["machine"]["processor"],
            "torch": measured["machine"]["packages"]["torch"],
            "created": measured["created"],
            "rounds": measured["rounds"],
            "tokens": f"{math.prod(measured['batch']):,}",
            "rows": [_cost_row(arm, found, measured) for arm, found in measured["arms"].items()],
        }
        for name, measured in table2["cells"].items()
    ]


def _cost_row(arm: str, found: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, str]:
    parameters = sum(rows * columns for rows, columns in measured["hidden_matrices"])
    low, high = found["step_ms_quartiles"]
    return {
        "arm": label_of(arm),
        "state": f"{found['state_bytes'] / 2**20:.2f}",
        "per_parameter": f"{found['hidden_state_elements'] / parameters:.3f}",
        "scratch": f"{found['scratch_bytes'] / 2**20:.2f}",
        "step": f"{found['step_ms']:.2f} ({low:.2f} to {high:.2f})",
        "share": f"{found['share_percent']:.1f}%",
    }
