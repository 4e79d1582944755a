"""Singular values and row norms of update matrices (the paper's Fig. 1 and A.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normuon_lab.layer_names import layer_numbers, layer_of
from normuon_lab.matplotlib_style import style_axes
from normuon_lab.plot_style import INK, MUTED, style_of
from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence.figures.bands import (
    LABEL_SIZE,
    Array,
    add_legend,
    new_figure,
    title_panel,
)
from normuon_lab.study.evidence.runs import CellEvidence, Updates

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


def update_figures(found: CellEvidence) -> dict[str, Figure]:
    """Figures by name, for every quantity and measured layer; none without two arms' updates."""
    updates = found.measured_updates()
    if len(updates) < 2:
        return {}
    matrices = list(dict.fromkeys(matrix for matrix, _ in next(iter(updates.values()))))
    layers = layer_numbers(matrices)
    return {
        f"{key.replace('_', '-')}-layer{layer}": _figure(
            found, updates, [m for m in matrices if layer_of(m) == layer], key
        )
        for key in QUANTITIES
        for layer in layers
    }


def _figure(
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
                    _draw(axes, arm, np.array(measured[matrix, step][key]), key)
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


def _draw(axes: Axes, arm: str, values: Array, key: str) -> None:
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
