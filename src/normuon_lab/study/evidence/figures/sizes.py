"""Steps saved against the number of parameters, ours beside the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from normuon_lab.matplotlib_style import style_axes
from normuon_lab.plot_style import INK, MUTED, style_of
from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence import paper
from normuon_lab.study.evidence.figures.bands import add_legend, drawn_ends, new_figure

BASELINES = ("adamw", "muon")
SIDESTEP = 0.03
"""How far apart arms stand at one size, in decades, so that their intervals show."""


def size_figure(trends: Sequence[Mapping[str, Any]]) -> Figure | None:
    """A row of panels per task, one for each baseline; None without a trend.

    Args:
        trends: `size_trends` of table1.json.
    """
    tasks = list(dict.fromkeys(trend["task"] for trend in trends))
    if not tasks:
        return None
    figure = new_figure(10.5, 0.8 + 3.6 * len(tasks))
    grid = figure.subplots(len(tasks), len(BASELINES), squeeze=False, sharex=True)
    for panels, task in zip(grid, tasks, strict=True):
        for axes, baseline in zip(panels, BASELINES, strict=True):
            shown = [t for t in trends if (t["task"], t["baseline"]) == (task, baseline)]
            _draw_panel(axes, shown, baseline)
            axes.set_title(f"of {label_of(baseline)}'s steps", fontsize=10, color=INK)
        panels[0].set_ylabel("steps saved (percent)", color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("parameters (logarithmic)", color=INK)
    add_legend(figure, *grid.flat, columns=4)
    figure.suptitle(f"With the size of the model: {'; '.join(tasks)}", color=INK)
    return figure


def _draw_panel(axes: Axes, trends: Sequence[Mapping[str, Any]], baseline: str) -> None:
    for place, trend in enumerate(trends):
        _draw_ours(axes, trend, aside=10 ** (SIDESTEP * (place - (len(trends) - 1) / 2)))
    for arm in ("muon", "normuon") if baseline == "adamw" else ("normuon",):
        _draw_papers(axes, arm, baseline)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _in_words(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    style_axes(axes, grid_axis="both")


def _draw_ours(axes: Axes, trend: Mapping[str, Any], *, aside: float) -> None:
    sizes = trend["sizes"]
    style = style_of(trend["arm"])
    x = [aside * point["num_parameters"] for point in sizes]
    y = np.array([point["steps_saved_percent"] for point in sizes])
    ends = [
        drawn_ends(point["ci95_t"] or (None, None), saved)
        for point, saved in zip(sizes, y, strict=True)
    ]
    axes.errorbar(
        x,
        y,
        yerr=np.abs(np.array(ends).T - y),
        color=style.color,
        linestyle=style.matplotlib_linestyle,
        marker=style.matplotlib_marker,
        markersize=6,
        capsize=3,
        label=label_of(trend["arm"]),
    )


def _draw_papers(axes: Axes, arm: str, baseline: str) -> None:
    points = paper.saved_of_adamw(arm) if baseline == "adamw" else paper.saved_of_muon()
    style = style_of(arm)
    axes.plot(
        list(points),
        list(points.values()),
        color=style.color,
        linestyle=":",
        marker=style.matplotlib_marker,
        markerfacecolor="white",
        markersize=7,
        label=f"{label_of(arm)}, the paper",
    )


def _in_words(size: float) -> str:
    """
    >>> _in_words(500_000), _in_words(1.1e9)
    ('0.5M', '1.1B')
    """
    return f"{size / 1e9:g}B" if size >= 1e9 else f"{size / 1e6:g}M"
