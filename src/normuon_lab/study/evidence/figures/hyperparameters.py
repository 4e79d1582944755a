"""How much depends on the two learning rates, from the tuning's trials, and on NorMuon's other
hyperparameters, varied one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normuon_lab.plot_style import INK, MUTED, color_of, spread_out, style_axes
from normuon_lab.study.evidence.figures.bands import (
    LABEL_SIZE,
    line_of,
    log_ticks,
    new_figure,
    title_panel,
)
from normuon_lab.study.evidence.protocol import ABLATIONS, RIVALS, VARIANTS
from normuon_lab.study.evidence.runs import CellEvidence
from normuon_lab.study.statistics.estimates import Estimate, t_interval
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

LEAST_TICK_RATIO = 1.9
"""Rates nearer to each other are not both written at the axis."""

HIGHEST_SHOWN = 3.0
"""A tuning curve is shown up to this many times its median height above its own best loss."""

DEFAULTS: Mapping[str, Any] = {
    "beta2": 0.95,
    "ns_steps": 5,
    "nesterov": True,
    "ns_coefficients": "jordan",
    "eps": 1e-8,
    "neuron_axis": "row",
    "cautious_weight_decay": False,
    "momentum_dtype": "float32",
}
"""What the claim runs had. Written down, since the library's defaults may move on this evidence."""


def learning_rate_figure(found: CellEvidence) -> Figure | None:
    """At every learning rate tried, the best loss over the other axes; None without tuning."""
    curves = _curves(found, "learning_rate")
    panels = {
        title: present
        for title, arms in PANELS
        if (present := {arm: curves[arm] for arm in arms if arm in curves})
    }
    title, what = "Sensitivity to the learning rate", "hidden matrices"
    return _rate_figure(f"{title}: {found.title}", found, panels, what) if panels else None


def other_rate_figure(found: CellEvidence) -> Figure | None:
    """The same for the AdamW parameters, of the arms that tune its rate; None where none does."""
    curves = _curves(found, "adam_lr")
    curves = {a: curve for a, curve in curves.items() if "adam_lr" in found.tuning[a]["axes"]}
    title, what = "Learning rate of the AdamW parameters", "embeddings, head and norms"
    return _rate_figure(f"{title}: {found.title}", found, {"": curves}, what) if curves else None


def _rate_figure(
    title: str, found: CellEvidence, panels: Mapping[str, Mapping[str, Curve]], what: str
) -> Figure:
    """A panel per group of arms, all with the same axes."""
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(5.2 * columns if columns > 1 else 7.0, 4.2 * rows + 0.2)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        _draw_panel(axes, curves)
        if len(panels) > 1:
            title_panel(axes, name)
        axes.tick_params(labelbottom=True, labelleft=True)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    _scale(grid[0, 0], {arm: curve for curves in panels.values() for arm, curve in curves.items()})
    measure, unit = "final loss", "nats per token"
    if found.cell.target_accuracy is not None:
        measure, unit = "steps to the accuracy", "a run that misses it: 1.5 x"
    figure.supylabel(f"mean {measure} of the tuning seeds\n({unit})", color=INK, fontsize=10)
    figure.supxlabel(f"peak learning rate of {what} (logarithmic)", color=INK, fontsize=10)
    figure.suptitle(title, color=INK)
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
        look = line_of(arm)
        axes.plot(list(curve), list(curve.values()), linewidth=1.6, **look)
        best = min(curve, key=curve.__getitem__)
        star = {"marker": "*", "s": 210, "color": look["color"], "edgecolors": INK, "zorder": 4}
        axes.scatter([best], [curve[best]], **star)
    style_axes(axes, grid_axis="both")
    # Panels show different arms, so each has a legend.
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.1),
        ncols=3 if len(curves) == 3 else 2,
        frameon=False,
        fontsize=LABEL_SIZE,
        labelcolor=INK,
    )


