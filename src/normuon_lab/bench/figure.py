"""A benchmark's contents as a figure: milliseconds per step, and how exact the direction is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from normuon_lab.bench.contender import OWN
from normuon_lab.bench.race import polar_error
from normuon_lab.errors import counted, significant
from normuon_lab.plot_style import INK, PALETTE, style_axes

OWN_COLOR, PEER_COLOR = PALETTE[0], PALETTE[1]
LONGEST_BAR = 4.0
"""In steps of the reference; a longer bar is cut, so that one slow contender hides no other."""


def bench_figure(contents: Mapping[str, Any]) -> Figure:
    """Bars of medians with quartiles and bounds on the left, polar errors on the right."""
    contenders = contents["contenders"]
    has_polar = any(values["polar"] for values in contenders)
    figure = Figure(figsize=(11 if has_polar else 8, 1.8 + 0.34 * len(contenders)))
    figure.set_layout_engine("constrained")
    ratios = (2, 1) if has_polar else (1,)
    axes = figure.subplots(1, len(ratios), sharey=True, squeeze=False, width_ratios=ratios)[0]
    _draw_times(axes[0], contenders, reference_ms=contenders[0]["median_ms"])
    if has_polar:
        _draw_errors(axes[1], contenders)
    figure.suptitle(
        f"One optimizer step, {contents['title']}: {machine_words(contents)}", color=INK
    )
    bound = Line2D([], [], color=INK, marker="|", markersize=11, markeredgewidth=2, linestyle="")
    figure.legend(
        [Patch(color=OWN_COLOR), Patch(color=PEER_COLOR), bound],
        ["NorMuon", "peers", "its counted FLOPs at the measured rate of products"],
        loc="outside lower center",
        ncols=3,
        frameon=False,
    )
    return figure


def machine_words(contents: Mapping[str, Any]) -> str:
    """Device and threads, as a figure's title names them."""
    machine = contents["machine"]
    if contents["device"] != "cpu":
        return str(contents["device"])
    threads = counted(machine["threads_per_worker"], "thread")
    return f"{machine['processor'].partition(' (')[0]}, {threads}"


def _draw_times(
    axes: Axes, contenders: Sequence[Mapping[str, Any]], *, reference_ms: float
) -> None:
    places = range(len(contenders))
    medians = [values["median_ms"] for values in contenders]
    ends = [max(values["median_ms"], values["quartiles_ms"][1]) for values in contenders]
    below = [values["median_ms"] - values["quartiles_ms"][0] for values in contenders]
    above = [values["quartiles_ms"][1] - values["median_ms"] for values in contenders]
    axes.barh(
        places,
        medians,
        height=0.68,
        color=[_color_of(values) for values in contenders],
        xerr=(below, above),
        error_kw={"ecolor": INK, "elinewidth": 1.2, "capsize": 2.5},
    )
    bounds = [math.nan if values["flops"] == 0 else values["bound_ms"] for values in contenders]
    axes.scatter(bounds, places, marker="|", s=150, linewidths=2.0, color=INK, zorder=3)
    limit = min(max(ends), LONGEST_BAR * reference_ms)
    for place, median, end in zip(places, medians, ends, strict=True):
        is_cut = median > limit
        axes.annotate(
            significant(median, 3) + (", cut" if is_cut else ""),
            (min(end, limit), place),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=INK,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5} if is_cut else None,
        )
    axes.set_yticks(places, [values["name"] for values in contenders])
    axes.set_ylim(len(contenders) - 0.4, -0.6)
    axes.set_xlim(0, 1.16 * limit)
    axes.set_xlabel("ms per step: median and quartiles", color=INK)
    style_axes(axes, grid_axis="x")


def _draw_errors(axes: Axes, contenders: Sequence[Mapping[str, Any]]) -> None:
    shown = [
        (error, place, _color_of(values))
        for place, values in enumerate(contenders)
        if (error := polar_error(values)) is not None
    ]
    errors, places, colors = zip(*shown, strict=True)
    axes.scatter(errors, places, s=42, color=colors, clip_on=False)
    axes.set_xlim(0, 1.15 * max(errors))
    axes.set_xlabel("distance from the polar factor,\ndirections only", color=INK)
    style_axes(axes, grid_axis="both")


def _color_of(values: Mapping[str, Any]) -> str:
    return OWN_COLOR if values["package"] == OWN else PEER_COLOR
