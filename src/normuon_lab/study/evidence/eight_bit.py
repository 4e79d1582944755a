"""The table of 8-bit momentum: final losses beside those of a float32 momentum, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence

from normuon_lab.errors import require
from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.figures.sensitivity import sensitivity

PAGE = "how-to/eight-bit-momentum.md"
START, END = "<!-- table: normuon evidence build -->", "<!-- end of table -->"

PARAMETER, VALUE = "momentum_dtype", "int8"


def eight_bit_table(evidence: Sequence[CellEvidence]) -> str:
    """A row for each cell with runs of both; empty if there is none.

    The difference is of the same seeds, with Student's t interval at 95%.
    """
    rows = []
    for found in evidence:
        estimate = sensitivity(found).get(PARAMETER, {}).get(VALUE)
        if estimate is None or estimate.mean is None:
            continue
        coded = {
            run.record.seed: run.record.final_loss
            for run in found.sensitivity
            if run.varied == (PARAMETER, VALUE)
        }
        plain = {run.seed: run.final_loss for run in found.full_runs("normuon")}
        seeds = sorted(coded.keys() & plain.keys())
        means = [_mean([losses[seed] for seed in seeds]) for losses in (plain, coded)]
        interval = ""
        if estimate.low is not None and estimate.high is not None:
            interval = f" ({estimate.low:+.4f} to {estimate.high:+.4f})"
        rows.append(
            f"| {found.title} | {len(seeds)} | {means[0]:.4f} | {means[1]:.4f} "
            f"| {estimate.mean:+.4f}{interval} |"
        )
    if not rows:
        return ""
    head = "| | seeds | float32 | int8 | int8 minus float32, 95% |\n|---|---|---|---|---|"
    return "\n".join([head, *rows])


def page_with(table: str, page: str) -> str:
    """The page with a table in its place.

    Raises:
        InputError: the page has no place for it.
    """
    require(START in page and END in page, f"docs/{PAGE} has no {START}")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    inside = f"\n{table}\n" if table else ""
    return f"{before}{START}\n{inside}\n{END}{after}"


def _mean(losses: Sequence[float | None]) -> float:
    finite = [loss for loss in losses if loss is not None]
    return math.fsum(finite) / len(finite)
