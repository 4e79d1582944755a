"""The documentation from the files under ``results``: the results page, and a table.

Templates have the words; code fills in every number and verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import jinja2

from normuon_lab.errors import require
from normuon_lab.study.compare.summary import label_of
from normuon_lab.study.evidence import paper, protocol
from normuon_lab.study.evidence.collected import CellEvidence, shortfalls
from normuon_lab.study.evidence.paper_claims import interval_words, p_words, paper_claims
from normuon_lab.study.evidence.short_answer import lead, own_rates, own_rates_matter_more
from normuon_lab.study.evidence.verdicts import ALPHA
from normuon_lab.study.statistics.estimates import t_interval

FIGURES_FOLDER = "figures/results"
UPDATE_FIGURES = ("singular-values", "row-norms")

EIGHT_BIT_PAGE = "how-to/eight-bit-momentum.md"
START, END = "<!-- table: normuon evidence build -->", "<!-- end of table -->"


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("normuon_lab.study.evidence"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "label": label_of,
        "interval": interval_words,
        "p": p_words,
        "unbroken": lambda text: text.replace(" ", "&nbsp;"),
        "num_elements": lambda shapes: sum(map(math.prod, shapes)),
    }
    return environment.get_template(template).render(**values)


def render_page(
    evidence: Sequence[CellEvidence],
    table1: Mapping[str, Any],
    table2: Mapping[str, Any] | None,
    recent: Sequence[Mapping[str, Any]],
    figures: Collection[str],
) -> str:
    """The results page as Markdown.

    Args:
        evidence: what was run.
        table1: the contents of table1.json.
        table2: those of table2.json; None where it was not measured.
        recent: what was found of the rivals of 2026.
        figures: names of those that were drawn.
    """
    return _render(
        "results.md.j2",
        evidence=evidence,
        table1=table1,
        table2=table2,
        recent=recent,
        figures=set(figures),
        folder=FIGURES_FOLDER,
        alpha=ALPHA,
        paper=paper,
        protocol=protocol,
        lead=partial(lead, table1),
        claims=paper_claims(evidence, table1, table2),
        own_rates_matter_more=own_rates_matter_more(evidence, table1),
        own_rates={found.cell.name: own_rates(found) for found in evidence},
        missing={found.cell.name: missing_words(found) for found in evidence},
        tables={found.cell.name: _tables(found, table1) for found in evidence},
        update_figures={
            found.cell.name: [
                figure
                for what in UPDATE_FIGURES
                for figure in sorted(figures)
                if figure.startswith(f"{found.cell.name}-{what}-")
            ]
            for found in evidence
        },
    )


def missing_words(found: CellEvidence) -> list[str]:
    """What a cell lacks, in sentences; empty if nothing."""
    if found.is_empty:
        return ["No runs of this cell yet."]
    arms, tuned = found.cell.arms, found.tuning
    missing = []
    if untuned := [label_of(arm) for arm in arms if arm not in tuned]:
        missing.append(f"Not tuned yet: {'; '.join(untuned)}.")
    ends = [label_of(arm) for arm in arms if arm in tuned and not tuned[arm]["is_interior"]]
    if ends:
        missing.append(
            "The best setting is at the edge of the values tried, so there may be a better one: "
            f"{'; '.join(ends)}."
        )
    counts = {arm: len(found.full_runs(arm)) for arm in arms}
    missing += shortfalls("Claim runs at full length", counts, len(protocol.CLAIM_SEEDS))
    missing.extend(
        f"Diverged: {label_of(run.arm)}, seed {run.seed}, {run.steps} steps."
        for run in found.runs
        if run.diverged
    )
    return missing


def _tables(found: CellEvidence, table1: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """By baseline, the cell's rows of Table 1.

    Arms that were never run are left out: `missing_words` names them once for the whole cell.
    """
    run = {record.arm for record in found.runs}
    tables: dict[str, list[Mapping[str, Any]]] = {}
    for row in table1["rows"]:
        if row["cell"] == found.cell.name and row["arm"] in run:
            tables.setdefault(row["baseline"], []).append(row)
    return tables


def eight_bit_table(evidence: Sequence[CellEvidence]) -> str:
    """NorMuon's final losses with an 8-bit momentum beside those with a float32 one, by cell.

    A row for each cell with runs of both, seed by seed, none diverged; empty if there is none.
    """
    rows = []
    for found in evidence:
        coded = {
            run.record.seed: run.record.final_loss
            for run in found.sensitivity
            if run.varied == ("momentum_dtype", "int8")
        }
        plain = {run.seed: run.final_loss for run in found.full_runs("normuon")}
        seeds = sorted(coded.keys() & plain.keys())
        pairs = [
            (ours, theirs)
            for ours, theirs in ((coded[seed], plain[seed]) for seed in seeds)
            if ours is not None and theirs is not None
        ]
        if not seeds or len(pairs) < len(seeds):
            continue
        means = [math.fsum(losses) / len(seeds) for losses in zip(*pairs, strict=True)]
        rows.append((found.title, len(seeds), *means, t_interval([a - b for a, b in pairs])))
    return _render("eight_bit.md.j2", rows=rows).strip()


def page_with(table: str, page: str) -> str:
    """The page of 8-bit momentum with a table in its place.

    Raises:
        InputError: the page has no place for it.
    """
    require(START in page and END in page, f"docs/{EIGHT_BIT_PAGE} has no {START}")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    inside = f"\n{table}\n" if table else ""
    return f"{before}{START}\n{inside}\n{END}{after}"
