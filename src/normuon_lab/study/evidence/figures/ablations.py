"""The ablations against Muon, along training and at its end (the paper's Fig. 3 and 7)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from normuon_lab.matplotlib_style import style_axes
from normuon_lab.plot_style import INK, MUTED
from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.figures.bands import (
    LABEL_SIZE,
    add_legend,
    draw_band,
    draw_estimate,
    name_places,
    new_figure,
)
from normuon_lab.study.evidence.protocol import ABLATIONS, RIVALS, VARIANTS
from normuon_lab.study.statistics import Estimate, t_interval

REFERENCE = "muon"
ALONG_TRAINING = ("normuon", *ABLATIONS)
AT_THE_END = ("normuon", *ABLATIONS, *VARIANTS, *RIVALS)
WIDEST_SHOWN = 2.0
"""Final losses are shown up to this many times the farthest of the arms that are no rivals."""
SHOWN_FROM = 0.1
"""The first tenth of training, where differences are ten times the later ones, is left out."""


def ablation_figure(found: CellEvidence) -> Figure | None:
    """Paired differences of loss to Muon's; None unless an arm besides NorMuon is there."""
    differences = {arm: found.loss_differences(arm, REFERENCE) for arm in AT_THE_END}
    present = {arm: values for arm, values in differences.items() if values is not None}
    if set(present) <= {"normuon"}:
        return None
    steps = np.array(found.full_runs(REFERENCE)[0].eval_steps)
    shown = steps >= SHOWN_FROM * steps[-1]
    figure = new_figure(10.5, 4.6)
    along, at_end = figure.subplots(1, 2, width_ratios=(3, 2))
    for arm, values_SK in present.items():
        if arm in ALONG_TRAINING:
            draw_band(along, arm, steps[shown], values_SK[:, shown], with_markers=False)
    along.axhline(0, color=MUTED, linewidth=1)
    along.set_xlabel("training steps", color=INK)
    along.set_ylabel(f"validation loss minus {label_of(REFERENCE)}'s\n(nats per token)", color=INK)
    ends = {arm: t_interval(values_SK[:, -1].tolist()) for arm, values_SK in present.items()}
    limit = _end_shown(ends)
    for place, (arm, end) in enumerate(ends.items()):
        _draw_end(at_end, place, arm, end, limit=limit)
    at_end.axvline(0, color=MUTED, linewidth=1)
    name_places(at_end, list(present))
    at_end.set_xlim(right=limit)
    at_end.xaxis.set_major_locator(MaxNLocator(4))
    at_end.set_xlabel(f"final loss minus {label_of(REFERENCE)}'s\n(nats per token)", color=INK)
    style_axes(along, grid_axis="both")
    style_axes(at_end, grid_axis="x")
    add_legend(figure, along, columns=5)
    figure.suptitle(f"Against {label_of(REFERENCE)}, seed by seed: {found.title}", color=INK)
    return figure


def _end_shown(ends: Mapping[str, Estimate]) -> float:
    """Where the panel of final losses ends: a rival far behind would hide how the others differ."""
    compared = [arm for arm in ends if arm not in RIVALS] or list(ends)
    return WIDEST_SHOWN * max(abs(ends[arm].mean or 0.0) for arm in compared)


def _draw_end(axes: Axes, place: int, arm: str, end: Estimate, *, limit: float) -> None:
    assert end.mean is not None
    if end.mean > limit:
        axes.annotate(
            f"{end.mean:+.3f} \N{RIGHTWARDS ARROW}",
            (1.0, place),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="center",
            color=INK,
            fontsize=LABEL_SIZE,
        )
        return
    draw_estimate(axes, place, arm, end)
