"""Makes the tables, the figures and the pages from the files under ``results``.

Templates have the words; code fills in every number and verdict.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure

from normuon_lab.atomic_files import write_json, write_text
from normuon_lab.errors import require
from normuon_lab.plot_style import label_of, save_figure
from normuon_lab.study.evidence import paper, protocol
from normuon_lab.study.evidence import table1 as first_table
from normuon_lab.study.evidence.figures import hyperparameters, savings, training
from normuon_lab.study.evidence.paper_claims import (
    finding_of,
    interval_words,
    p_words,
    paper_claims,
)
from normuon_lab.study.evidence.protocol import CELLS, SENSITIVITY, Cell
from normuon_lab.study.evidence.recent_rivals import recent_tables
from normuon_lab.study.evidence.runs import CellEvidence, collect, shortfalls
from normuon_lab.study.evidence.table1 import Row, Table, by_baseline, rows_of
from normuon_lab.study.evidence.table2 import read_table2
from normuon_lab.study.evidence.verdicts import ALPHA
from normuon_lab.study.statistics.estimates import t_interval
from normuon_lab.train.arms.registry import MAIN_ARMS

PAGE = "results.md"
FIGURES_FOLDER = "figures/results"
Trial = Mapping[str, Any]

EIGHT_BIT_PAGE = "how-to/eight-bit-momentum.md"
START, END = "<!-- table: normuon evidence build -->", "<!-- end of table -->"


def build(
    results: Path, docs: Path, *, cells: Mapping[str, Cell] = CELLS, with_figures: bool = True
) -> list[Path]:
    """Write table1.json, the page and its figures; the same files give the same bytes.

    Without figures their files are left as they are, which saves most of the time. The paths of
    what was written are returned.
    """
    require(results.is_dir(), f"--results {results} is not a folder")
    require(docs.is_dir(), f"--docs {docs} is not a folder")
    evidence = collect(results, cells)
    table1 = first_table.table1(evidence)
    figures = draw_figures(evidence, table1)
    written = [results / first_table.FILE, docs / PAGE]
    write_json(written[0], table1)
    recent = recent_tables(results, evidence)
    write_text(written[1], render_page(evidence, table1, read_table2(results), recent, figures))
    eight_bit, table = docs / EIGHT_BIT_PAGE, eight_bit_table(evidence)
    if table and eight_bit.exists():
        write_text(eight_bit, page_with(table, eight_bit.read_text()))
        written.append(eight_bit)
    if not with_figures:
        return written
    folder = docs / FIGURES_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.svg"):
        if path.stem not in figures:
            path.unlink()
    for name, figure in figures.items():
        save_figure(figure, folder / f"{name}.svg")
        written.append(folder / f"{name}.svg")
    return written


def draw_figures(evidence: Sequence[CellEvidence], table1: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by name: `steps-saved`, `sizes`, and `<cell>-<what>` for every cell.

    A figure whose runs are not there is left out.
    """
    rows = table1["rows"]
    figures: dict[str, Figure | None] = {
        "steps-saved": savings.steps_saved_figure(evidence, rows),
        "sizes": savings.size_figure(table1["size_trends"]),
    }
    for found in evidence:
        of_cell: dict[str, Figure | None] = {
            "learning-rates": hyperparameters.learning_rate_figure(found),
            "other-rates": hyperparameters.other_rate_figure(found),
        }
        if found.cell.target_accuracy is None:
            of_cell |= {
                "losses": training.loss_figure(found),
                "schedules": savings.schedule_figure(found, rows),
                "ablations": training.ablation_figure(found),
                "sensitivity": hyperparameters.sensitivity_figure(found),
            }
            # A megabyte per cell: in one of them; the claims count the other cells, too.
            if set(found.cell.varied) == set(SENSITIVITY):
                of_cell |= training.update_figures(found)
        else:
            of_cell["accuracies"] = training.accuracy_figure(found)
        figures |= {f"{found.cell.name}-{what}": figure for what, figure in of_cell.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}


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
        "own_rates": own_rates,
        "num_elements": lambda shapes: sum(map(math.prod, shapes)),
    }
    return environment.get_template(template).render(**values)


