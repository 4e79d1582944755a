"""How steps saved are read off: final loss against length of schedule, and what comes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

from normuon_lab.matplotlib_style import style_axes
from normuon_lab.plot_style import INK, MUTED, color_of, style_of
from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.figures.bands import (
    add_legend,
    draw_band,
    draw_target,
    drawn_ends,
    name_places,
    new_figure,
)
from normuon_lab.study.evidence.paper import STEPS_SAVED_1B
from normuon_lab.study.evidence.protocol import DRAWN_ARMS
from normuon_lab.study.evidence.table1 import FINAL_LOSS

BASELINES = ("adamw", "muon")
INCHES_PER_ARM = 0.3
PAPER_MARK: dict[str, Any] = {
    "marker": "o",
    "markersize": 7,
    "color": INK,
    "markerfacecolor": "white",
    "linestyle": "",
}


def schedule_figure(found: CellEvidence, rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Mean final losses of several arms' complete schedules, and where they meet AdamW's.

    Args:
        found: a cell.
        rows: Table 1's, of all cells.
    """
    finals = {arm: _complete(found.final_losses(arm)) for arm in DRAWN_ARMS}
    finals = {arm: by_length for arm, by_length in finals.items() if by_length}
    baseline = finals.get("adamw", {}).get(found.full_steps)
    if baseline is None or len(finals) < 2:
        return None
    target = float(np.mean(baseline))
    figure = new_figure(8.5, 4.6)
    axes = figure.subplots()
    saved = {
        row["arm"]: row["steps_saved_percent"]
        for row in _shown_rows(found, rows).get("adamw", [])
        if row["arm"] in finals
    }
    for arm, by_length in finals.items():
        losses_SN = np.array(list(by_length.values())).T
        name = label_of(arm)
        if arm in saved:
            name += f": {_crossing_words(saved[arm], found.full_steps)}"
        draw_band(axes, arm, list(by_length), losses_SN, with_markers=True, name=name)
    draw_target(axes, target, on_right=True)
    for arm, percent in saved.items():
        _mark_crossing(axes, arm, _crossing(percent, found.full_steps), target)
    lengths = sorted({n for by_length in finals.values() for n in by_length})
    axes.set_xscale("log")
    axes.set_xticks(lengths)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("steps of the complete schedule (logarithmic)", color=INK)
    axes.set_ylabel("final validation loss (nats per token)", color=INK)
    style_axes(axes, grid_axis="both")
    add_legend(figure, axes, columns=2)
    figure.suptitle(f"Where each arm meets AdamW's final loss: {found.title}", color=INK)
    return figure


def steps_saved_figure(
    evidence: Sequence[CellEvidence], rows: Sequence[Mapping[str, Any]]
) -> Figure | None:
    """Table 1 as points with intervals, a row of panels per cell; None without any figure."""
    shown = {found.cell.name: _shown_rows(found, rows) for found in evidence}
    titles = {found.cell.name: found.title for found in evidence if shown[found.cell.name]}
    if not titles:
        return None
    heights = [max(map(len, shown[name].values())) + 0.8 for name in titles]
    figure = new_figure(11.0, 1.1 + 0.35 * len(titles) + INCHES_PER_ARM * sum(heights))
    shape = (len(titles), len(BASELINES))
    grid = figure.subplots(*shape, sharex="col", squeeze=False, height_ratios=heights)
    for panels, (name, title) in zip(grid, titles.items(), strict=True):
        panels[0].set_title(title, loc="left", fontsize=10, color=INK)
        num_places = max(map(len, shown[name].values()))
        for axes, baseline in zip(panels, BASELINES, strict=True):
            _draw_panel(axes, shown[name].get(baseline, []), num_places=num_places)
    for axes, baseline in zip(grid[-1], BASELINES, strict=True):
        axes.set_xlabel(f"steps saved against {label_of(baseline)} (percent)", color=INK)
    handles = [
        Line2D([], [], color=INK, marker="o", linewidth=2.6, label="95% bootstrap"),
        Line2D([], [], color=INK, linewidth=0.9, label="95% Student's t"),
        Line2D([], [], label="the paper, 1.1B parameters", **PAPER_MARK),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _complete(
    by_length: Mapping[int, Mapping[int, float | None]],
) -> dict[int, list[float]]:
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


def _crossing(saved: float, full_steps: int) -> float:
    """The length of the schedule that saves so many percent."""
    return full_steps * (1 - saved / 100)


def _crossing_words(saved: float, full_steps: int) -> str:
    """
    >>> _crossing_words(38.44, 500), _crossing_words(-5.0, 500)
    ('308 steps, 38.4% fewer', '525 steps, 5.0% more')
    """
    change = f"{saved:.1f}% fewer" if saved >= 0 else f"{-saved:.1f}% more"
    return f"{_crossing(saved, full_steps):.0f} steps, {change}"


def _shown_rows(
    found: CellEvidence, rows: Sequence[Mapping[str, Any]]
) -> dict[str, list[Mapping[str, Any]]]:
    """By baseline, a cell's rows on final losses that have a figure."""
    shown: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        is_here = row["cell"] == found.cell.name and row["measure"] == FINAL_LOSS
        if is_here and row["steps_saved_percent"] is not None:
            shown.setdefault(row["baseline"], []).append(row)
    return shown


def _draw_panel(axes: Axes, rows: Sequence[Mapping[str, Any]], *, num_places: int) -> None:
    for place, row in enumerate(rows):
        _draw_saving(axes, place, row)
    # All panels of a cell are as high, so that arms are as far apart.
    name_places(axes, [row["arm"] for row in rows], num_places=num_places)
    axes.axvline(0, color=MUTED, linewidth=1)
    style_axes(axes, grid_axis="x")


def _draw_saving(axes: Axes, place: int, row: Mapping[str, Any]) -> None:
    style = style_of(row["arm"])
    saved = row["steps_saved_percent"]
    for bounds, width in ((row["ci95_t"], 0.9), (row["ci95"], 2.6)):
        if bounds is not None:
            axes.plot(drawn_ends(bounds, saved), [place, place], color=style.color, linewidth=width)
    axes.plot([saved], [place], color=style.color, marker=style.matplotlib_marker, markersize=8)
    paper = STEPS_SAVED_1B.get(row["arm"])
    if paper is not None and row["baseline"] == "adamw":
        axes.plot([paper], [place], **PAPER_MARK)
