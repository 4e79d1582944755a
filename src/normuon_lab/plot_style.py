"""How every figure of the report looks: one colour and one marker per arm in all of them."""

from __future__ import annotations

import plotly.graph_objects as go

from normuon_lab.arms import ARMS

# Okabe and Ito's palette, which stays distinct under the common forms of colour blindness; an arm's
# place in the registry decides, so that a colour means the same in every report.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
INK = "#1f2933"
MUTED = "#616e7c"
GRID = "#e4e7eb"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def color_of(arm: str) -> str:
    """The arm's colour, `#rrggbb`."""
    return PALETTE[arm_index(arm) % len(PALETTE)]


def arm_index(arm: str) -> int:
    """The arm's place in the registry; one past the end for an arm of another version."""
    return list(ARMS).index(arm) if arm in ARMS else len(ARMS)


def marker_of(arm: str) -> str:
    """The arm's marker, by plotly's name; arms that share a colour differ in it."""
    index = arm_index(arm)
    return MARKERS[(index + index // len(PALETTE)) % len(MARKERS)]


def apply_style(figure: go.Figure, *, height: int) -> None:
    """Give a figure the report's fonts, margins, grid and legend; `height` in pixels."""
    figure.update_layout(
        height=height,
        margin={"l": 70, "r": 30, "t": 50, "b": 60},
        font={"family": FONT, "size": 13, "color": INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"font": {"family": FONT}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.0},
    )
    axis = {"gridcolor": GRID, "linecolor": "#9aa5b1", "zeroline": False, "ticks": "outside"}
    figure.update_xaxes(**axis, tickcolor="#9aa5b1")
    figure.update_yaxes(**axis, tickcolor="#9aa5b1")