def _scale(axes: Axes, curves: Mapping[str, Curve]) -> None:
    """Panels share the axes: the rates that were tried, as far as they do not overlap, and every
    arm's best loss, but neither losses near divergence nor a rival's others."""
    rates = (rate for curve in curves.values() for rate in curve)
    log_ticks(axes, spread_out(rates, ratio=LEAST_TICK_RATIO), "{x:.3g}")
    losses = {arm: np.array(list(curve.values())) for arm, curve in curves.items()}
    low = min(float(tried.min()) for tried in losses.values())
    high = max(float(tried.min()) for tried in losses.values())
    for arm, tried in losses.items():
        if arm not in RIVALS:
            height = HIGHEST_SHOWN * float(np.median(tried - tried.min()))
            high = max(high, min(float(tried.max()), float(tried.min()) + height))
    margin = 0.06 * (high - low or 1.0)
    axes.set_ylim(low - margin, high + margin)


def sensitivity_figure(found: CellEvidence) -> Figure | None:
    """NorMuon's final loss minus that of its defaults, seed by seed, a panel per hyperparameter."""
    changes = sensitivity(found)
    if not changes:
        return None
    names = sorted(changes, key=list(DEFAULTS).index)
    rows = [names[:2], names[2:]] if len(names) > 2 else [names]
    title = f"NorMuon with one hyperparameter changed: {found.title}"
    figure = new_figure(10.0, 3.4 * len(rows) + 0.4, title)
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, shown in zip(parts, rows, strict=True):
        widths = [len(changes[name]) + 1.6 for name in shown]
        # Few Newton-Schulz steps cost a hundred times what any beta2 does.
        sharey = shown is not rows[0]
        row = part.subplots(1, len(shown), squeeze=False, sharey=sharey, width_ratios=widths)[0]
        for axes, name in zip(row, shown, strict=True):
            _draw_changes(axes, name, changes[name])
            style_axes(axes, grid_axis="y")
        row[0].set_ylabel("final loss minus the defaults'\n(nats per token)", color=INK)
    return figure


def sensitivity(found: CellEvidence) -> dict[str, dict[Any, Estimate | None]]:
    """By hyperparameter and value, the paired difference of final loss to the claim runs.

    None where one of the runs diverged.
    """
    changes: dict[str, dict[Any, Estimate | None]] = {}
    for name, by_value in found.varied_losses().items():
        for value, pairs in by_value.items():
            differences = [a - b for a, b in pairs if a is not None and b is not None]
            is_whole = len(differences) == len(pairs)
            changes.setdefault(name, {})[value] = t_interval(differences) if is_whole else None
    return changes


def _draw_changes(axes: Axes, name: str, changes: Mapping[Any, Estimate | None]) -> None:
    default = DEFAULTS[name]
    # Numbers in their order, before words.
    values = sorted([*changes, default], key=lambda value: (isinstance(value, str), value))
    for place, value in enumerate(values):
        if value == default:
            axes.scatter([place], [0.0], s=64, color="white", edgecolors=INK, zorder=3)
            continue
        estimate = changes[value]
        if estimate is None or estimate.mean is None:
            label = axes.annotate("diverged", (place, 0.0), rotation=90, ha="center", va="bottom")
            label.set_color(MUTED)
            continue
        if estimate.low is not None and estimate.high is not None:
            ends = [estimate.low, estimate.high]
            axes.plot([place] * 2, ends, color=color_of("normuon"), linewidth=2)
        axes.plot([place], [estimate.mean], color=color_of("normuon"), marker="D", markersize=6)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.set_xticks(range(len(values)), [_written(value) for value in values])
    axes.set_xlim(-0.6, len(values) - 0.4)
    # Long names break, so that they fit below a panel of two values.
    axes.set_xlabel(name.replace("_weight", "\n_weight"), color=INK)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    return f"{value:g}" if isinstance(value, int | float) else str(value).replace("_", "\n")
