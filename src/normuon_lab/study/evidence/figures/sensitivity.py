"""How much depends on NorMuon's hyperparameters besides the tuned ones, varied one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from normuon_lab.matplotlib_style import style_axes
from normuon_lab.plot_style import INK, MUTED, color_of
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.figures.bands import new_figure
from normuon_lab.study.statistics import Estimate, t_interval

DEFAULTS: Mapping[str, Any] = {
    "beta2": 0.95,
    "ns_steps": 5,
    "nesterov": True,
    "ns_coefficients": "jordan",
    "eps": 1e-8,
    "neuron_axis": "row",
    "cautious_weight_decay": False,
    "momentum_dtype": "float32",
}
"""What the claim runs had. Written down, since the library's defaults may move on this evidence."""


def sensitivity_figure(found: CellEvidence) -> Figure | None:
    """NorMuon's final loss minus that of its defaults, seed by seed, a panel per hyperparameter."""
    changes = sensitivity(found)
    if not changes:
        return None
    names = [name for name in DEFAULTS if name in changes]
    names += [name for name in changes if name not in names]
    counts = [len(changes[name]) + 1 for name in names]
    rows = [names[:2], names[2:]] if len(names) > 2 else [names]
    figure = new_figure(10.0, 3.4 * len(rows) + 0.4)
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, shown in zip(parts, rows, strict=True):
        widths = [counts[names.index(name)] + 0.6 for name in shown]
        # Few Newton-Schulz steps cost a hundred times what any beta2 does.
        sharey = shown is not rows[0]
        row = part.subplots(1, len(shown), squeeze=False, sharey=sharey, width_ratios=widths)[0]
        for axes, name in zip(row, shown, strict=True):
            _draw_changes(axes, name, changes[name])
            style_axes(axes, grid_axis="y")
        row[0].set_ylabel("final loss minus the defaults'\n(nats per token)", color=INK)
    figure.suptitle(f"NorMuon with one hyperparameter changed: {found.title}", color=INK)
    return figure


def sensitivity(found: CellEvidence) -> dict[str, dict[Any, Estimate | None]]:
    """By hyperparameter and value, the paired difference of final loss to the claim runs.

    None where one of the runs diverged; values in the order of the numbers, or of the files.
    """
    reference = {run.seed: run.final_loss for run in found.full_runs("normuon")}
    losses: dict[str, dict[Any, dict[int, float | None]]] = {}
    for run in found.sensitivity:
        assert run.varied is not None
        name, value = run.varied
        by_seed = losses.setdefault(name, {}).setdefault(value, {})
        by_seed[run.record.seed] = run.record.final_loss
    changes: dict[str, dict[Any, Estimate | None]] = {}
    for name, by_value in losses.items():
        for value in sorted(by_value, key=lambda v: (isinstance(v, str), v)):
            pairs = [
                (loss, reference[seed])
                for seed, loss in sorted(by_value[value].items())
                if seed in reference
            ]
            if pairs:
                changes.setdefault(name, {})[value] = _difference(pairs)
    return changes


def _difference(pairs: Sequence[tuple[float | None, float | None]]) -> Estimate | None:
    differences = [
        ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None
    ]
    return t_interval(differences) if len(differences) == len(pairs) else None


def _draw_changes(axes: Axes, name: str, changes: Mapping[Any, Estimate | None]) -> None:
    default = DEFAULTS.get(name)
    values = [*changes] if default is None else [*changes, default]
    values.sort(key=lambda v: (isinstance(v, str), v))
    for place, value in enumerate(values):
        if value == default:
            axes.scatter([place], [0.0], s=64, color="white", edgecolors=INK, zorder=3)
            continue
        estimate = changes[value]
        if estimate is None or estimate.mean is None:
            label = axes.annotate("diverged", (place, 0.0), rotation=90, ha="center", va="bottom")
            label.set_color(MUTED)
            continue
        if estimate.low is not None and estimate.high is not None:
            ends = [estimate.low, estimate.high]
            axes.plot([place] * 2, ends, color=color_of("normuon"), linewidth=2)
        axes.plot([place], [estimate.mean], color=color_of("normuon"), marker="D", markersize=6)
    axes.axhline(0, color=MUTED, linewidth=1)
    axes.set_xticks(range(len(values)), [_written(value) for value in values])
    axes.set_xlim(-0.6, len(values) - 0.4)
    # Long names break, so that they fit below a panel of two values.
    axes.set_xlabel(name.replace("_weight", "\n_weight"), color=INK)


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    return f"{value:g}" if isinstance(value, int | float) else str(value).replace("_", "\n")
