"""Along training: losses (the paper's Fig. 2 and 4), ablations (Fig. 3 and 7), accuracy, and update
matrices (Fig. 1 and A.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from normuon_lab.layer_names import layer_numbers, layer_of
from normuon_lab.plot_style import INK, MUTED, color_of, label_of, style_axes, style_of
from normuon_lab.study.evidence.figures.bands import (
    LABEL_SIZE,
    Array,
    add_legend,
    draw_band,
    draw_estimate,
    draw_target,
    name_axes,
    name_places,
    new_figure,
    title_panel,
    write_at,
)
from normuon_lab.study.evidence.protocol import ABLATIONS, DRAWN_ARMS, RIVALS, VARIANTS
from normuon_lab.study.evidence.runs import CellEvidence, Updates
from normuon_lab.study.statistics.estimates import t_interval
from normuon_lab.train.runs.records import RunRecord

LOSSES_SHOWN_FROM = 0.25
"""Losses are shown from this share of the steps on: before, all arms fall alike."""

REFERENCE = "muon"
ALONG_TRAINING = ("normuon", *ABLATIONS)
AT_THE_END = ("normuon", *ABLATIONS, *VARIANTS, *RIVALS)
WIDEST_SHOWN = 2.0
"""Final losses are shown up to this many times the farthest of the arms that are no rivals."""
DIFFERENCES_SHOWN_FROM = 0.1
"""The first tenth of training, where differences are ten times the later ones, is left out."""

QUANTITIES = {
    "singular_values": ("Singular values", "singular value / RMS"),
    "row_norms": ("Row norms", "row norm / mean"),
}

LEAST_SHOWN = 1e-3
"""Of singular values over their RMS: below it a value is rounding noise of the measurement."""

GREATEST_SHOWN = 3.0
"""Of row norms over their mean: a few rows of the momentum and of Adam-mini are far larger."""

WIDTHS = {"muon": 3.4}
"""Wider than NorMuon's line drawn over it, so that equal curves show that they are two."""


def loss_figure(found: CellEvidence) -> Figure | None:
    """Several arms' full-length runs; None where no two arms have any."""
    # Only runs that did not diverge have all evaluations.
    arms = {arm: [r for r in found.full_runs(arm) if not r.diverged] for arm in DRAWN_ARMS}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    if len(arms) < 2:
        return None
    figure = new_figure(9.5, 4.0, f"Validation loss along training: {found.title}")
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    for arm, runs in arms.items():
        losses = np.array([run.eval_losses for run in runs])
        draw_band(by_steps, arm, runs[0].eval_steps, losses, marker=None)
        seconds = np.array([run.eval_seconds for run in runs]).mean(axis=0)
        draw_band(by_seconds, arm, seconds, losses, marker=None)
    _set_losses_shown(by_steps, list(arms.values()))
    name_axes(by_steps, "training steps", "validation loss (nats per token)", grid="both")
    name_axes(by_seconds, "seconds of training, one thread, mean over seeds", grid="both")
    for axes in (by_steps, by_seconds):
        axes.set_xlim(left=0)
        if "adamw" in arms:
            draw_target(axes, float(np.mean([run.final_loss for run in arms["adamw"]])))
    add_legend(figure, by_steps, columns=3)
    return figure


def accuracy_figure(found: CellEvidence) -> Figure | None:
    """Every run of every arm, which stops at the target; None where no run is there."""
    arms = [arm for arm in found.cell.arms if found.full_runs(arm)]
    if not arms:
        return None
    assert found.cell.target_accuracy is not None
    figure = new_figure(10.0, 3.8, f"When it is learned: {found.title}")
    along, reached = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, arm in enumerate(arms):
        color = color_of(arm)
        for run in found.full_runs(arm):
            along.plot(run.eval_steps, run.eval_accuracies, color=color, linewidth=1.2)
        along.plot([], [], color=color, linewidth=2, label=label_of(arm))
        steps = list(found.steps_to_accuracy(arm).values())
        reached.scatter(steps, [place + 0.18] * len(steps), s=16, color=color, alpha=0.6)
        draw_estimate(reached, place, arm, t_interval(steps))
    along.axhline(found.cell.target_accuracy, color=MUTED, linestyle=":", linewidth=1.2)
    look = {"xytext": (3, -2), "textcoords": "offset points", "va": "top", "color": MUTED}
    goal = f"{found.cell.target_accuracy:.0%}"
    along.annotate(goal, (0, found.cell.target_accuracy), fontsize=LABEL_SIZE, **look)
    name_axes(along, "training steps", "held-out accuracy, every seed", grid="both")
    along.legend(frameon=False, loc="lower right")
    name_places(reached, arms)
    reached.set_xlim(left=0)
    name_axes(reached, f"steps to {goal}: seeds and mean", grid="x")
    return figure


def _set_losses_shown(axes: Axes, arms: Sequence[Sequence[RunRecord]]) -> None:
    means = [
        [
            math.fsum(losses) / len(runs)
            for losses in zip(*(r.eval_losses for r in runs), strict=True)
        ]
        for runs in arms
    ]
    first = min(
        int(np.searchsorted(runs[0].eval_steps, LOSSES_SHOWN_FROM * runs[0].eval_steps[-1]))
        for runs in arms
    )
    lowest, highest = min(map(min, means)), max(losses[first] for losses in means)
    margin = 0.05 * (highest - lowest)
    axes.set_ylim(lowest - margin, highest + margin)


