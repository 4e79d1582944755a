"""What the tuning's trials say of the two learning rates: hidden matrices', and AdamW's half's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, NullLocator, StrMethodFormatter

from normuon_lab.matplotlib_style import style_axes
from normuon_lab.plot_style import INK, style_of
from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.figures.bands import add_panel_legend, new_figure
from normuon_lab.study.evidence.protocol import ABLATIONS, RIVALS, VARIANTS
from normuon_lab.train.arms.registry import MAIN_ARMS

Curve = Mapping[float, float]
"""The lowest mean loss of the tuning seeds by rate, ascending."""

PANELS = (
    ("main arms", MAIN_ARMS),
    ("options of the library", VARIANTS),
    ("the paper's ablations", ABLATIONS),
    ("rivals", RIVALS),
)
"""Arms whose tuning curves share a panel, so that they can be told apart."""

HIGHEST_SHOWN = 3.0
"""A tuning curve is shown up to this many times its median height above its own best loss."""


def learning_rate_figure(found: CellEvidence) -> Figure | None:
    """At every learning rate tried, the best loss over the other axes; None without tuning."""
    curves = _curves(found, "learning_rate")
    panels = [(title, [arm for arm in arms if arm in curves]) for title, arms in PANELS]
    panels = [(title, arms) for title, arms in panels if arms]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.2 * columns if columns > 1 else 7.0, 4.2 * rows + 0.2)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (title, arms) in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, {arm: curves[arm] for arm in arms})
        if len(panels) > 1:
            axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.tick_params(labelbottom=True, labelleft=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    _scale(grid[0, 0], curves)
    _write_names(
        figure,
        found,
        rate="peak learning rate of hidden matrices",
        title="Sensitivity to the learning rate",
    )
    return figure


def other_rate_figure(found: CellEvidence) -> Figure | None:
    """The same for AdamW's half, of the arms that tune its rate; None where none does."""
    curves = {
        arm: curve
        for arm, curve in _curves(found, "adam_lr").items()
        if "adam_lr" in found.tuning[arm]["axes"]
    }
    if not curves:
        return None
    figure = new_figure(7.0, 4.4)
    axes = figure.subplots()
    _draw_panel(axes, curves)
    _scale(axes, curves)
    _write_names(
        figure,
        found,
        rate="peak learning rate of embeddings, head and norms",
        title="The learning rate of AdamW's half",
    )
    return figure


def best_by_rate(trials: Sequence[Mapping[str, Any]], rate: str) -> dict[float, float]:
    """The lowest mean loss at each value of one rate, over the other axes; ascending.

    Example:
        >>> trials = [(0.1, 3.0), (0.2, 2.5), (0.1, 2.0), (0.4, None)]
        >>> trials = [{"adam_lr": rate, "mean_objective": loss} for rate, loss in trials]
        >>> best_by_rate(trials, "adam_lr")
        {0.1: 2.0, 0.2: 2.5}
    """
    best: dict[float, float] = {}
    for trial in trials:
        value, loss = trial[rate], trial["mean_objective"]
        if loss is not None:
            best[value] = min(loss, best.get(value, loss))
    return dict(sorted(best.items()))


def _curves(found: CellEvidence, rate: str) -> dict[str, Curve]:
    curves = {arm: best_by_rate(found.tuning[arm]["trials"], rate) for arm in found.tuning}
    return {arm: curve for arm, curve in curves.items() if curve}


def _draw_panel(axes: Axes, curves: Mapping[str, Curve]) -> None:
    for arm, curve in curves.items():
        _draw_rates(axes, arm, curve)
    style_axes(axes, grid_axis="both")
    add_panel_legend(axes)


def _scale(axes: Axes, curves: Mapping[str, Curve]) -> None:
    _write_rates(axes, sorted({rate for curve in curves.values() for rate in curve}))
    axes.set_ylim(*_losses_shown(curves))


def _write_names(figure: Figure, found: CellEvidence, *, rate: str, title: str) -> None:
    what = "final loss" if found.target_accuracy is None else "steps to the accuracy"
    unit = "(nats per token)" if found.target_accuracy is None else "(a run that misses it: 1.5 x)"
    figure.supylabel(f"mean {what} of the tuning seeds\n{unit}", color=INK, fontsize=10)
    figure.supxlabel(f"{rate} (logarithmic)", color=INK, fontsize=10)
    figure.suptitle(f"{title}: {found.title}", color=INK)


def _losses_shown(curves: Mapping[str, Curve]) -> tuple[float, float]:
    """Limits that show every arm's best loss, but neither near divergence nor a rival's others."""
    losses = {arm: np.array(list(curve.values())) for arm, curve in curves.items()}
    low = min(float(tried.min()) for tried in losses.values())
    high = max(float(tried.min()) for tried in losses.values())
    for arm, tried in losses.items():
        if arm not in RIVALS:
            height = HIGHEST_SHOWN * float(np.median(tried - tried.min()))
            high = max(high, min(float(tried.max()), float(tried.min()) + height))
    margin = 0.06 * (high - low or 1.0)
    return low - margin, high + margin


def _draw_rates(axes: Axes, arm: str, curve: Curve) -> None:
    style = style_of(arm)
    axes.plot(
        list(curve),
        list(curve.values()),
        color=style.color,
        linestyle=style.matplotlib_linestyle,
        marker=style.matplotlib_marker,
        linewidth=1.6,
        markersize=5.5,
        label=label_of(arm),
    )
    best = min(curve, key=curve.__getitem__)
    axes.scatter(
        [best], [curve[best]], marker="*", s=210, color=style.color, edgecolors=INK, zorder=4
    )


def _write_rates(axes: Axes, rates: Sequence[float]) -> None:
    """A logarithmic axis with the rates that were tried; panels share it."""
    axes.set_xscale("log")
    axes.set_xticks(_spread_out(rates))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.3g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _spread_out(rates: Sequence[float], *, least_ratio: float = 1.9) -> list[float]:
    """Rates to write at the axis: none so close to the one before that they would overlap."""
    ticks: list[float] = []
    for rate in rates:
        if not ticks or rate / ticks[-1] >= least_ratio:
            ticks.append(rate)
    return ticks
