"""The best learning rates of AdamW and NorMuon, side by side on six small tasks.

    python benchmarks/learning_rates.py

writes benchmarks/results/learning_rates.json and the table of docs/how-to/learning-rate.md. Every
rate of a grid is run with every seed; the best is the one with the lowest mean loss on held-out
data. Both optimizers have one rate for the whole model and the same schedule, decay and betas.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from learning_rate_tasks import BATCH, STEPS, TASKS, run
from torch import nn

from normuon import NorMuon, param_groups

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "learning_rates.json"
PAGE = ROOT / "docs" / "how-to" / "learning-rate.md"
START, END = "<!-- table: learning_rates.py -->\n", "<!-- end of table -->\n"

GRIDS = {
    "AdamW": [2.0**k * 1e-3 for k in range(6)],
    "NorMuon": [2.0**k * 1e-3 for k in range(1, 7)],
}
SEEDS = (0, 1)
DECAY, BETAS = 0.1, (0.9, 0.95)


def optimizer_of(name: str, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Either, with decay on hidden matrices alone."""
    groups = param_groups(model)
    if name == "NorMuon":
        return NorMuon(groups, lr=lr, weight_decay=DECAY, betas=BETAS)
    plain = [
        {"params": [p for _, p in g["params"]], "weight_decay": g.get("weight_decay", DECAY)}
        for g in groups
    ]
    return torch.optim.AdamW(plain, lr=lr, betas=BETAS)


def one(job: tuple[str, str, float, int]) -> float:
    """One run's loss on held-out data."""
    task, name, lr, seed = job
    torch.set_num_threads(1)
    return run(TASKS[task](), lambda model: optimizer_of(name, model, lr), seed)


def measure(processes: int, known: dict[str, Any]) -> dict[str, Any]:
    """Every run, by task, optimizer, rate and seed; those of `known` rates are kept."""
    losses: dict[str, Any] = known or {task: {name: {} for name in GRIDS} for task in TASKS}
    jobs = [
        (task, name, lr, seed)
        for task in TASKS
        for name, grid in GRIDS.items()
        for lr in grid
        for seed in SEEDS
        if f"{lr:g}" not in losses[task][name]
    ]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for (task, name, lr, _), loss in zip(jobs, pool.map(one, jobs), strict=True):
            losses[task][name].setdefault(f"{lr:g}", []).append(loss)
            print(f"{task}: {name} {lr:g}: {loss:.4f}", flush=True)
    return {
        "command": "python benchmarks/learning_rates.py",
        "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
        "steps": STEPS,
        "batch": BATCH,
        "seeds": list(SEEDS),
        "losses": losses,
    }


def mean_losses(by_rate: dict[str, list[float]]) -> dict[float, float]:
    """Mean over seeds, by rate."""
    return {float(rate): sum(found) / len(found) for rate, found in by_rate.items()}


def table(contents: dict[str, Any]) -> str:
    """The page's table, and the geometric mean of the ratios."""
    lines = [
        "| task | AdamW's best lr | its loss | NorMuon's best lr | its loss | ratio of the rates "
        "| NorMuon at AdamW's best lr |",
        "|---|---|---|---|---|---|---|",
    ]
    ratios = []
    for task, by_name in contents["losses"].items():
        adamw, ours = (mean_losses(by_name[name]) for name in GRIDS)
        best = [min(found, key=found.__getitem__) for found in (adamw, ours)]
        ratios.append(best[1] / best[0])
        edges = [max(found) == rate for found, rate in zip((adamw, ours), best, strict=True)]
        rates = [
            f"{rate:g}" + (" (edge)" if edge else "")
            for rate, edge in zip(best, edges, strict=True)
        ]
        lines.append(
            f"| {task} | {rates[0]} | {adamw[best[0]]:.3f} | {rates[1]} | {ours[best[1]]:.3f} | "
            f"{ratios[-1]:g} | {ours[best[0]]:.3f} |"
        )
    middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
    said = (
        f"Geometric mean of the ratios: {middle:.1f} ({min(ratios):g} to {max(ratios):g}). Each "
        f"task trains for {contents['steps']} steps of {contents['batch']} samples, with "
        f"{len(contents['seeds'])} seeds, rates a factor of 2 apart; losses are cross-entropies on "
        "held-out data."
    )
    return "\n".join([*lines, "", said]) + "\n"


def page_with(text: str, page: str) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(START)
    return before + START + "\n" + text + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--more", action="store_true", help="add missing runs to the file's")
    parser.add_argument("--page", action="store_true", help="only the page, from the file")
    arguments = parser.parse_args()
    if not arguments.page:
        known = json.loads(RESULTS.read_text())["losses"] if arguments.more else {}
        RESULTS.write_text(json.dumps(measure(arguments.processes, known), indent=1) + "\n")
    PAGE.write_text(page_with(table(json.loads(RESULTS.read_text())), PAGE.read_text()))
