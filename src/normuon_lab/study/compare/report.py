"""Renders a comparison as one self-contained HTML page: no file beside it, no network.

The figures are `figures.py`'s and `update_figures.py`'s; the sentences and the layout are in
templates/report.html.j2.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import write_text
from normuon_lab.plot_style import color_of
from normuon_lab.study.compare import figures, update_figures
from normuon_lab.study.compare.results import Results
from normuon_lab.study.compare.summary import (
    estimate_text,
    fewer_steps_text,
    label_of,
    points_text,
    standing,
    summary_rows,
    verdict,
)
from normuon_lab.study.statistics import METHOD, Comparison, PointsBetween
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.web_page import render_page


def write_report(path: Path, results: Results) -> None:
    """Write the page to `path`."""
    write_text(path, render_report(results))


def render_report(results: Results) -> str:
    """The page as text; works for partial results too, and says so."""
    plots = {
        "loss-steps": figures.loss_figure(results, against="steps"),
        "loss-seconds": figures.loss_figure(results, against="seconds"),
        "final-loss": figures.final_loss_figure(results),
        "tuning": figures.tuning_figure(results),
        "singular-values": update_figures.singular_value_figure(results),
        "row-norms": update_figures.row_norm_figure(results),
    }
    return render_page(
        "normuon_lab.study.compare",
        "report.html.j2",
        plots=plots,
        verdict=verdict(results),
        results=results,
        reference_label=label_of(results.reference_arm),
        headlines=_headlines(results),
        rows=summary_rows(results),
        pairs=[_pair(results, comparison) for comparison in results.comparisons()],
        points=[_points(difference) for difference in results.points()],
        problems=_problems(results),
        method=METHOD,
        arms=[_arm(results, arm) for arm in results.arms],
        settings=_flattened({k: results.config[k] for k in ("model", "training")}),
        command_data=" ".join(results.config["data"]),
        num_parameters=results.records[0].num_parameters if results.records else None,
        seconds_per_run=_seconds_per_run(results),
        machine=_flattened(results.machine),
    )


def _headlines(results: Results) -> list[dict[str, Any]]:
    """One card per arm that is held against the reference arm."""
    return [
        {
            "label": label_of(comparison.arm),
            "color": color_of(comparison.arm),
            "mean": comparison.fewer_steps_percent.mean,
            "low": comparison.fewer_steps_percent.low,
            "high": comparison.fewer_steps_percent.high,
            "standing": standing(comparison.fewer_steps_percent, digits=1),
            "text": fewer_steps_text(comparison),
            "num_seeds": len(comparison.seeds),
        }
        for comparison in results.comparisons()
        if comparison.baseline == results.reference_arm and comparison.seeds
    ]


def _points(difference: PointsBetween) -> dict[str, Any]:
    """One card per pair of arms that are both held against the reference."""
    return {
        "label": label_of(difference.arm),
        "baseline": label_of(difference.baseline),
        "reference": label_of(difference.reference),
        "color": color_of(difference.arm),
        "mean": difference.points.mean,
        "low": difference.points.low,
        "high": difference.points.high,
        "standing": standing(difference.points, digits=1),
        "num_seeds": len(difference.points.values),
    }


def _pair(results: Results, comparison: Comparison) -> dict[str, Any]:
    points = [
        points_text(difference.points)
        for difference in results.points()
        if (difference.arm, difference.baseline) == (comparison.arm, comparison.baseline)
    ]
    return {
        "arm": label_of(comparison.arm),
        "baseline": label_of(comparison.baseline),
        "num_seeds": len(comparison.seeds),
        "loss": estimate_text(comparison.loss_difference, digits=4, signed=True),
        "points": points[0] if points else "",
        "fewer_steps": fewer_steps_text(comparison),
    }


def _arm(results: Results, arm: str) -> dict[str, Any]:
    return {
        "label": label_of(arm),
        "color": color_of(arm),
        "description": ARMS[arm].description if arm in ARMS else "",
        "rate": results.learning_rates[arm]["value"],
        "source": results.learning_rates[arm]["source"],
        "command": results.learning_rates[arm].get("command"),
    }


def _problems(results: Results) -> list[str]:
    """What a reader must know before believing the figures."""
    problems = []
    num_runs = len(results.arms) * len(results.seeds)
    if not results.is_complete:
        problems.append(f"Only {len(results.records)} of {num_runs} runs are finished.")
    problems.extend(
        f"{label_of(record.arm)} diverged with seed {record.seed}; that run is left out of all "
        "means and differences."
        for record in results.records
        if record.diverged
    )
    if len(results.seeds) == 1:
        problems.append("One seed: there is no interval, and a difference may be chance.")
    return problems


def _seconds_per_run(results: Results) -> dict[str, float]:
    return {
        label_of(arm): sum(record.train_seconds for record in records) / len(records)
        for arm in results.arms
        if (records := results.of_arm(arm))
    }


def _flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flattened(value))
        else:
            flat[key.replace("_", " ")] = value
    return flat
