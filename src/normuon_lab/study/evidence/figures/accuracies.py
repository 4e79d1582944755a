"""Held-out accuracy along training, and the steps until it is reached."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normuon_lab.matplotlib_style import style_axes
from normuon_lab.plot_style import INK, MUTED, style_of
from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.figures.bands import LABEL_SIZE, new_figure
from normuon_lab.study.statistics import t_interval


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
    reached.set_yticks(range(len(arms)), [label_of(arm) for arm in arms])
    reached.set_ylim(len(arms) - 0.4, -0.6)
    reached.set_xlim(left=0)
    reached.set_xlabel(f"steps to {found.target_accuracy:.0%}: seeds and mean", color=INK)
    style_axes(along, grid_axis="both")
    style_axes(reached, grid_axis="x")
    figure.suptitle(f"When it is learned: {found.title}", color=INK)
    return figure


def _draw_steps(axes: Axes, place: int, arm: str, found: CellEvidence) -> None:
    style = style_of(arm)
    steps = list(found.steps_to_accuracy(arm).values())
    axes.scatter(steps, [place + 0.18] * len(steps), s=16, color=style.color, alpha=0.6)
    estimate = t_interval(steps)
    if estimate.low is not None and estimate.high is not None:
        axes.plot([estimate.low, estimate.high], [place] * 2, color=style.color, linewidth=2)
    if estimate.mean is not None:
        axes.scatter(
            [estimate.mean], [place], s=64, color=style.color, marker=style.matplotlib_marker
        )
