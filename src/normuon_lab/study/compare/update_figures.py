"""The report's figures of update matrices: singular values and row norms (the paper's Fig. 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from normuon_lab.layer_names import layer_numbers, layer_of
from normuon_lab.plot_style import INK, arm_index, color_of, dash_of
from normuon_lab.study.compare.results import Results
from normuon_lab.study.compare.summary import label_of
from normuon_lab.web_page import apply_style, stack_when_narrow


def update_figure(results: Results, key: str) -> go.Figure | None:
    """A panel per stage (rows) and kind of matrix (columns), with a button per layer.

    `key` is `"singular_values"`, drawn over their root mean square, or `"row_norms"`, over their
    mean. None where nothing was measured.
    """
    is_spectrum = key == "singular_values"
    measured = [(record.arm, update) for record in results.records for update in record.updates]
    if not measured:
        return None
    steps = sorted({update["step"] for _, update in measured})
    layers = layer_numbers([update["matrix"] for _, update in measured])
    kinds = list(dict.fromkeys(_kind_of(update["matrix"]) for _, update in measured))
    shapes = {_kind_of(u["matrix"]): u["shape"] for _, u in measured}
    figure = make_subplots(
        rows=len(steps),
        cols=len(kinds),
        column_titles=[f"{kind} [{shapes[kind][0]} x {shapes[kind][1]}]" for kind in kinds],
        row_titles=[f"step {step}" for step in steps],
        shared_xaxes="columns",
        shared_yaxes="all",
        horizontal_spacing=0.025,
        vertical_spacing=0.05,
    )
    panels = [f"{kind}, step {step}" for step in steps for kind in kinds]
    stack_when_narrow(figure, panels, height=210)
    layer_of_trace = []
    named: set[tuple[str, int | None]] = set()
    for arm, update in measured:
        values = update[key]
        squares = math.fsum(v * v for v in values) / len(values)
        scale = math.sqrt(squares) if is_spectrum else math.fsum(values) / len(values)
        layer = layer_of(update["matrix"])
        figure.add_trace(
            go.Scatter(
                x=list(range(1, len(values) + 1)),
                y=[value / scale if scale else 0.0 for value in values],
                mode="lines",
                name=label_of(arm),
                legendgroup=arm,
                showlegend=(arm, layer) not in named,
                visible=layer == layers[-1],
                # Every second one wide, so that equal curves show that they are two.
                line={
                    "color": color_of(arm),
                    "dash": dash_of(arm),
                    "width": 3.4 if arm_index(arm) % 2 else 1.8,
                },
                hovertemplate=f"{label_of(arm)}, %{{x}}: %{{y:.3f}}<extra></extra>",
            ),
            row=1 + steps.index(update["step"]),
            col=1 + kinds.index(_kind_of(update["matrix"])),
        )
        named.add((arm, layer))
        layer_of_trace.append(layer)
    apply_style(figure, height=190 * len(steps) + 130)
    _add_layer_buttons(figure, layers, layer_of_trace)
    figure.update_annotations(font_size=13)
    # Below 1/1000 of the RMS a value is rounding noise of the measurement.
    shown = {"type": "log", "range": [-3, 1]} if is_spectrum else {"rangemode": "tozero"}
    figure.update_yaxes(**shown)
    y_title = "singular value / RMS" if is_spectrum else "row norm / mean"
    figure.update_yaxes(title_text=y_title, col=1)
    x_title = f"{'index' if is_spectrum else 'neuron'}, largest first"
    figure.update_xaxes(title_text=x_title, row=len(steps))
    return figure


def _add_layer_buttons(
    figure: go.Figure, layers: Sequence[int], layer_of_trace: Sequence[int | None]
) -> None:
    figure.update_layout(
        margin={"t": 110},
        legend={"yref": "container", "y": 1.0, "yanchor": "top", "x": 0.0},
        updatemenus=[
            {
                "type": "buttons",
                "direction": "right",
                "active": len(layers) - 1,
                "x": 1.0,
                "xanchor": "right",
                "y": 1.0,
                "yanchor": "bottom",
                "pad": {"b": 30},
                "bgcolor": "#e4e7eb",
                "bordercolor": "#cbd2d9",
                "font": {"color": INK},
                "buttons": [
                    {
                        "label": f"layer {layer}",
                        "method": "update",
                        "args": [{"visible": [other == layer for other in layer_of_trace]}],
                    }
                    for layer in layers
                ],
            }
        ],
    )


def _kind_of(matrix: str) -> str:
    return ".".join(matrix.removesuffix(".weight").split(".")[-2:])
