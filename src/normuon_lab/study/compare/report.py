"""What a comparison found: in the terminal, and as a page."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from normuon_lab.plot_style import color_of, label_of
from normuon_lab.study.compare.results import Results
from normuon_lab.study.statistics.curves import METHOD, Comparison
from normuon_lab.study.statistics.estimates import Estimate, t_interval
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.web_page import render_page


def summary_rows(results: Results) -> dict[str, tuple[str, ...]]:
    """By arm, in words: its label, seeds, learning rate and final loss, that loss minus the
    reference arm's, and the steps saved."""
    reference = results.reference_arm
    comparisons = {c.arm: c for c in results.comparisons() if c.baseline == reference}
    rows: dict[str, tuple[str, ...]] = {}
    for arm in results.arms:
        finals = [r.final_loss for r in results.of_arm(arm) if r.final_loss is not None]
        diverged = sum(record.arm == arm and record.diverged for record in results.records)
        final = "diverged" if diverged else "not run"
        if finals:
            final = f"{t_interval(finals).mean:.4f}" + (
                f" ({diverged} diverged)" if diverged else ""
            )
        differences = ("baseline", "baseline")
        if arm in comparisons:
            differences = (loss_text(comparisons[arm]), fewer_steps_text(comparisons[arm]))
        rate = f"{results.learning_rates[arm]['value']:.4g}"
        rows[arm] = (label_of(arm), str(len(finals)), rate, final, *differences)
    return rows


def standing(estimate: Estimate, *, digits: int, less_is_better: bool = False) -> str:
    """The sign that an interval shows: "better", "worse", or "too close to call".

    Too close to call is an interval that touches zero as it is printed, with so many digits, or a
    mean that has no interval.
    """
    if estimate.low is None or estimate.high is None:
        return "too close to call"
    low, high = round(estimate.low, digits), round(estimate.high, digits)
    if low <= 0 <= high:
        return "too close to call"
    return "worse" if (low > 0) == less_is_better else "better"


def verdict(results: Results) -> str:
    """The outcome in one sentence: NorMuon, or else the last arm, against all others."""
    others = [arm for arm in results.arms if arm != results.reference_arm]
    found = {(c.arm, c.baseline): c for c in results.comparisons()}
    if not others or not any(comparison.seeds for comparison in found.values()):
        return "No seed is finished with two optimizers yet."
    arm = "normuon" if "normuon" in others else others[-1]
    sentence = _steps_sentence(found[arm, results.reference_arm])
    signs = {"better": "lower", "worse": "higher"}
    for other in others:
        comparison = found.get((arm, other))
        if comparison is not None and comparison.seeds:
            outcome = standing(comparison.loss_difference, digits=4, less_is_better=True)
            sign = signs.get(outcome, outcome)
            loss = loss_text(comparison)
            sentence += f"; its final loss against {label_of(other)}'s is {sign}: {loss}"
    return sentence + "."


def _steps_sentence(comparison: Comparison) -> str:
    arm, reference = label_of(comparison.arm), label_of(comparison.baseline)
    saved, num_seeds = comparison.fewer_steps_percent, len(comparison.seeds)
    if not num_seeds:
        return f"{arm} and {reference} have no finished seed in common yet"
    if missed := len(comparison.seeds_not_reached):
        return f"{arm} did not reach {reference}'s final loss on {missed} of {num_seeds} seeds"
    if saved.mean is None:
        return f"{arm}: {fewer_steps_text(comparison)}, {reference}'s final loss"
    if saved.low is None or saved.high is None:
        return (
            f"On one seed {arm} reached {reference}'s final loss in {saved.mean:.1f}% fewer steps"
        )
    interval = f"95% Student's t interval {saved.low:.1f} to {saved.high:.1f}, {num_seeds} seeds"
    if standing(saved, digits=1) == "too close to call":
        return (
            f"Whether {arm} reaches {reference}'s final loss in fewer steps is too close to call "
            f"({saved.mean:.1f}%, {interval})"
        )
    more = "fewer" if saved.mean > 0 else "more"
    return (
        f"{arm} reached {reference}'s final loss in {abs(saved.mean):.1f}% {more} steps "
        f"({interval})"
    )


