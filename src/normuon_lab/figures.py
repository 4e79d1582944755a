"""The report's figures, as plotly figures: one colour and one marker per arm in all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from normuon_lab.arms import ARMS
from normuon_lab.diagnostics import layer_of
from normuon_lab.records import RunRecord
from normuon_lab.results import Results
from normuon_lab.statistics import Comparison, steps_to_target
from normuon_lab.summary import label_of

# Okabe and Ito's palette, which stays distinct under the common forms of colour blindness; an arm's
# place in the registry decides, so that a colour means the same in every report.
_PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
_MARKERS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
_INK = "#1f2933"
_MUTED = "#616e7c"
_GRID = "#e4e7eb"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


def color_of(arm: str) -> str:
    """The arm's colour, `#rrggbb`."""
    return _PALETTE[_index_of(arm) % len(_PALETTE)]


def loss_figure(results: Results, *, against: str) -> go.Figure:
    """Validation loss against `"steps"` or `"seconds"`: means over seeds, and every seed thin."""
    figure = go.Figure()
    for arm in results.arms:
        records = results.of_arm(arm)
        if not records:
            continue
        for record in records:
            figure.add_trace(
                go.Scatter(
                    x=_abscissas(record, against),
                    y=record.eval_losses,
                    mode="lines",
                    line={"color": color_of(arm), "width": 1},
                    opacity=0.35,
                    hoverinfo="skip",
                    showlegend=False,
                )
            )
        unit = "step %{x:.0f}" if against == "steps" else "%{x:.1f} s"
        figure.add_trace(
            go.Scatter(
                x=_mean_columns([_abscissas(record, against) for record in records]),
                y=_mean_columns([record.eval_losses for record in records]),
                mode="lines+markers",
                name=label_of(arm),
                line={"color": color_of(arm), "width": 2.5},
                marker={"symbol": _marker_of(arm), "size": 6},
                hovertemplate=f"{label_of(arm)}, {unit}: %{{y:.4f}}<extra></extra>",
            )
        )
    _add_target(figure, results, against)
    title = "training steps" if against == "steps" else "seconds of training, evaluations left out"
    _style(figure, height=460)
    figure.update_xaxes(title_text=title, rangemode="tozero")
    figure.update_yaxes(title_text="validation loss (nats per byte)", range=_loss_range(results))
    return figure


def final_loss_figure(results: Results) -> go.Figure:
    """Final losses with seeds joined, and paired differences with their intervals."""
    comparisons = results.comparisons()
    reference = results.reference_arm
    panels = [
        (f"minus {label_of(reference)}", [c for c in comparisons if c.baseline == reference]),
        ("among the others", [c for c in comparisons if c.baseline != reference]),
    ]
    panels = [(title, chosen) for title, chosen in panels if any(c.seeds for c in chosen)]
    figure = make_subplots(
        rows=1,
        cols=1 + len(panels),
        subplot_titles=["final loss by seed", *(f"difference, {title}" for title, _ in panels)],
        horizontal_spacing=0.13,
    )
    _add_finals(figure, results)
    for column, (_, chosen) in enumerate(panels, start=2):
        for comparison in chosen:
            _add_difference(figure, comparison, column)
        figure.add_vline(x=0, line={"color": _MUTED, "width": 1}, row=1, col=column)
        figure.update_xaxes(title_text="nats per byte; left is better", row=1, col=column)
        figure.update_yaxes(autorange="reversed", row=1, col=column)
    figure.update_yaxes(title_text="final validation loss (nats per byte)", row=1, col=1)
    _style(figure, height=380)
    figure.update_layout(showlegend=False)
    return figure


