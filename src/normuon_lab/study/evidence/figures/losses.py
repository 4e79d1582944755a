"""Along training: validation loss (the paper's Fig. 2 and 4), or held-out accuracy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normuon_lab.matplotlib_style import style_axes
from normuon_lab.plot_style import INK, MUTED, style_of
from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.figures.bands import (
    LABEL_SIZE,
    add_legend,
    band,
    draw_band,
    draw_estimate,
    draw_target,
    name_places,
    new_figure,
)
from normuon_lab.study.evidence.protocol import DRAWN_ARMS
from normuon_lab.study.statistics import t_interval
from normuon_lab.train.runs.records import RunRecord

SHOWN_FROM = 0.25
"""Losses are shown from this share of the steps on: before, all arms fall alike."""


def loss_figure(found: CellEvidence) -> Figure | None:
    """Several arms' full-length runs; None where no two arms have any."""
    arms = {arm: _finished(found.full_runs(arm)) for arm in DRAWN_ARMS}
    arms = {arm: runs for arm, runs in arms.items() if runs}
    if len(arms) < 2:
        return None
    figure = new_figure(9.5, 4.0)
    by_steps, by_seconds = figure.subplots(1, 2, sharey=True)
    for arm, runs in arms.items():
        losses = np.array([run.eval_losses for run in runs])
        draw_band(by_steps, arm, runs[0].eval_steps, losses, with_markers=False)
        seconds = np.array([run.eval_seconds for run in runs]).mean(axis=0)
        draw_band(by_seconds, arm, seconds, losses, with_markers=False)
    _set_losses_shown(by_steps, list(arms.values()))
    by_steps.set_xlabel("training steps", color=INK)
    by_seconds.set_xlabel("seconds of training, one thread, mean over seeds", color=INK)
    by_steps.set_ylabel("validation loss (nats per token)", color=INK)
    for axes in (by_steps, by_seconds):
        axes.set_xlim(left=0)
        style_axes(axes, grid_axis="both")
        if "adamw" in arms:
            draw_target(axes, float(np.mean([run.final_loss for run in arms["adamw"]])))
    add_legend(figure, by_steps, columns=3)
    figure.suptitle(f"Validation loss along training: {found.title}", color=INK)
    return figure


def accuracy_figure(found: CellEvidence) -> Figure | None:
    """Every run of every arm, which stops at the target; None where no run is there."""
    arms = [arm for arm in found.cell.arms if found.full_runs(arm)]
    if not arms:
        return None
    assert found.target_accuracy is not None
    figure = new_figure(10.0, 3.8)
    along, reached = figure.subplots(1, 2, width_ratios=(3, 2))
    for place, arm in enumerate(arms):
        style = style_of(arm)
        for run in found.full_runs(arm):
            along.plot(run.eval_steps, run.eval_accuracies, color=style.color, linewidth=1.2)
        along.plot([], [], color=style.color, linewidth=2, label=label_of(arm))
        _draw_steps(reached, place, arm, found)
    along.axhline(found.target_accuracy, color=MUTED, linestyle=":", linewidth=1.2)
    along.annotate(
        f"{found.target_accuracy:.0%}",
        (0, found.target_accuracy),
        xytext=(3, -2),
        textcoords="offset points",
        va="top",
        fontsize=LABEL_SIZE,
        color=MUTED,
    )
    along.set_xlabel("training steps", color=INK)
    along.set_ylabel("held-out accuracy, every seed", color=INK)
    along.legend(frameon=False, loc="lower right")
    name_places(reached, arms)
    reached.set_xlim(left=0)
    reached.set_xlabel(f"steps to {found.target_accuracy:.0%}: seeds and mean", color=INK)
    style_axes(along, grid_axis="both")
    style_axes(reached, grid_axis="x")
    figure.suptitle(f"When it is learned: {found.title}", color=INK)
    return figure


def _finished(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """The runs that did not diverge: only they have all evaluations."""
    return [run for run in runs if not run.diverged]


def _set_losses_shown(axes: Axes, arms: Sequence[Sequence[RunRecord]]) -> None:
    means = [band(np.array([run.eval_losses for run in runs]))[0] for runs in arms]
    first = min(
        int(np.searchsorted(runs[0].eval_steps, SHOWN_FROM * runs[0].eval_steps[-1]))
        for runs in arms
    )
    lowest, highest = min(m.min() for m in means), max(m[first] for m in means)
    margin = 0.05 * (highest - lowest)
    axes.set_ylim(lowest - margin, highest + margin)


def _draw_steps(axes: Axes, place: int, arm: str, found: CellEvidence) -> None:
    style = style_of(arm)
    steps = list(found.steps_to_accuracy(arm).values())
    axes.scatter(steps, [place + 0.18] * len(steps), s=16, color=style.color, alpha=0.6)
    draw_estimate(axes, place, arm, t_interval(steps))
