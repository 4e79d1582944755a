"""The report's figures: losses, learning rates, and update matrices (the paper's Fig. 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from normuon_lab.layer_names import layer_numbers, layer_of
from normuon_lab.plot_style import INK, MUTED, arm_index, color_of, label_of, spread_out, style_of
from normuon_lab.study.compare.results import Results
from normuon_lab.study.statistics.curves import Comparison, steps_to_target
from normuon_lab.web_page import apply_style, stack_when_narrow


def loss_figure(results: Results, *, against: str) -> go.Figure:
    """Validation loss against `"steps"` or `"seconds"`: means over seeds, and every seed thin."""
    figure = go.Figure()
    means: dict[str, tuple[list[float], list[float]]] = {}
    for arm in results.arms:
        records = results.of_arm(arm)
        if not records:
            continue
        xs = [r.eval_steps if against == "steps" else r.eval_seconds for r in records]
        for record, x in zip(records, xs, strict=True):
            figure.add_scatter(
                x=x,
                y=record.eval_losses,
                mode="lines",
                line=_line(arm, 1),
                opacity=0.35,
                hoverinfo="skip",
                showlegend=False,
            )
        means[arm] = _mean_columns(xs), _mean_columns([r.eval_losses for r in records])
        unit = "step %{x:.0f}" if against == "steps" else "%{x:.1f} s"
        figure.add_scatter(
            x=means[arm][0],
            y=means[arm][1],
            mode="lines+markers",
            name=label_of(arm),
            line=_line(arm, 2.5),
            marker={"symbol": style_of(arm).marker, "size": 6},
            hovertemplate=f"{label_of(arm)}, {unit}: %{{y:.4f}}<extra></extra>",
        )
    if results.reference_arm in means:
        _add_target(figure, results.reference_arm, means)
    title = "training steps" if against == "steps" else "seconds of training, evaluations left out"
    apply_style(figure, height=460)
    figure.update_xaxes(title_text=title, rangemode="tozero")
    figure.update_yaxes(
        title_text=f"validation loss ({_unit(results)})", range=_loss_range(results)
    )
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
    titles = ["final loss by seed", *(f"difference, {title}" for title, _ in panels)]
    figure = make_subplots(
        rows=1,
        cols=1 + len(panels),
        subplot_titles=titles,
        horizontal_spacing=0.13,
    )
    stack_when_narrow(figure, titles, height=300)
    _add_finals(figure, results)
    for column, (_, chosen) in enumerate(panels, start=2):
        for comparison in chosen:
            _add_difference(figure, comparison, column)
        figure.add_vline(x=0, line={"color": MUTED, "width": 1}, row=1, col=column)
        figure.update_xaxes(title_text=f"{_unit(results)}; left is better", row=1, col=column)
        # Categories are at 0, 1, ...; the first is on top.
        figure.update_yaxes(range=[len(chosen) - 0.4, -0.6], row=1, col=column)
    figure.update_yaxes(title_text=f"final validation loss ({_unit(results)})", row=1, col=1)
    apply_style(figure, height=380)
    figure.update_layout(showlegend=False)
    return figure


def tuning_figure(results: Results) -> go.Figure | None:
    """Mean final loss on the tuning seeds against the learning rate; None without tuned arms."""
    figure = go.Figure()
    losses: list[float] = []
    medians: list[float] = []
    rates: set[float] = set()
    for arm in results.arms:
        rate = results.learning_rates[arm]
        trials = [trial for trial in rate["trials"] if trial["mean_final_loss"] is not None]
        if not trials:
            continue
        losses.extend(trial["mean_final_loss"] for trial in trials)
        medians.append(sorted(losses[-len(trials) :])[len(trials) // 2])
        rates.update(trial["learning_rate"] for trial in trials)
        chosen = [trial["learning_rate"] == rate["value"] for trial in trials]
        figure.add_scatter(
            x=[trial["learning_rate"] for trial in trials],
            y=[trial["mean_final_loss"] for trial in trials],
            mode="lines+markers",
            name=label_of(arm),
            line=_line(arm, 2),
            marker={
                "symbol": ["star" if c else style_of(arm).marker for c in chosen],
                "size": [15 if c else 7 for c in chosen],
                "opacity": 1.0,
                "line": {"width": [1 if c else 0 for c in chosen], "color": INK},
            },
            hovertemplate=f"{label_of(arm)}, %{{x:.4g}}: %{{y:.4f}}<extra></extra>",
        )
    if not losses:
        return None
    apply_style(figure, height=400)
    ticks = spread_out(rates, ratio=1.35)
    figure.update_xaxes(
        title_text="peak learning rate (logarithmic)",
        type="log",
        tickvals=ticks,
        ticktext=[f"{tick:.3g}" for tick in ticks],
    )
    # A rate near divergence would otherwise flatten everything that is of interest.
    top = min(max(losses), min(losses) + 2 * (max(medians) - min(losses)))
    margin = 0.08 * (top - min(losses) or 1.0)
    figure.update_yaxes(
        title_text=f"mean final loss ({_unit(results)})",
        range=[min(losses) - margin, top + margin],
    )
    return figure


def _line(arm: str, width: float) -> dict[str, Any]:
    style = style_of(arm)
    return {"color": style.color, "dash": style.dash, "width": width}


def _unit(results: Results) -> str:
    return "nats per byte" if results.corpus["tokenizer"] == "bytes" else "nats per token"


def _add_target(
    figure: go.Figure, reference: str, means: Mapping[str, tuple[list[float], list[float]]]
) -> None:
    """The reference arm's mean final loss as a line, and where other means cross it."""
    target = means[reference][1][-1]
    figure.add_hline(
        y=target,
        line={"color": color_of(reference), "dash": "dot", "width": 1.5},
        annotation_text=f"{label_of(reference)}'s final loss",
        annotation_position="bottom left",
        annotation_font={"color": color_of(reference), "size": 12},
    )
    for arm, (x, losses) in means.items():
        crossing = steps_to_target(x, losses, target)
        if arm != reference and crossing is not None:
            figure.add_scatter(
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


def _add_finals(figure: go.Figure, results: Results) -> None:
    for seed in results.seeds:
        shown = [r for arm in results.arms for r in results.of_arm(arm) if r.seed == seed]
        figure.add_scatter(
            x=[label_of(record.arm) for record in shown],
            y=[record.final_loss for record in shown],
            mode="lines+markers",
            line={"color": "#9aa5b1", "width": 1},
            marker={
                "color": [color_of(record.arm) for record in shown],
                "symbol": [style_of(record.arm).marker for record in shown],
                "size": 9,
            },
            hovertemplate=f"%{{x}}, seed {seed}: %{{y:.4f}}<extra></extra>",
            row=1,
            col=1,
        )


def _add_difference(figure: go.Figure, comparison: Comparison, column: int) -> None:
    estimate = comparison.loss_difference
    name = f"{label_of(comparison.arm)}<br>minus {label_of(comparison.baseline)}"
    figure.add_scatter(
        x=estimate.values,
        y=[name] * len(estimate.values),
        mode="markers",
        marker={"color": color_of(comparison.arm), "size": 8, "opacity": 0.4},
        hovertemplate="one seed: %{x:+.4f}<extra></extra>",
        row=1,
        col=column,
    )
    if estimate.mean is None:
        return
    error: dict[str, Any] = {"visible": False}
    if estimate.low is not None and estimate.high is not None:
        ends = {
            "array": [estimate.high - estimate.mean],
            "arrayminus": [estimate.mean - estimate.low],
        }
        error = {**ends, "thickness": 2, "width": 7}
    figure.add_scatter(
        x=[estimate.mean],
        y=[name],
        mode="markers",
        marker={
            "color": color_of(comparison.arm),
            "symbol": style_of(comparison.arm).marker,
            "size": 11,
        },
        error_x=error,
        hovertemplate="mean %{x:+.4f}<extra></extra>",
        row=1,
        col=column,
    )


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
    margin = 0.05 * (max(early) - low)
    return [low - margin, max(early) + margin]


def _mean_columns(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(column) for column in zip(*rows, strict=True)]


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
        figure.add_scatter(
            x=list(range(1, len(values) + 1)),
            y=[value / scale if scale else 0.0 for value in values],
            mode="lines",
            name=label_of(arm),
            legendgroup=arm,
            showlegend=(arm, layer) not in named,
            visible=layer == layers[-1],
            # Every second one wide, so that equal curves show that they are two.
            line=_line(arm, 3.4 if arm_index(arm) % 2 else 1.8),
            hovertemplate=f"{label_of(arm)}, %{{x}}: %{{y:.3f}}<extra></extra>",
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
