"""The look of matplotlib's figures, and how they are saved as the same bytes every time.

Colours, markers and dashes of arms are `plot_style.py`'s.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normuon_lab.plot_style import GRID, INK, MUTED

DPI = 150


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure, the same bytes for the same figure; the suffix decides: .png or .svg."""
    with matplotlib.rc_context({"svg.hashsalt": "normuon"}):
        figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)


def style_axes(axes: Axes, *, grid_axis: Literal["both", "x", "y"]) -> None:
    """The figures' common look: a light grid behind, no box."""
    axes.grid(visible=True, axis=grid_axis, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
