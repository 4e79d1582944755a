"""gpu.json as one page of HTML and in a few sentences: no file beside it, no script, no network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2

from normuon.distributed.cost import format_bytes
from normuon_lab import web_page
from normuon_lab.bench.suite.options import CUT, FAILED, NOT_RUN, RUNNING, WAITING
from normuon_lab.errors import significant

OWN = "NorMuon"
ADAMW = "AdamW"
PREFERRED_MODEL = "llama-1.1b"
NONE = "-"
CHART_WIDTH, CHART_HEIGHT = 640, 260
MARGIN_LEFT, MARGIN_RIGHT, MARGIN_TOP, MARGIN_BOTTOM = 52, 12, 12, 34
TICKS = 4
LONGEST_BAR = 4.0
"""In steps of the reference; longer bars are cut."""


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
            "rate": lambda value: NONE if value is None else significant(1e-12 * value, 4),
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
    """The contenders that did not run on a model, and why."""
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


def verdict(record: Mapping[str, Any]) -> list[str]:
    """Sentences, the most important one first."""
    parts = {name: part["values"] for name, part in record["parts"].items()}
    sentences = []
    if record["dry_run"]:
        sentences.append(
            "Dry run on a CPU with tiny sizes: it shows which parts work, and no number here says "
            "anything about a GPU."
        )
    clauses = [
        *_step_clauses(parts["step"]),
        *_training_clauses(parts["training"]),
        *_tests_clauses(parts["tests"]),
    ]
    name = device_name(record)
    if clauses:
        sentences.append(f"On {name}, {'; '.join(clauses)}.")
    else:
        sentences.append(f"On {name}, nothing has been measured yet.")
    sentences.extend(_unfinished(record))
    return sentences


def device_name(record: Mapping[str, Any]) -> str:
    """The device as sentences name it."""
    if record["dry_run"]:
        return "this CPU"
    return str(record["parts"]["machine"]["values"].get("name", "this GPU"))


def entries_of(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All contenders that ran on a model; the reference of later races is left out."""
    first, *later = [race["contenders"] for race in model["races"] if race["contenders"]] or [[]]
    return [*first, *(one for contenders in later for one in contenders[1:])]


def _step_clauses(values: Mapping[str, Any]) -> Iterator[str]:
    measured = [model for model in values.get("models", ()) if entries_of(model)]
    if not measured:
        return
    model = next((one for one in measured if one["title"] == PREFERRED_MODEL), measured[0])
    first, *others = entries_of(model)
    median = significant(first["median_ms"], 3)
    yield f"one {first['name']} step of {model['title']} takes {median} ms"
    peers = [one for one in others if not one["name"].startswith((OWN, ADAMW))]
    if peers:
        fastest = min(peers, key=lambda one: one["ratio_to_first"])
        ratio = fastest["ratio_to_first"]
        yield f"the fastest peer, {fastest['name']}, takes {ratio:.2f} times that"
    for one in others:
        if one["name"].startswith(ADAMW):
            yield f"{one['name']} takes {one['ratio_to_first']:.2f} times that"


def _training_clauses(values: Mapping[str, Any]) -> Iterator[str]:
    if "overhead_percent" not in values:
        return
    percent = values["overhead_percent"]
    longer = "longer" if percent >= 0 else "shorter"
    yield (
        f"a training step of {values['parameters'] / 1e6:.3g}M parameters and "
        f"{values['tokens_per_step']:,} tokens takes {abs(percent):.1f}% {longer} than with AdamW"
    )


def _tests_clauses(values: Mapping[str, Any]) -> Iterator[str]:
    counts = values.get("counts")
    if not counts:
        return
    failed = counts.get("failed", 0) + counts.get("error", 0)
    passed = counts.get("passed", 0)
    skipped = counts.get("skipped", 0)
    yield (
        f"of {sum(counts.values())} tests, {passed} passed, {failed} failed and {skipped} were "
        "skipped"
    )


def _unfinished(record: Mapping[str, Any]) -> Iterator[str]:
    states = {name: part["status"] for name, part in record["parts"].items()}
    if record["finished"] is None:
        waiting = [name for name, state in states.items() if state in (WAITING, RUNNING)]
        if waiting:
            yield f"The run is not over, or was ended before {' and '.join(waiting)}."
    for state, words in ((FAILED, "failed"), (CUT, "ran out of time"), (NOT_RUN, "did not run")):
        names = [name for name, one in states.items() if one == state]
        if names:
            yield f"{', '.join(names)[:1].upper()}{', '.join(names)[1:]} {words}."