def estimate_text(estimate: Estimate, *, digits: int, unit: str = "", signed: bool = False) -> str:
    """A mean with its interval, such as `12.3% [10.1, 14.5]`."""
    if estimate.mean is None:
        return "none"
    sign = "+" if signed else ""
    text = f"{estimate.mean:{sign}.{digits}f}{unit}"
    if estimate.low is None or estimate.high is None:
        return f"{text} (one seed: no interval)"
    return f"{text} [{estimate.low:{sign}.{digits}f}, {estimate.high:{sign}.{digits}f}]"


def loss_text(comparison: Comparison) -> str:
    """The difference of final losses with its interval."""
    return estimate_text(comparison.loss_difference, digits=4, signed=True)


def fewer_steps_text(comparison: Comparison) -> str:
    """The training efficiency with its interval, or why there is none."""
    if comparison.seeds_not_reached:
        return (
            f"target not reached by {len(comparison.seeds_not_reached)} "
            f"of {len(comparison.seeds)} seeds"
        )
    return estimate_text(comparison.fewer_steps_percent, digits=1, unit="%")


def points_text(points: Estimate) -> str:
    """A difference of two efficiencies in percentage points, with its interval."""
    return estimate_text(points, digits=1, unit=" points", signed=True)


def say(console: Console, line: str, *, style: str | None = None) -> None:
    """Print a line as it is: unbroken, and without colours for its numbers."""
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def print_summary(results: Results, console: Console) -> None:
    """Print the table and what its last column means."""
    reference = label_of(results.reference_arm)
    table = Table(title=f"Final validation loss and steps to {reference}'s, 95% intervals")
    table.add_column("arm")
    for title in ("seeds", "learning rate", "final loss", f"minus {reference}", "fewer steps"):
        table.add_column(title, justify="right")
    for row in summary_rows(results).values():
        table.add_row(*row)
    console.print(table)
    losses = {(c.arm, c.baseline): loss_text(c) for c in results.comparisons()}
    for found in results.points():
        points = f"{points_text(found.points)} of steps saved on {reference}"
        if found.points.mean is None:
            points = f"steps not compared: a seed did not reach {reference}'s loss"
        pair = f"{label_of(found.arm)} against {label_of(found.baseline)}"
        say(console, f"{pair}: loss {losses[found.arm, found.baseline]}, {points}")
    say(
        console,
        "Conservative: read from curves whose learning rate has not decayed at the crossing. "
        "Intervals: Student's t over paired seeds.",
        style="dim",
    )


def render_report(results: Results) -> str:
    """One self-contained HTML page: no file beside it, no network.

    Works for partial results too, and says so.
    """
    # Plotly takes a second to import, which an error in the request should not wait for.
    from normuon_lab.study.compare import figures

    return render_page(
        "normuon_lab.study.compare",
        "report.html.j2",
        plots={
            "loss-steps": figures.loss_figure(results, against="steps"),
            "loss-seconds": figures.loss_figure(results, against="seconds"),
            "final-loss": figures.final_loss_figure(results),
            "tuning": figures.tuning_figure(results),
            "singular-values": figures.update_figure(results, "singular_values"),
            "row-norms": figures.update_figure(results, "row_norms"),
        },
        filters={
            "label": label_of,
            "color": color_of,
            "standing": partial(standing, digits=1),
            "loss_text": loss_text,
            "fewer_steps_text": fewer_steps_text,
            "points_text": points_text,
        },
        results=results,
        verdict=verdict(results),
        rows=summary_rows(results),
        comparisons=results.comparisons(),
        points={(found.arm, found.baseline): found.points for found in results.points()},
        method=METHOD,
        descriptions={name: arm.description for name, arm in ARMS.items()},
        settings=_flattened({k: results.config[k] for k in ("model", "training")}),
        machine=_flattened(results.machine),
    )


def _flattened(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flattened(value))
        else:
            flat[key.replace("_", " ")] = value
    return flat
