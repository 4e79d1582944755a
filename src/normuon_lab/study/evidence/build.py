"""Makes the tables, the figures and the page from the files under ``results``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from normuon_lab.atomic_files import write_json, write_text
from normuon_lab.errors import require
from normuon_lab.matplotlib_style import save_figure
from normuon_lab.study.evidence import table1 as first_table
from normuon_lab.study.evidence.figures.hyperparameters import (
    learning_rate_figure,
    other_rate_figure,
    sensitivity_figure,
)
from normuon_lab.study.evidence.figures.savings import (
    schedule_figure,
    size_figure,
    steps_saved_figure,
)
from normuon_lab.study.evidence.figures.training import (
    ablation_figure,
    accuracy_figure,
    loss_figure,
    update_figures,
)
from normuon_lab.study.evidence.page import (
    EIGHT_BIT_PAGE,
    FIGURES_FOLDER,
    eight_bit_table,
    page_with,
    render_page,
)
from normuon_lab.study.evidence.protocol import CELLS, SENSITIVITY, Cell
from normuon_lab.study.evidence.recent_rivals import recent_tables
from normuon_lab.study.evidence.runs import CellEvidence, collect
from normuon_lab.study.evidence.table2 import read_table2

PAGE = "results.md"


def build(
    results: Path, docs: Path, *, cells: Mapping[str, Cell] = CELLS, with_figures: bool = True
) -> list[Path]:
    """Write table1.json, the page and its figures; the same files give the same bytes.

    Without figures their files are left as they are, which saves most of the time. The paths of
    what was written are returned.

    Raises:
        InputError: a folder is missing, or a file is not what it should be.
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
        "steps-saved": steps_saved_figure(evidence, rows),
        "sizes": size_figure(table1["size_trends"]),
    }
    for found in evidence:
        of_cell: dict[str, Figure | None] = {
            "learning-rates": learning_rate_figure(found),
            "other-rates": other_rate_figure(found),
        }
        if found.cell.target_accuracy is None:
            of_cell |= {
                "losses": loss_figure(found),
                "schedules": schedule_figure(found, rows),
                "ablations": ablation_figure(found),
                "sensitivity": sensitivity_figure(found),
            }
            # A megabyte per cell: in one of them; the claims count the other cells, too.
            if set(found.cell.varied) == set(SENSITIVITY):
                of_cell |= update_figures(found)
        else:
            of_cell["accuracies"] = accuracy_figure(found)
        figures |= {f"{found.cell.name}-{what}": figure for what, figure in of_cell.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}
