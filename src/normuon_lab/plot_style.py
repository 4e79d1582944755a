"""The look of all figures: each arm always has the same name, colour, marker and dash.

Figures are drawn by plotly (the report) and by matplotlib (the documentation); a style has both
libraries' names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from normuon_lab.train.arms.registry import ARMS

# Okabe and Ito's palette, which stays distinct under the common forms of colour blindness.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
INK = "#1f2933"
MUTED = "#616e7c"
GRID = "#e4e7eb"


_MATPLOTLIB_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "triangle-down": "v",
    "triangle-left": "<",
    "triangle-right": ">",
    "cross": "P",
    "x": "X",
    "pentagon": "p",
    "hexagon": "h",
    "diamond-tall": "d",
    "star": "*",
    "octagon": "8",
    "star-triangle-up": "$\\bigtriangleup$",
    "bowtie": "$\\bowtie$",
    "hexagon2": "H",
    "star-triangle-down": "$\\bigtriangledown$",
    "circle-cross": "$\\oplus$",
    "circle-x": "$\\otimes$",
    "star-diamond": "$\\diamond$",
    "circle-open": "$\\circ$",
}
_MATPLOTLIB_LINESTYLES = {"solid": "-", "dash": "--", "dashdot": "-.", "dot": ":"}


@dataclass(frozen=True, slots=True)
class ArmStyle:
    """How an arm is drawn.

    Attributes:
        color: `#rrggbb`.
        marker: by plotly's name.
        dash: of its lines, by plotly's name.
    """

    color: str
    marker: str
    dash: str

    @property
    def matplotlib_marker(self) -> str:
        """The marker, by matplotlib's name."""
        return _MATPLOTLIB_MARKERS[self.marker]

    @property
    def matplotlib_linestyle(self) -> str:
        """The dash, by matplotlib's name."""
        return _MATPLOTLIB_LINESTYLES[self.dash]


# Written out, so that a new arm changes no other's look. The compared arms are solid, NorMuon's own
# variants dashed, ablations dash-dotted and rivals dotted. The colours that are not the
# palette's are as far from all others as its own are from each other, colour blindness included.
_ARM_STYLES = {
    "adamw": ArmStyle(PALETTE[0], "circle", "solid"),
    "muon": ArmStyle(PALETTE[1], "square", "solid"),
    "normuon": ArmStyle(PALETTE[2], "diamond", "solid"),
    "normuon-original": ArmStyle(PALETTE[4], "triangle-up", "dash"),
    "normuon-short": ArmStyle("#112288", "triangle-down", "dash"),
    "normuon-heads": ArmStyle("#886633", "star", "dash"),
    "normuon-equilibrated": ArmStyle("#DDAAAA", "octagon", "dash"),
    "normuon-heads-equilibrated": ArmStyle("#BB55FF", "bowtie", "solid"),
    "normuon-kahan": ArmStyle("#D200B4", "star-triangle-up", "dash"),
    "muon-heads-equilibrated": ArmStyle("#330044", "hexagon2", "dashdot"),
    "muon-adam": ArmStyle(PALETTE[3], "cross", "dashdot"),
    "normuon-front": ArmStyle(PALETTE[5], "triangle-left", "dashdot"),
    "normuon-tall": ArmStyle(PALETTE[6], "triangle-right", "dashdot"),
    "muon-frobenius": ArmStyle("#8800FF", "x", "dashdot"),
    "dion": ArmStyle("#553311", "pentagon", "dot"),
    "adam-mini": ArmStyle("#882255", "hexagon", "dot"),
    "rmnp": ArmStyle("#88BB66", "diamond-tall", "dot"),
    "hyperball": ArmStyle("#8800CC", "star-triangle-down", "dot"),
    "muown": ArmStyle("#EEEE66", "circle-cross", "dot"),
    "ema-nesterov": ArmStyle("#AAEEEE", "circle-x", "dot"),
    "muon-eq": ArmStyle("#CCEEAA", "star-diamond", "dot"),
}
_UNKNOWN_ARM = ArmStyle(MUTED, "circle-open", "dot")


def style_of(arm: str) -> ArmStyle:
    """How the arm is drawn; grey for one of another version."""
    return _ARM_STYLES.get(arm, _UNKNOWN_ARM)


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
