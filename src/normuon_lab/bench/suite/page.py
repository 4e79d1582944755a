"""gpu.json as one page of HTML: no file beside it, no script, no network.

The layout and the sentences are in templates/gpu.html.j2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from normuon.distributed.cost import format_bytes
from normuon_lab import web_page
from normuon_lab.atomic_files import write_text
from normuon_lab.bench.suite.verdict import device_name, entries_of, verdict

NONE = "-"
CHART_WIDTH, CHART_HEIGHT = 640, 260
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 52, 12, 12, 34
TICKS = 4
LONGEST_BAR = 4.0
"""In steps of the reference; longer bars are cut."""


def write_page(path: Path, record: Mapping[str, Any]) -> None:
    """Writes the page to `path`.

    Args:
        path: the file.
        record: what gpu.json holds.
    """
    write_text(path, render_page(record))


def render_page(record: Mapping[str, Any]) -> str:
    """The page as text; a record may lack anything that its parts have not reached yet."""
    parts = record["parts"]
    values = {name: part["values"] for name, part in parts.items()}
    return web_page.render_page(
        "normuon_lab.bench.suite",
        "gpu.html.j2",
        # A record lacks what its parts have not reached yet.
        undefined=jinja2.Undefined,
        filters={
            "num": number,
            "num_bytes": lambda value: NONE if value is None else format_bytes(value),
            "percent": lambda value: NONE if value is None else f"{100 * value:.0f}%",
            "rate": lambda value: NONE if value is None else f"{1e-12 * value:.4g}",
            "bar": bar_percent,
        },
        record=record,
        parts=parts,
        values=values,
        device=device_name(record),
        verdict=verdict(record),
        entries_of=entries_of,
        not_run_of=not_run_of,
        chart=loss_chart(values["comparison"].get("arms", ())),
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, without an exponent.

    Example:
        >>> number(1234.5), number(0.01234), number(12.345), number(None)
        ('1,234', '0.0123', '12.3', '-')
    """
    if value is None:
        return NONE
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:#.{digits}g}".rstrip(".")


def bar_percent(ratio: float) -> float:
    """How much of its cell a bar fills."""
    return 100 * min(ratio, LONGEST_BAR) / LONGEST_BAR


def not_run_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Who did not run on a model, and why."""
    found: dict[str, str] = {}
    for race in model["races"]:
        found.update(race["not_run"])
    return found


def loss_chart(arms: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Held-out losses as lines of an SVG; None without two points of each arm."""
    curves = [
        [(one["step"], one["held_out_loss"]) for one in arm["curve"] if one["held_out_loss"]]
        for arm in arms
    ]
    if not curves or min(map(len, curves)) < 2:
        return None
    losses = [loss for curve in curves for _, loss in curve]
    low, high = min(losses), max(losses)
    spread = (high - low) or 1.0
    last = max(step for curve in curves for step, _ in curve)

    def across(step: float) -> float:
        return MARGIN_LEFT + (CHART_WIDTH - MARGIN_LEFT - MARGIN_RIGHT) * step / last

    def down(loss: float) -> float:
        height = CHART_HEIGHT - MARGIN_TOP - MARGIN_BOTTOM
        return MARGIN_TOP + height * (high - loss) / spread

    return {
        "width": CHART_WIDTH,
        "height": CHART_HEIGHT,
        "left": MARGIN_LEFT,
        "right": CHART_WIDTH - MARGIN_RIGHT,
        "bottom": CHART_HEIGHT - MARGIN_BOTTOM,
        "lines": [
            {
                "name": arm["name"],
                "points": " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in curve),
            }
            for arm, curve in zip(arms, curves, strict=True)
        ],
        "y_ticks": [
            {"at": down(low + spread * tick / TICKS), "text": f"{low + spread * tick / TICKS:.2f}"}
            for tick in range(TICKS + 1)
        ],
        "x_ticks": [
            {"at": across(last * tick / TICKS), "text": f"{last * tick / TICKS:.0f}"}
            for tick in range(TICKS + 1)
        ],
    }
