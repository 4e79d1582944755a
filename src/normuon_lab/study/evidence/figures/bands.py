"""What figures of arms share: means over seeds with intervals, names of arms, and legends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

from normuon_lab.plot_style import INK, color_of, label_of, style_axes, style_of
from normuon_lab.study.statistics.estimates import Estimate, t_interval

Array = npt.NDArray[np.float64]

BAND_OPACITY = 0.18
LABEL_SIZE = 9


def draw_band(
    axes: Axes, arm: str, x: Sequence[float] | Array, values_SK: Array, **look: Any
) -> None:
    """An arm's mean over seeds as a line, with `look`, and its interval as a band.

    With one seed the band has no width.
    """
    estimates = [t_interval(column.tolist()) for column in values_SK.T]
    means = np.array([e.mean for e in estimates], dtype=np.float64)
    lows = np.array([e.mean if e.low is None else e.low for e in estimates], dtype=np.float64)
    highs = np.array([e.mean if e.high is None else e.high for e in estimates], dtype=np.float64)
    look = line_of(arm) | look
    axes.fill_between(x, lows, highs, color=look["color"], alpha=BAND_OPACITY, linewidth=0)
    axes.plot(x, means, **look, linewidth=1.8)


def line_of(arm: str) -> dict[str, Any]:
    """How an arm's line with markers is drawn, and its name in the legend."""
    style = style_of(arm)
    return {
        "color": style.color,
        "linestyle": style.matplotlib_linestyle,
        "marker": style.matplotlib_marker,
        "markersize": 5.5,
        "label": label_of(arm),
    }


def draw_estimate(axes: Axes, place: int, arm: str, estimate: Estimate) -> None:
    """An arm's mean as its marker and the interval as a line, at a place from the top."""
    style = style_of(arm)
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [place] * 2, color=style.color, linewidth=2)
    if estimate.mean is not None:
        axes.scatter(
            [estimate.mean], [place], s=64, color=style.color, marker=style.matplotlib_marker
        )


def name_places(axes: Axes, arms: Sequence[str], *, num_places: int | None = None) -> None:
    """Write arms' labels at their places, the first at the top; room for more, if asked for."""
    axes.set_yticks(range(len(arms)), [label_of(arm) for arm in arms])
    axes.set_ylim((num_places or len(arms)) - 0.4, -0.6)


def drawn_ends(bounds: Sequence[float | None] | None, estimate: float) -> tuple[float, float]:
    """Where an interval is drawn from and to: an open end, to the estimate only.

    Example:
        >>> drawn_ends([None, 6.2], 4.5)
        (4.5, 6.2)
    """
    low, high = (estimate if end is None else end for end in bounds or (None, None))
    return low, high


def draw_target(axes: Axes, loss: float, *, on_right: bool = False) -> None:
    """The loss that all arms are to reach, AdamW's mean final one.

    It is named below the left end, or above the right one.
    """
    color = color_of("adamw")
    axes.axhline(loss, color=color, linestyle=":", linewidth=1.2)
    text = f"{label_of('adamw')}'s final loss, {loss:.3f}"
    look = {"ha": "left", "va": "top", "xytext": (0, -3)}
    if on_right:
        look = {"ha": "right", "va": "bottom", "xytext": (0, 3)}
    write_at(axes, text, (0.98 if on_right else 0.02, loss), color=color, **look)


def write_at(axes: Axes, text: str, place: tuple[float, float], **look: Any) -> None:
    """A small text, at a share of the panel's width and a value of the y axis."""
    look = {"xytext": (0, 0), "textcoords": "offset points", "fontsize": LABEL_SIZE, **look}
    axes.annotate(text, place, xycoords=("axes fraction", "data"), **look)


def add_legend(figure: Figure, *panels: Axes, columns: int = 6) -> None:
    """One legend below all panels, from what some of them show; each label stands once."""
    handles: dict[str, Artist] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        frameon=False,
        labelcolor=INK,
    )


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty figure, in inches, that lays itself out."""
    figure = Figure(figsize=(width, height))
    figure.set_layout_engine("constrained")
    if title:
        figure.suptitle(title, color=INK)
    return figure


def title_panel(axes: Axes, title: str, *, loc: Literal["left", "center"] = "left") -> None:
    """A small title above one panel."""
    axes.set_title(title, loc=loc, fontsize=10, color=INK)


def name_axes(axes: Axes, x: str = "", y: str = "", *, grid: Literal["both", "x", "y"]) -> None:
    """Name the axes and give them the figures' common look."""
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    style_axes(axes, grid_axis=grid)


def log_ticks(axes: Axes, ticks: Sequence[float], number: str) -> None:
    """A logarithmic x axis with these ticks alone, written in the format `number`."""
    axes.set_xscale("log")
    axes.set_xticks(ticks)
    axes.xaxis.set_major_formatter(StrMethodFormatter(number))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())
