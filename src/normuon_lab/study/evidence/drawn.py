"""All figures of the results page, by file name; a figure whose runs are not there is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from normuon_lab.study.evidence.collected import CellEvidence
from normuon_lab.study.evidence.figures.ablations import ablation_figure
from normuon_lab.study.evidence.figures.accuracies import accuracy_figure
from normuon_lab.study.evidence.figures.losses import loss_figure
from normuon_lab.study.evidence.figures.schedules import schedule_figure, steps_saved_figure
from normuon_lab.study.evidence.figures.sensitivity import sensitivity_figure
from normuon_lab.study.evidence.figures.sizes import size_figure
from normuon_lab.study.evidence.figures.tuning import learning_rate_figure, other_rate_figure
from normuon_lab.study.evidence.figures.updates import update_figures

STEPS_SAVED = "steps-saved"
SIZES = "sizes"


def draw_figures(evidence: Sequence[CellEvidence], table1: Mapping[str, Any]) -> dict[str, Figure]:
    """Figures by name: `steps-saved`, `sizes`, and `<cell>-<what>` for every cell."""
    rows = table1["rows"]
    figures: dict[str, Figure | None] = {
        STEPS_SAVED: steps_saved_figure(evidence, rows),
        SIZES: size_figure(table1["size_trends"]),
    }
    for found in evidence:
        of_cell: dict[str, Figure | None] = {
            "learning-rates": learning_rate_figure(found),
            "other-rates": other_rate_figure(found),
        }
        if found.target_accuracy is None:
            of_cell |= {
                "losses": loss_figure(found),
                "schedules": schedule_figure(found, rows),
                "ablations": ablation_figure(found),
                "sensitivity": sensitivity_figure(found),
            }
            # A megabyte per cell: in one of them; the claims count the other cells, too.
            if found.cell.varies_settings:
                of_cell |= update_figures(found)
        else:
            of_cell["accuracies"] = accuracy_figure(found)
        figures |= {f"{found.cell.name}-{what}": figure for what, figure in of_cell.items()}
    return {name: figure for name, figure in figures.items() if figure is not None}
