"""A plan's contents as one self-contained HTML page: no file beside it, no network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from normuon.distributed.cost import format_bytes
from normuon_lab import web_page
from normuon_lab.plan import text as plan_text
from normuon_lab.web_page import WARNING, apply_style, stack_when_narrow

_MAX_BARS = 64
"""Ranks up to which each gets a bar; more become a line."""


def render_page(contents: Mapping[str, Any], *, command: str) -> str:
    """The page of `plan_contents` as text; `command` makes it again."""
    plots = {
        "work": work_figure(contents),
        "sent": sent_figure(contents),
        "schemes": schemes_figure(contents),
        "buckets": buckets_figure(contents),
    }
    mesh = {axis: size for axis, size in contents["mesh"].items() if axis != "world_size"}
    return web_page.render_page(
        "normuon_lab.plan",
        "plan.html.j2",
        plots=plots,
        filters={
            "num_bytes": format_bytes,
            "flops": plan_text.format_flops,
            "seconds": plan_text.format_seconds,
            "ratio": plan_text.format_ratio,
            "owners": plan_text.owners_text,
        },
        contents=contents,
        verdict=plan_text.verdict(contents),
        mesh=mesh,
        rows=plan_text.scheme_rows(contents),
        colors={name: one.color for name, one in plan_text.SCHEMES.items()},
        imbalance_sentence=plan_text.imbalance_sentence(contents),
        bytes_ratio=plan_text.bytes_ratio(contents),
        extra_bytes=contents["bytes_sent_total"] - contents["bytes_least_total"],
        largest_kind=max(contents["kinds"], key=lambda kind: kind["flops_each"]),
        num_divided=sum(k["num_matrices"] for k in contents["kinds"] if k["team_size"] > 1),
        num_idle=sum(flops == 0 for flops in contents["flops_by_rank"]),
        command=command,
    )


def work_figure(contents: Mapping[str, Any]) -> go.Figure:
    """What every rank orthogonalises under the plan, round-robin and padding, with the bound."""
    left_out = ("replicate", "all_reduce")
    schemes = {k: one for k, one in plan_text.schemes_of(contents).items() if k not in left_out}
    most = max(*contents["flops_by_rank"], *schemes["round_robin"]["flops_by_rank"])
    unit, size = ("TFLOP", 1e12) if most >= 1e12 else ("GFLOP", 1e9)
    figure = _figure_by_rank(schemes, "flops_by_rank", unit=unit, size=size, height=400)
    bound = contents["makespan_bound"] / size
    figure.add_hline(
        y=bound,
        line={"color": WARNING, "dash": "dot", "width": 1.5},
        annotation_text=f"least for whole matrices: {bound:.4g} {unit}",
        annotation_position="top right",
        annotation_font={"color": WARNING, "size": 12},
        annotation_bgcolor="rgba(255, 255, 255, 0.85)",
    )
    figure.update_yaxes(
        title_text=f"{unit} to orthogonalise, per step", range=[0, 1.15 * most / size]
    )
    return figure


def sent_figure(contents: Mapping[str, Any]) -> go.Figure:
    """Bytes that every rank sends under the plan and under round-robin."""
    schemes = {"plan": contents, "round_robin": contents["alternatives"]["round_robin"]}
    busiest = max(scheme["bytes_sent_busiest"] for scheme in schemes.values())
    unit, size = ("GB", 1e9) if busiest >= 1e9 else ("MB", 1e6)
    figure = _figure_by_rank(schemes, "bytes_sent_by_rank", unit=unit, size=size, height=340)
    figure.update_yaxes(title_text=f"{unit} sent per step", rangemode="tozero")
    return figure


def schemes_figure(contents: Mapping[str, Any]) -> go.Figure:
    """Busiest rank, bytes over the minimum and predicted seconds of every way, on logarithmic
    axes."""
    least, schemes = contents["bytes_least_total"], plan_text.schemes_of(contents)
    panels = {
        "busiest rank / mean": lambda scheme: scheme["busiest_over_mean"],
        "bytes sent / least": lambda scheme: scheme["bytes_sent_total"] / least if least else None,
        "predicted seconds of a step": lambda scheme: scheme["predicted_step_seconds"],
    }
    figure = make_subplots(
        rows=1,
        cols=len(panels),
        shared_yaxes=True,
        horizontal_spacing=0.05,
        subplot_titles=list(panels),
    )
    stack_when_narrow(figure, list(panels), height=210)
    for column, value_of in enumerate(panels.values(), start=1):
        values = [value_of(scheme) for scheme in schemes.values()]
        figure.add_trace(
            go.Bar(
                y=[_wrapped(plan_text.SCHEMES[name].label) for name in schemes],
                x=values,
                orientation="h",
                marker={"color": [plan_text.SCHEMES[name].color for name in schemes]},
                text=[
                    "-"
                    if value is None
                    else plan_text.format_seconds(value)
                    if column == 3
                    else plan_text.format_ratio(value)
                    for value in values
                ],
                textposition="outside",
                cliponaxis=False,
                hoverinfo="skip",
                showlegend=False,
            ),
            row=1,
            col=column,
        )
        figure.update_xaxes(type="log", range=_log_range(values, column), row=1, col=column)
    apply_style(figure, height=320)
    figure.update_annotations(font={"size": 13})
    figure.update_layout(margin={"l": 170, "t": 72, "b": 24}, bargap=0.35)
    figure.update_xaxes(showticklabels=False, ticks="", showgrid=False, showline=False)
    figure.update_yaxes(autorange="reversed", ticks="", showline=False)
    return figure


def buckets_figure(contents: Mapping[str, Any]) -> go.Figure:
    """What each bucket takes on its busiest rank: gather, compute, return.

    Matrices without exchange come before bucket 0.
    """
    figure = go.Figure()
    buckets = contents["buckets"]
    first = contents["num_buckets"] - len(buckets)
    numbers = list(range(first, contents["num_buckets"]))
    labels = [f"bucket {number}" if number >= 0 else "no exchange" for number in numbers]
    stages = (
        ("gather_seconds", "gather to owners", "#56B4E9"),
        ("compute_seconds", "orthogonalise", plan_text.SCHEMES["plan"].color),
        ("team_seconds", "exchange within teams", "#E69F00"),
        ("return_seconds", "return to shards", "#0072B2"),
    )
    for key, label, color in stages:
        if key == "team_seconds" and not any(bucket[key] for bucket in buckets):
            continue
        figure.add_trace(
            go.Bar(
                x=numbers,
                y=[1e3 * bucket[key] for bucket in buckets],
                name=label,
                marker={"color": color},
                customdata=[
                    (name, bucket["num_matrices"])
                    for name, bucket in zip(labels, buckets, strict=True)
                ],
                hovertemplate="%{customdata[0]}, %{customdata[1]} matrices: "
                f"{label} %{{y:.3g}} ms"
                "<extra></extra>",
            )
        )
    apply_style(figure, height=340)
    figure.update_layout(barmode="group", bargap=0.25 if len(buckets) > 3 else 0.6)
    few = len(buckets) <= 30
    figure.update_xaxes(
        title_text="bucket, in the order of the step",
        showgrid=False,
        tickvals=numbers if few else None,
        ticktext=[label.removeprefix("bucket ") for label in labels] if few else None,
        range=[first - 0.6, contents["num_buckets"] - 0.4],
    )
    figure.update_yaxes(title_text="ms on the busiest rank", rangemode="tozero")
    return figure


def _figure_by_rank(
    schemes: Mapping[str, Mapping[str, Any]], key: str, *, unit: str, size: float, height: int
) -> go.Figure:
    """One value of every rank, in units of `size`, under each scheme: bars, or lines of many."""
    figure = go.Figure()
    for name, scheme in schemes.items():
        (label, _, color), is_plan = plan_text.SCHEMES[name], name == "plan"
        values = [value / size for value in scheme[key]]
        common = {
            "x": list(range(len(values))),
            "y": values,
            "name": label,
            # Its scale would flatten the others.
            "visible": "legendonly" if name == "padding" else True,
            "hovertemplate": f"rank %{{x}}: %{{y:.4g}} {unit}<extra>{label}</extra>",
        }
        if len(values) <= _MAX_BARS:
            figure.add_trace(go.Bar(marker={"color": color}, **common))
        else:
            figure.add_trace(
                go.Scatter(
                    mode="lines",
                    line={"color": color, "width": 1.5 if is_plan else 1.2, "shape": "hvh"},
                    fill="tozeroy" if is_plan else None,
                    fillcolor="rgba(0, 158, 115, 0.18)",
                    **common,
                )
            )
    apply_style(figure, height=height)
    figure.update_xaxes(
        title_text="rank",
        showgrid=False,
        range=[-0.6, len(values) - 0.4],
        dtick=1 if len(values) <= 16 else None,
        tickformat=",d",
    )
    return figure


def _log_range(values: Sequence[float | None], column: int) -> list[float]:
    """From a little below the shortest bar to where the longest one's number still fits."""
    shown = [math.log10(value) for value in values if value]
    # Ratios start at 1 or just below the least, so that a bar's length is what exceeds it.
    low = min([0.0, *shown]) - 0.04 if column < 3 else min(shown) - 0.4
    high = max([*shown, low + 0.5])
    return [low, high + 0.35 * (high - low)]


def _wrapped(label: str) -> str:
    words = label.split(" ")
    half = (len(words) + 1) // 2
    return label if len(label) < 20 else " ".join(words[:half]) + "<br>" + " ".join(words[half:])