def ablation_figure(found: CellEvidence) -> Figure | None:
    """Paired differences of loss to Muon's; None unless an arm besides NorMuon is there."""
    differences = {arm: found.loss_differences(arm, REFERENCE) for arm in AT_THE_END}
    present = {arm: values for arm, values in differences.items() if values is not None}
    if set(present) <= {"normuon"}:
        return None
    steps = np.array(found.full_runs(REFERENCE)[0].eval_steps)
    shown = steps >= DIFFERENCES_SHOWN_FROM * steps[-1]
    reference = label_of(REFERENCE)
    figure = new_figure(10.5, 4.6, f"Against {reference}, seed by seed: {found.title}")
    along, at_end = figure.subplots(1, 2, width_ratios=(3, 2))
    for arm, values_SK in present.items():
        if arm in ALONG_TRAINING:
            draw_band(along, arm, steps[shown], values_SK[:, shown], marker=None)
    along.axhline(0, color=MUTED, linewidth=1)
    minus = f"minus {reference}'s\n(nats per token)"
    name_axes(along, "training steps", f"validation loss {minus}", grid="both")
    ends = {arm: t_interval(values_SK[:, -1].tolist()) for arm, values_SK in present.items()}
    means = {arm: end.mean or 0.0 for arm, end in ends.items()}
    # A rival far behind would hide how the others differ.
    compared = [arm for arm in ends if arm not in RIVALS] or list(ends)
    limit = WIDEST_SHOWN * max(abs(means[arm]) for arm in compared)
    for place, (arm, end) in enumerate(ends.items()):
        if means[arm] <= limit:
            draw_estimate(at_end, place, arm, end)
            continue
        text = f"{means[arm]:+.3f} \N{RIGHTWARDS ARROW}"
        write_at(at_end, text, (1.0, place), ha="right", va="center", color=INK)
    at_end.axvline(0, color=MUTED, linewidth=1)
    name_places(at_end, list(present))
    at_end.set_xlim(right=limit)
    at_end.xaxis.set_major_locator(MaxNLocator(4))
    name_axes(at_end, f"final loss {minus}", grid="x")
    add_legend(figure, along, columns=5)
    return figure


def update_figures(found: CellEvidence) -> dict[str, Figure]:
    """Figures by name, for every quantity and measured layer; none without two arms' updates."""
    updates = found.measured_updates()
    if len(updates) < 2:
        return {}
    matrices = list(dict.fromkeys(matrix for matrix, _ in next(iter(updates.values()))))
    layers = layer_numbers(matrices)
    return {
        f"{key.replace('_', '-')}-layer{layer}": _update_figure(
            found, updates, [m for m in matrices if layer_of(m) == layer], key
        )
        for key in QUANTITIES
        for layer in layers
    }


def _update_figure(
    found: CellEvidence, updates: Mapping[str, Updates], matrices: Sequence[str], key: str
) -> Figure:
    """A panel per stage (rows) and matrix (columns)."""
    first = next(iter(updates.values()))
    steps = sorted({step for _, step in first})
    what, quantity = QUANTITIES[key]
    title = f"{what} of updates, layer {layer_of(matrices[0])}: {found.title}"
    figure = new_figure(2.6 * len(matrices), 1.75 * len(steps) + 1.1, title)
    grid = figure.subplots(len(steps), len(matrices), squeeze=False, sharex="col", sharey=True)
    for axes_row, step in zip(grid, steps, strict=True):
        for axes, matrix in zip(axes_row, matrices, strict=True):
            for arm, measured in updates.items():
                if (matrix, step) in measured:
                    _draw_update(axes, arm, np.array(measured[matrix, step][key]), key)
            style_axes(axes, grid_axis="both")
        axes_row[0].set_ylabel(f"step {step}\n{quantity}", color=INK, fontsize=LABEL_SIZE)
    for axes, matrix in zip(grid[0], matrices, strict=True):
        rows, columns = first[matrix, steps[0]]["shape"]
        kind = matrix.removesuffix(".weight").rpartition(".")[2]
        title_panel(axes, f"{kind} [{rows} x {columns}]", loc="center")
    for axes in grid[-1]:
        axes.set_xlabel("index, largest first", color=INK, fontsize=LABEL_SIZE)
    if key == "singular_values":
        grid[0, 0].set_yscale("log")
        grid[0, 0].set_ylim(bottom=LEAST_SHOWN)
    else:
        grid[0, 0].set_ylim(0, GREATEST_SHOWN)
    add_legend(figure, grid[0, 0])
    return figure


def _draw_update(axes: Axes, arm: str, values: Array, key: str) -> None:
    """Singular values over their root mean square, row norms over their mean; zero stays zero."""
    scale = np.sqrt((values**2).mean()) if key == "singular_values" else values.mean()
    is_momentum = arm == "momentum"
    style = style_of(arm)
    axes.plot(
        np.arange(1, len(values) + 1),
        values / scale if scale else values,
        color=MUTED if is_momentum else style.color,
        linestyle=":" if is_momentum else style.matplotlib_linestyle,
        linewidth=WIDTHS.get(arm, 1.6),
        label="raw momentum (Muon's)" if is_momentum else label_of(arm),
    )