def tuning_figure(results: Results) -> go.Figure | None:
    """Mean final loss on the tuning seeds against the learning rate; None without tuned arms."""
    figure = go.Figure()
    losses: list[float] = []
    for arm in results.arms:
        rate = results.learning_rates[arm]
        trials = [trial for trial in rate["trials"] if trial["mean_final_loss"] is not None]
        if not trials:
            continue
        losses.extend(trial["mean_final_loss"] for trial in trials)
        chosen = [trial["learning_rate"] == rate["value"] for trial in trials]
        figure.add_trace(
            go.Scatter(
                x=[trial["learning_rate"] for trial in trials],
                y=[trial["mean_final_loss"] for trial in trials],
                mode="lines+markers",
                name=label_of(arm),
                line={"color": color_of(arm), "width": 2},
                marker={
                    "symbol": ["star" if c else _marker_of(arm) for c in chosen],
                    "size": [15 if c else 7 for c in chosen],
                    "line": {"width": [1 if c else 0 for c in chosen], "color": _INK},
                },
                hovertemplate=f"{label_of(arm)}, %{{x:.4g}}: %{{y:.4f}}<extra></extra>",
            )
        )
    if not losses:
        return None
    _style(figure, height=400)
    figure.update_xaxes(title_text="peak learning rate (logarithmic)", type="log", dtick="D2")
    # A rate near divergence would otherwise flatten everything that is of interest.
    top = min(max(losses), min(losses) + 3 * (sorted(losses)[len(losses) // 2] - min(losses)))
    margin = 0.08 * (top - min(losses) or 1.0)
    figure.update_yaxes(
        title_text="mean final validation loss (nats per byte)",
        range=[min(losses) - margin, top + margin],
    )
    return figure


def singular_value_figure(results: Results) -> go.Figure | None:
    """Singular values of update matrices, over their root mean square; None where unmeasured."""
    return _update_figure(
        results,
        key="singular_values",
        y_title="singular value / RMS",
        x_title="index, largest first",
        log_y=True,
        root_mean_square=True,
    )


def row_norm_figure(results: Results) -> go.Figure | None:
    """Row norms of update matrices, over their mean; None where unmeasured."""
    return _update_figure(
        results,
        key="row_norms",
        y_title="row norm / mean",
        x_title="neuron, largest first",
        log_y=False,
        root_mean_square=False,
    )


def _update_figure(
    results: Results, *, key: str, y_title: str, x_title: str, log_y: bool, root_mean_square: bool
) -> go.Figure | None:
    """A panel per stage (rows) and kind of matrix (columns), with a button per layer."""
    measured = [(record.arm, update) for record in results.records for update in record.updates]
    if not measured:
        return None
    steps = sorted({update["step"] for _, update in measured})
    layers = sorted({layer_of(update["matrix"]) for _, update in measured})
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
    layer_of_trace = []
    named: set[tuple[str, int | None]] = set()
    for arm, update in measured:
        values = update[key]
        squares = math.fsum(v * v for v in values) / len(values)
        scale = math.sqrt(squares) if root_mean_square else math.fsum(values) / len(values)
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
                line={"color": color_of(arm), "width": 2},
                hovertemplate=f"{label_of(arm)}, %{{x}}: %{{y:.3f}}<extra></extra>",
            ),
            row=1 + steps.index(update["step"]),
            col=1 + kinds.index(_kind_of(update["matrix"])),
        )
        named.add((arm, layer))
        layer_of_trace.append(layer)
    _style(figure, height=190 * len(steps) + 130)
    _add_layer_buttons(figure, layers, layer_of_trace)
    figure.update_annotations(font_size=13)
    # Below 1/1000 of the RMS a value is rounding noise of the measurement.
    figure.update_yaxes(**({"type": "log", "range": [-3, 1]} if log_y else {"rangemode": "tozero"}))
    figure.update_yaxes(title_text=y_title, col=1)
    figure.update_xaxes(title_text=x_title, row=len(steps))
    return figure


def _add_layer_buttons(
    figure: go.Figure, layers: Sequence[int | None], layer_of_trace: Sequence[int | None]
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
                "bgcolor": "white",
                "bordercolor": "#cbd2d9",
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


def _add_target(figure: go.Figure, results: Results, against: str) -> None:
    """The reference arm's mean final loss as a line, and where other means cross it."""
    reference = results.of_arm(results.reference_arm)
    if not reference:
        return
    target = _mean_columns([record.eval_losses for record in reference])[-1]
    figure.add_hline(
        y=target,
        line={"color": color_of(results.reference_arm), "dash": "dot", "width": 1.5},
        annotation_text=f"{label_of(results.reference_arm)}'s final loss",
        annotation_position="bottom left",
        annotation_font={"color": color_of(results.reference_arm), "size": 12},
    )
    for arm in results.arms:
        records = results.of_arm(arm)
        if arm == results.reference_arm or not records:
            continue
        crossing = steps_to_target(
            _mean_columns([_abscissas(record, against) for record in records]),
            _mean_columns([record.eval_losses for record in records]),
            target,
        )
        if crossing is not None:
            figure.add_trace(
                go.Scatter(
                    x=[crossing],
                    y=[target],
                    mode="markers",
                    marker={
                        "symbol": "star",
                        "size": 14,
                        "color": color_of(arm),
                        "line": {"color": "white", "width": 1},
                    },
                    showlegend=False,
                    hovertemplate=f"{label_of(arm)} reaches it at %{{x:.0f}}<extra></extra>",
                )
            )


def _add_finals(figure: go.Figure, results: Results) -> None:
    for seed in results.seeds:
        records = [results.record(arm, seed) for arm in results.arms]
        shown = [record for record in records if record is not None and not record.diverged]
        figure.add_trace(
            go.Scatter(
                x=[label_of(record.arm) for record in shown],
                y=[record.final_loss for record in shown],
                mode="lines+markers",
                line={"color": "#9aa5b1", "width": 1},
                marker={
                    "color": [color_of(record.arm) for record in shown],
                    "symbol": [_marker_of(record.arm) for record in shown],
                    "size": 9,
                },
                hovertemplate=f"%{{x}}, seed {seed}: %{{y:.4f}}<extra></extra>",
            ),
            row=1,
            col=1,
        )


def _add_difference(figure: go.Figure, comparison: Comparison, column: int) -> None:
    estimate = comparison.loss_difference
    name = f"{label_of(comparison.arm)}<br>minus {label_of(comparison.baseline)}"
    figure.add_trace(
        go.Scatter(
            x=estimate.values,
            y=[name] * len(estimate.values),
            mode="markers",
            marker={"color": color_of(comparison.arm), "size": 6, "opacity": 0.45},
            hovertemplate="one seed: %{x:+.4f}<extra></extra>",
        ),
        row=1,
        col=column,
    )
    if estimate.mean is None:
        return
    error: dict[str, Any] = {"visible": False}
    if estimate.low is not None and estimate.high is not None:
        error = {
            "array": [estimate.high - estimate.mean],
            "arrayminus": [estimate.mean - estimate.low],
            "thickness": 2,
            "width": 7,
        }
    figure.add_trace(
        go.Scatter(
            x=[estimate.mean],
            y=[name],
            mode="markers",
            marker={
                "color": color_of(comparison.arm),
                "symbol": _marker_of(comparison.arm),
                "size": 12,
            },
            error_x=error,
            hovertemplate="mean %{x:+.4f}<extra></extra>",
        ),
        row=1,
        col=column,
    )


def _style(figure: go.Figure, *, height: int) -> None:
    figure.update_layout(
        height=height,
        margin={"l": 70, "r": 30, "t": 50, "b": 60},
        font={"family": _FONT, "size": 13, "color": _INK},
        paper_bgcolor="white",
        plot_bgcolor="white",
        hoverlabel={"font": {"family": _FONT}},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0.0},
    )
    axis = {"gridcolor": _GRID, "linecolor": "#9aa5b1", "zeroline": False, "ticks": "outside"}
    figure.update_xaxes(**axis, tickcolor="#9aa5b1")
    figure.update_yaxes(**axis, tickcolor="#9aa5b1")


def _loss_range(results: Results) -> list[float]:
    """From a little below the lowest loss to where training has left its first plunge."""
    records = [record for arm in results.arms for record in results.of_arm(arm)]
    if not records:
        return [0.0, 6.0]
    low = min(min(record.eval_losses) for record in records)
    early = [
        loss
        for record in records
        for step, loss in zip(record.eval_steps, record.eval_losses, strict=True)
        if step >= 0.1 * record.eval_steps[-1]
    ]
    high = max(early)
    margin = 0.05 * (high - low)
    return [low - margin, high + margin]


def _abscissas(record: RunRecord, against: str) -> list[float]:
    return list(record.eval_steps if against == "steps" else record.eval_seconds)


def _mean_columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(column) for column in zip(*rows, strict=True)]


def _kind_of(matrix: str) -> str:
    return ".".join(matrix.removesuffix(".weight").split(".")[-2:])


def _index_of(arm: str) -> int:
    return list(ARMS).index(arm) if arm in ARMS else len(ARMS)


def _marker_of(arm: str) -> str:
    return _MARKERS[_index_of(arm) % len(_MARKERS)]
