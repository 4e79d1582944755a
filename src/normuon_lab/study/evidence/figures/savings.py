"""Steps saved: read off final losses against length of schedule, by arm, and by size of model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

from normuon_lab.plot_style import INK, MUTED, color_of, label_of, style_axes, style_of
from normuon_lab.study.evidence import paper
from normuon_lab.study.evidence.figures.bands import (
    add_legend,
    draw_band,
    draw_target,
    drawn_ends,
    line_of,
    log_ticks,
    name_axes,
    name_places,
    new_figure,
    title_panel,
)
from normuon_lab.study.evidence.protocol import DRAWN_ARMS, FINAL_LOSS
from normuon_lab.study.evidence.runs import CellEvidence
from normuon_lab.study.evidence.table1 import Row, by_baseline
from normuon_lab.study.statistics.schedules import LossesByLength

BASELINES = ("adamw", "muon")
INCHES_PER_ARM = 0.3
PAPER_MARK: dict[str, Any] = {
    "marker": "o",
    "markersize": 7,
    "color": INK,
    "markerfacecolor": "white",
    "linestyle": "",
}
SIDESTEP = 0.03
"""How far apart arms stand at one size of model, in decades, so that their intervals show."""


def schedule_figure(found: CellEvidence, rows: Sequence[Row]) -> Figure | None:
    """Mean final losses of several arms' complete schedules, and where they meet AdamW's.

    `rows` are Table 1's, of all cells.
    """
    finals = {arm: _complete(found.final_losses(arm)) for arm in DRAWN_ARMS}
    finals = {arm: by_length for arm, by_length in finals.items() if by_length}
    baseline = finals.get("adamw", {}).get(found.cell.full_steps)
    if baseline is None or len(finals) < 2:
        return None
    target = float(np.mean(baseline))
    figure = new_figure(8.5, 4.6, f"Where each arm meets AdamW's final loss: {found.title}")
    axes = figure.subplots()
    saved = {
        row["arm"]: row["steps_saved_percent"]
        for row in _shown_rows(found, rows).get("adamw", [])
        if row["arm"] in finals
    }
    crossings = {arm: found.cell.full_steps * (1 - s / 100) for arm, s in saved.items()}
    for arm, by_length in finals.items():
        losses_SN = np.array(list(by_length.values())).T
        name = label_of(arm)
        if arm in saved:
            name += f": {_crossing_words(crossings[arm], saved[arm])}"
        draw_band(axes, arm, list(by_length), losses_SN, label=name)
    draw_target(axes, target, on_right=True)
    for arm, steps in crossings.items():
        _mark_crossing(axes, arm, steps, target)
    log_ticks(axes, sorted({n for by_length in finals.values() for n in by_length}), "{x:,.0f}")
    x = "steps of the complete schedule (logarithmic)"
    name_axes(axes, x, "final validation loss (nats per token)", grid="both")
    add_legend(figure, axes, columns=2)
    return figure


def steps_saved_figure(evidence: Sequence[CellEvidence], rows: Sequence[Row]) -> Figure | None:
    """Table 1 as points with intervals, a row of panels per cell; None without any figure."""
    shown = {found.title: _shown_rows(found, rows) for found in evidence}
    shown = {title: tables for title, tables in shown.items() if tables}
    if not shown:
        return None
    num_places = [max(map(len, tables.values())) for tables in shown.values()]
    heights = [number + 0.8 for number in num_places]
    figure = new_figure(11.0, 1.1 + 0.35 * len(shown) + INCHES_PER_ARM * sum(heights))
    shape = (len(shown), len(BASELINES))
    grid = figure.subplots(*shape, sharex="col", squeeze=False, height_ratios=heights)
    for panels, (title, tables), number in zip(grid, shown.items(), num_places, strict=True):
        title_panel(panels[0], title)
        for axes, baseline in zip(panels, BASELINES, strict=True):
            here = tables.get(baseline, [])
            for place, row in enumerate(here):
                _draw_saving(axes, place, row)
            # All panels of a cell are as high, so that arms are as far apart.
            name_places(axes, [row["arm"] for row in here], num_places=number)
            axes.axvline(0, color=MUTED, linewidth=1)
            style_axes(axes, grid_axis="x")
    for axes, baseline in zip(grid[-1], BASELINES, strict=True):
        axes.set_xlabel(f"steps saved against {label_of(baseline)} (percent)", color=INK)
    handles = [
        Line2D([], [], color=INK, marker="o", linewidth=2.6, label="95% bootstrap"),
        Line2D([], [], color=INK, linewidth=0.9, label="95% Student's t"),
        Line2D([], [], label="the paper, 1.1B parameters", **PAPER_MARK),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _complete(by_length: LossesByLength) -> dict[int, list[float]]:
    """Final losses of the lengths that have as many seeds as any, and none that diverged."""
    most = max(map(len, by_length.values()), default=0)
    complete: dict[int, list[float]] = {}
    for n, by_seed in by_length.items():
        losses = [loss for _, loss in sorted(by_seed.items()) if loss is not None]
        if len(losses) == most:
            complete[n] = losses
    return complete


def _mark_crossing(axes: Axes, arm: str, steps: float, target: float) -> None:
    """A star where the arm meets the target, and a line from it down to the steps."""
    color = color_of(arm)
    axes.scatter([steps], [target], marker="*", s=200, color=color, edgecolors="white", zorder=4)
    bottom = axes.get_ylim()[0]
    axes.plot([steps, steps], [bottom, target], color=color, linestyle=":", linewidth=1.2)
    axes.set_ylim(bottom=bottom)


def _crossing_words(steps: float, saved: float) -> str:
    """
    >>> _crossing_words(307.8, 38.44), _crossing_words(525.0, -5.0)
    ('308 steps, 38.4% fewer', '525 steps, 5.0% more')
    """
    change = f"{saved:.1f}% fewer" if saved >= 0 else f"{-saved:.1f}% more"
    return f"{steps:.0f} steps, {change}"


def _shown_rows(found: CellEvidence, rows: Sequence[Row]) -> dict[str, list[Row]]:
    """By baseline, a cell's rows on final losses that have a figure."""
    of_losses = (found.cell.name, FINAL_LOSS)
    here = [row for row in rows if (row["cell"], row["measure"]) == of_losses]
    return by_baseline(row for row in here if row["steps_saved_percent"] is not None)