def render_page(
    evidence: Sequence[CellEvidence],
    table1: Table,
    table2: Table | None,
    recent: Sequence[Mapping[str, Any]],
    figures: Collection[str],
) -> str:
    """The results page as Markdown.

    Args:
        evidence: what was run.
        table1: the contents of table1.json.
        table2: those of table2.json; None where it was not measured.
        recent: what was found of the rivals of 2026.
        figures: names of those that were drawn, in order.
    """
    return _render(
        "results.md.j2",
        evidence=evidence,
        table1=table1,
        table2=table2,
        recent=recent,
        figures=figures,
        folder=FIGURES_FOLDER,
        alpha=ALPHA,
        paper=paper,
        protocol=protocol,
        lead=partial(lead, table1),
        claims=paper_claims(evidence, table1, table2),
        own_rates_matter_more=own_rates_matter_more(evidence, table1),
        missing_words=missing_words,
        tables_of=partial(_tables, table1),
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


def _tables(table1: Table, found: CellEvidence) -> dict[str, list[Row]]:
    """By baseline, the cell's rows of Table 1.

    Arms that were never run are left out: `missing_words` names them once for the whole cell.
    """
    run = {record.arm for record in found.runs}
    rows = [row for row in table1["rows"] if row["cell"] == found.cell.name]
    return by_baseline(row for row in rows if row["arm"] in run)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lead:
    """In how many cells one arm is shown to need fewer steps than another, and in how many more.

    `num_cells` counts those in which both were run, all seeds; `saved` are their figures, in words.
    """

    num_shown: int
    num_behind: int
    num_cells: int
    saved: str


def lead(table1: Table, arm: str, baseline: str) -> Lead:
    """An arm's lead over a baseline, over all cells of Table 1."""
    run = [f for f in map(finding_of, rows_of(table1, arm, baseline)) if f.was_run]
    return Lead(
        num_shown=sum(finding.is_shown for finding in run),
        num_behind=sum(finding.opposite().is_shown for finding in run),
        num_cells=len(run),
        saved=_range_in_words([found.estimate for found in run if found.estimate is not None]),
    )


def _range_in_words(percents: Sequence[float]) -> str:
    """
    >>> _range_in_words([44.71, 10.1]), _range_in_words([5.04]), _range_in_words([])
    ('10.1% to 44.7%', '5.0%', '')
    """
    if not percents:
        return ""
    low, high = f"{min(percents):.1f}%", f"{max(percents):.1f}%"
    return low if low == high else f"{low} to {high}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnRate:
    """What a separate learning rate for the AdamW parameters was worth to an arm, from its tuning.

    `shared` is the best trial with one rate for both, `own` the best of the same weight decay.
    """

    arm: str
    shared: Trial
    own: Trial

    @property
    def gain(self) -> float:
        """By how much the objective falls with a rate each; 0 where sharing was best."""
        shared, own = self.shared["mean_objective"], self.own["mean_objective"]
        return float(shared - own)


def own_rates(found: CellEvidence) -> list[OwnRate]:
    """Every arm that had both tried: one rate for both halves, and others."""
    rates = []
    for arm, tuned in found.tuning.items():
        finished = [trial for trial in tuned["trials"] if trial["mean_objective"] is not None]
        finished.sort(key=lambda trial: trial["mean_objective"])
        shared = next((t for t in finished if t["adam_lr"] == t["learning_rate"]), None)
        if shared is not None and "adam_lr" in tuned["axes"]:
            own = next(t for t in finished if t["weight_decay"] == shared["weight_decay"])
            rates.append(OwnRate(arm=arm, shared=shared, own=own))
    return rates


def own_rates_matter_more(evidence: Sequence[CellEvidence], table1: Table) -> bool:
    """Whether even the smallest gain exceeds the largest difference between NorMuon and Muon.

    Over all cells that count losses; False where either is not known.
    """
    gains = [
        rate.gain
        for found in evidence
        if found.cell.target_accuracy is None
        for rate in own_rates(found)
        if rate.arm in MAIN_ARMS[1:]
    ]
    differences = [
        abs(row["loss_difference"])
        for row in rows_of(table1, "normuon", "muon")
        if row["loss_difference"] is not None
    ]
    return bool(gains and differences) and min(gains) > max(differences)


def eight_bit_table(evidence: Sequence[CellEvidence]) -> str:
    """NorMuon's final losses with an 8-bit momentum beside those with a float32 one, by cell.

    A row for each cell with runs of both, seed by seed, none diverged; empty if there is none.
    """
    rows = []
    for found in evidence:
        pairs = found.varied_losses().get("momentum_dtype", {}).get("int8", [])
        whole = [
            (ours, theirs) for ours, theirs in pairs if ours is not None and theirs is not None
        ]
        if pairs and len(whole) == len(pairs):
            means = [math.fsum(losses) / len(whole) for losses in zip(*whole, strict=True)]
            difference = t_interval([a - b for a, b in whole])
            rows.append((found.title, len(whole), *means, difference))
    return _render("eight_bit.md.j2", rows=rows).strip()


def page_with(table: str, page: str) -> str:
    """The page of 8-bit momentum with a table in its place."""
    require(START in page and END in page, f"docs/{EIGHT_BIT_PAGE} has no {START}")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    inside = f"\n{table}\n" if table else ""
    return f"{before}{START}\n{inside}\n{END}{after}"
