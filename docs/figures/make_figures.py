"""Draws the figures of the documentation as SVG files beside this script.

$ python docs/figures/make_figures.py
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from normuon import NorMuon, param_groups
from normuon.integrations.loggers import log_statistics
from normuon_lab.plot_style import GRID, INK, MUTED, color_of

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "compare_default.json"

LABELS = {"adamw": "AdamW", "muon": "Muon", "normuon": "NorMuon"}
COLORS = {arm: color_of(arm) for arm in LABELS}

plt.rcParams.update(
    {
        "svg.hashsalt": "normuon",  # The same file from the same figure.
        "svg.fonttype": "path",  # Readers' fonts have other widths.
        "font.family": "sans-serif",
        "font.size": 11,
        "text.color": INK,
        "axes.edgecolor": "#9aa5b1",
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": GRID,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
    }
)


def save(figure: Figure, name: str) -> None:
    figure.savefig(HERE / name, bbox_inches="tight", facecolor="white", metadata={"Date": None})
    plt.close(figure)


def draw_losses() -> None:
    """The default comparison: every seed's validation curve, and the mean of each arm."""
    runs = json.loads(RESULTS.read_text())["runs"]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    for arm, color in COLORS.items():
        curves = [run for run in runs if run["arm"] == arm]
        for run in curves:
            axes.plot(run["eval_steps"], run["eval_losses"], color=color, alpha=0.25, linewidth=0.8)
        mean = np.mean([run["eval_losses"] for run in curves], axis=0)
        steps = curves[0]["eval_steps"]
        axes.plot(steps, mean, color=color, linewidth=2, label=f"{LABELS[arm]}  {mean[-1]:.3f}")
    axes.set(xlabel="step", ylabel="validation loss", ylim=(1.5, 3.6))
    axes.legend(frameon=False, title="loss after 500 steps, 4 seeds", alignment="left")
    save(figure, "losses.svg")


def row_norms(algorithm: str) -> torch.Tensor:
    """Norms of the rows of the tenth step on a tall matrix whose gradient has rows of all sizes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(512, 128))
    group = {"params": [weight], "algorithm": algorithm}
    optimizer = NorMuon([group], lr=1e-3, weight_decay=0.0, ns_dtype=torch.float32)
    sizes = torch.logspace(-2, 0, 512)[:, None]
    for _ in range(10):
        before = weight.detach().clone()
        weight.grad = sizes * torch.randn(512, 128, generator=generator)
        optimizer.step()
    step = before - weight.detach()
    return step.norm(dim=1) / step.norm() * len(step) ** 0.5


def draw_row_norms() -> None:
    """What the one scale per neuron is for."""
    figure, axes = plt.subplots(figsize=(7, 3.2))
    for algorithm in ("muon", "normuon"):
        norms = row_norms(algorithm)
        axes.plot(norms, color=COLORS[algorithm], linewidth=1.2, label=LABELS[algorithm])
    axes.set(
        xlabel="neuron (row), from the smallest gradient to the largest",
        ylabel="norm of its step\n(1: the root mean square)",
        ylim=(0, None),
    )
    axes.legend(frameon=False)
    save(figure, "row_norms.svg")


def tutorials_figures() -> dict[str, list[float]]:
    """The statistics of every step of the tutorial's training, by name: its own code is run."""
    page = (HERE.parent / "tutorial.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    code: dict[str, Any] = {}
    for block in blocks[: next(n for n, b in enumerate(blocks) if "def train" in b) + 1]:
        exec(block.partition("optimizer = NorMuon")[0], code)
    model = code["model"]
    optimizer = NorMuon(param_groups(model), lr=2e-3)
    found: dict[str, list[float]] = defaultdict(list)

    def keep(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            found[name].append(value)

    log_statistics(optimizer, keep, every=1, prefix="")
    code["train"](model, optimizer, 0, 100)
    return found


def draw_statistics() -> None:
    """What the steps of the tutorial did."""
    found = tutorials_figures()
    figure, panels = plt.subplots(1, 3, figsize=(9.5, 2.9), layout="constrained")
    lines = {
        "RMS of the update over the weights'": [
            ("group1.adamw/update_to_weight", "AdamW's group", COLORS["adamw"]),
            ("group0.normuon/update_to_weight", "hidden matrices", COLORS["normuon"]),
        ],
        "spread of row norms": [
            ("group0.normuon/momentum_row_spread", "momentum", MUTED),
            ("group0.normuon/update_row_spread", "update", COLORS["normuon"]),
        ],
        "effective rank over full rank": [
            ("group0.normuon/effective_rank_share", "", COLORS["normuon"]),
        ],
    }
    for axes, (title, of_panel) in zip(panels, lines.items(), strict=True):
        for name, label, color in of_panel:
            axes.plot(range(1, 101), found[name], color=color, linewidth=1.6, label=label)
        axes.set(xlabel="step", ylim=(0, None))
        axes.set_title(title, fontsize=10.5, color=INK)
        if len(of_panel) > 1:
            axes.legend(frameon=False, fontsize=9.5)
    save(figure, "statistics.svg")


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor="white", lw=2))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", color="white")


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    axes.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=MUTED, lw=1.2)
    )


def draw_owner() -> None:
    """One matrix, sharded by rows over four ranks: to its owner and back."""
    figure, axes = plt.subplots(figsize=(9, 3.2))
    colors = ["#0072B2", "#D55E00", "#00796B", "#8E4585"]
    for rank, color in enumerate(colors):
        y = 3 - rank
        box(axes, 0, y, 2.4, 0.9, f"rank {rank}: rows of M", color)
        box(axes, 8, y, 2.4, 0.9, f"rank {rank}: rows of W", color)
        arrow(axes, (2.4, y + 0.45), (4, 1.2 + 0.55 * (3 - rank)))
        arrow(axes, (6.4, 1.2 + 0.55 * (3 - rank)), (8, y + 0.45))
    box(axes, 4, 0.9, 2.4, 2.1, "rank 2, the owner:\nO = NS(M)\nv, one scale", colors[2])
    axes.text(3.2, 4.1, "gather: M, v, flag", ha="center", color=MUTED)
    axes.text(7.2, 4.1, "return: O, v, scale", ha="center", color=MUTED)
    axes.set(xlim=(-0.1, 10.5), ylim=(-0.1, 4.4))
    axes.axis("off")
    save(figure, "owner.svg")


if __name__ == "__main__":
    draw_losses()
    draw_row_norms()
    draw_statistics()
    draw_owner()