def _draw_saving(axes: Axes, place: int, row: Row) -> None:
    style = style_of(row["arm"])
    saved = row["steps_saved_percent"]
    for bounds, width in ((row["ci95_t"], 0.9), (row["ci95"], 2.6)):
        if bounds is not None:
            axes.plot(drawn_ends(bounds, saved), [place, place], color=style.color, linewidth=width)
    axes.plot([saved], [place], color=style.color, marker=style.matplotlib_marker, markersize=8)
    papers = paper.STEPS_SAVED_1B.get(row["arm"])
    if papers is not None and row["baseline"] == "adamw":
        axes.plot([papers], [place], **PAPER_MARK)


def size_figure(trends: Sequence[Row]) -> Figure | None:
    """Steps saved against the number of parameters, ours beside the paper's: a row of panels per
    task, one for each baseline. `trends` are `size_trends` of table1.json; None without any."""
    tasks = list(dict.fromkeys(trend["task"] for trend in trends))
    if not tasks:
        return None
    title = f"With the size of the model: {'; '.join(tasks)}"
    figure = new_figure(10.5, 0.8 + 3.6 * len(tasks), title)
    grid = figure.subplots(len(tasks), len(BASELINES), squeeze=False, sharex=True)
    for panels, task in zip(grid, tasks, strict=True):
        for axes, baseline in zip(panels, BASELINES, strict=True):
            shown = [t for t in trends if (t["task"], t["baseline"]) == (task, baseline)]
            _draw_trends(axes, shown, baseline)
            title_panel(axes, f"of {label_of(baseline)}'s steps", loc="center")
        panels[0].set_ylabel("steps saved (percent)", color=INK)
    for axes in grid[-1]:
        axes.set_xlabel("parameters (logarithmic)", color=INK)
    add_legend(figure, *grid.flat, columns=4)
    return figure


def _draw_trends(axes: Axes, trends: Sequence[Row], baseline: str) -> None:
    for place, trend in enumerate(trends):
        aside = 10 ** (SIDESTEP * (place - (len(trends) - 1) / 2))
        sizes = trend["sizes"]
        y = np.array([point["steps_saved_percent"] for point in sizes])
        ends = [drawn_ends(size["ci95_t"], saved) for size, saved in zip(sizes, y, strict=True)]
        axes.errorbar(
            [aside * point["num_parameters"] for point in sizes],
            y,
            yerr=np.abs(np.array(ends).T - y),
            capsize=3,
            **line_of(trend["arm"]) | {"markersize": 6},
        )
    papers = {"normuon": paper.saved_of_muon()}
    if baseline == "adamw":
        papers = {arm: paper.saved_of_adamw(arm) for arm in ("muon", "normuon")}
    for arm, points in papers.items():
        look = line_of(arm) | {"linestyle": ":", "markersize": 7, "markerfacecolor": "white"}
        look["label"] += ", the paper"
        axes.plot(list(points), list(points.values()), **look)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: _in_words(size)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    style_axes(axes, grid_axis="both")


def _in_words(size: float) -> str:
    """
    >>> _in_words(500_000), _in_words(1.1e9)
    ('0.5M', '1.1B')
    """
    return f"{size / 1e9:g}B" if size >= 1e9 else f"{size / 1e6:g}M"
