"""Arms can be told apart in every figure, by colour-blind readers too."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import plotly.graph_objects as go
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from normuon_lab.plot_style import PALETTE, style_of
from normuon_lab.train.arms.registry import ARMS

# Machado, Oliveira and Fernandes 2009, severity 1: what linear RGB looks like to whom.
SIGHTS = {
    "trichromacy": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
XYZ_OF_RGB = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.072175],
        [0.0193339, 0.119192, 0.9503041],
    ]
)
WHITE = np.array([0.95047, 1.0, 1.08883])


def lab(color, sight):
    """CIE L*a*b* of `#rrggbb` as a reader sees it."""
    encoded = np.array(to_rgb(color))
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.asarray(SIGHTS[sight]) @ linear, 0, 1)
    x, y, z = (
        np.cbrt(t) if t > 0.008856 else 7.787 * t + 16 / 116 for t in XYZ_OF_RGB @ seen / WHITE
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def distance(color, other):
    """The distance of two colours to the reader who finds them closest."""
    return min(np.linalg.norm(lab(color, sight) - lab(other, sight)) for sight in SIGHTS)


def test_no_two_arms_share_a_colour_or_a_marker():
    styles = [style_of(arm) for arm in (*ARMS, "an arm of another version")]
    assert len({style.color for style in styles}) == len(styles)
    assert len({style.marker for style in styles}) == len(styles)
    assert len({style.matplotlib_marker for style in styles}) == len(styles)


def test_all_arms_are_as_far_apart_as_the_palette_s_own_colours():
    least = min(distance(a, b) for a, b in combinations(PALETTE, 2))
    assert least > 15  # A just noticeable difference is 2.3.
    for a, b in combinations(ARMS, 2):
        assert distance(style_of(a).color, style_of(b).color) >= least, (a, b)


def test_the_compared_arms_keep_their_look():
    """Figures that were published before there were others show them so."""
    looks = [(style_of(arm).color, style_of(arm).marker) for arm in ("adamw", "muon", "normuon")]
    assert looks == [("#0072B2", "circle"), ("#E69F00", "square"), ("#009E73", "diamond")]


@pytest.mark.parametrize("arm", [*ARMS, "an arm of another version"])
def test_both_libraries_draw_every_arm(arm):
    style = style_of(arm)
    trace = go.Scatter(
        line={"color": style.color, "dash": style.dash}, marker={"symbol": style.marker}
    )
    assert trace.marker.symbol == style.marker
    assert trace.line.dash == style.dash
    (line,) = (
        Figure()
        .subplots()
        .plot(
            [0, 1],
            color=style.color,
            marker=style.matplotlib_marker,
            linestyle=style.matplotlib_linestyle,
        )
    )
    line.figure.canvas.draw()
    assert line.get_marker() == style.matplotlib_marker
    assert line.get_linestyle() == style.matplotlib_linestyle
