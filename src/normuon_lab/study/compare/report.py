"""Renders a comparison as one self-contained HTML page: no file beside it, no network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from normuon_lab.plot_style import color_of
from normuon_lab.study.compare import figures
from normuon_lab.study.compare.results import Results
from normuon_lab.study.compare.summary import (
    fewer_steps_text,
    label_of,
    loss_text,
    points_text,
    standing,
    summary_rows,
    verdict,
)
from normuon_lab.study.statistics.curves import METHOD
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.web_page import render_page


def render_report(results: Results) -> str:
    """The page as text; works for partial results too, and says so."""
    return render_page(
        "normuon_lab.study.compare",
        "report.html.j2",
        plots={
            "loss-steps": figures.loss_figure(results, against="steps"),
            "loss-seconds": figures.loss_figure(results, against="seconds"),
            "final-loss": figures.final_loss_figure(results),
            "tuning": figures.tuning_figure(results),
            "singular-values": figures.update_figure(results, "singular_values"),
            "row-norms": figures.update_figure(results, "row_norms"),
        },
        filters={
            "label": label_of,
            "color": color_of,
            "standing": partial(standing, digits=1),
            "loss_text": loss_text,
            "fewer_steps_text": fewer_steps_text,
            "points_text": points_text,
        },
        results=results,
        verdict=verdict(results),
        rows=summary_rows(results),
        comparisons=results.comparisons(),
        points={(found.arm, found.baseline): found.points for found in results.points()},
        method=METHOD,
        descriptions={name: arm.description for name, arm in ARMS.items()},
        settings=_flattened({k: results.config[k] for k in ("model", "training")}),
        machine=_flattened(results.machine),
    )


def _flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flattened(value))
        else:
            flat[key.replace("_", " ")] = value
    return flat
