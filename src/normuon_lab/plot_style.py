"""The look of all figures: each arm always has the same name, colour, marker and dash.

Figures are drawn by plotly (the report) and by matplotlib (the documentation); a style has both
libraries' names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from normuon_lab.train.arms.registry import ARMS

# A page draws by plotly and needs no matplotlib.
if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which stays distinct under the common forms of colour blindness.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
INK = "#1f2933"
MUTED = "#616e7c"
GRID = "#e4e7eb"
DPI = 150

_MATPLOTLIB_LINESTYLES = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":"}


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How an arm is drawn.

    Attributes:
        color: `#rrggbb`.
        marker: by plotly's name.
        matplotlib_marker: the same by matplotlib's name.
        dash: of its lines, by plotly's name.
    """

    color: str
    marker: str
    matplotlib_marker: str
    dash: str

    @property
    def matplotlib_linestyle(self) -> str:
        """The dash, by matplotlib's name."""
        return _MATPLOTLIB_LINESTYLES[self.dash]


_UNKNOWN_ARM = ArmStyle(MUTED, "circle-open", "$\\circ$", "dot")


def style_of(arm: str) -> ArmStyle:
    """How the arm is drawn; grey for one of another version."""
    return ArmStyle(*ARMS[arm].style) if arm in ARMS else _UNKNOWN_ARM


def color_of(arm: str) -> str:
    """The arm's colour, `#rrggbb`."""
    return style_of(arm).color


def label_of(arm: str) -> str:
    """What figures and tables call an arm; one that this version does not know keeps its name."""
    return ARMS[arm].label if arm in ARMS else arm


def arm_index(arm: str) -> int:
    """The arm's place in the registry; one past the end for an arm of another version."""
    return list(ARMS).index(arm) if arm in ARMS else len(ARMS)


def spread_out(values: Iterable[float], *, ratio: float) -> list[float]:
    """Those values that are far enough apart on a logarithmic axis to be labelled.

    Example:
        >>> spread_out([4.0, 1.0, 1.5, 2.0], ratio=2)
        [1.0, 2.0, 4.0]
    """
    chosen: list[float] = []
    for value in sorted(set(values)):
        if not chosen or value >= ratio * chosen[-1]:
            chosen.append(value)
    return chosen


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure, the same bytes for the same figure; the suffix decides: .png or .svg."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "normuon"}):
        figure.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)


def style_axes(axes: Axes, *, grid_axis: Literal["both", "x", "y"]) -> None:
    """The figures' common look: a light grid behind, no box."""
    axes.grid(visible=True, axis=grid_axis, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
