"""What the figures show: the right numbers, in the arms' own colours, with units on every axis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from normuon_lab.plot_style import color_of
from normuon_lab.study.evidence.build import draw_figures
from normuon_lab.study.evidence.figures.hyperparameters import (
    DEFAULTS,
    PANELS,
    learning_rate_figure,
    other_rate_figure,
    sensitivity_figure,
)
from normuon_lab.study.evidence.figures.savings import schedule_figure, steps_saved_figure
from normuon_lab.study.evidence.figures.training import (
    ablation_figure,
    loss_figure,
    update_figures,
)
from normuon_lab.study.evidence.protocol import (
    ARMS_WITH_BOTH_OPTIONS,
    CELLS,
    MAIN_ARMS,
    SENSITIVITY,
)
from normuon_lab.study.evidence.runs import CellEvidence, collect
from normuon_lab.study.evidence.table1 import table1
from normuon_lab.train.arms.registry import ARMS
from tests.lab.study.evidence import synthetic


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> CellEvidence:
    results = tmp_path_factory.mktemp("results")
    cell = synthetic.cell()
    synthetic.write_cell(results, cell, sensitivity={"beta2": [0.5, 0.99], "ns_steps": [3]})
    return collect(results, {cell.name: cell})[0]


@pytest.fixture(scope="module")
def table(found: CellEvidence) -> dict[str, Any]:
    return table1([found])


def line_of(figure: Figure, label: str, panel: int = 0) -> Any:
    return next(line for line in figure.axes[panel].get_lines() if line.get_label() == label)


def drawn(found: CellEvidence, table: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    yield from draw_figures([found], table).items()


def test_every_panel_says_what_its_axes_are(found: CellEvidence, table: dict[str, Any]) -> None:
    for name, figure in drawn(found, table):
        assert figure.axes, name
        bottom = [a for a in figure.axes if a.get_subplotspec().is_last_row()]
        left = [a for a in figure.axes if a.get_subplotspec().is_first_col()]
        assert figure.get_supxlabel() or all(axes.get_xlabel() for axes in bottom), name
        # Named arms down the side need no title.
        named = [a.get_ylabel() or a.get_yticklabels()[0].get_text() for a in left]
        assert figure.get_supylabel() or all(named), name


def test_the_losses_are_the_means_in_the_arms_colours(found: CellEvidence) -> None:
    figure = loss_figure(found)
    assert figure is not None
    for arm in ("adamw", "muon", "normuon"):
        line = line_of(figure, ARMS[arm].label)
        assert to_hex(line.get_color()) == color_of(arm).lower()
        finals = [run.final_loss for run in found.full_runs(arm)]
        assert line.get_ydata()[-1] == pytest.approx(np.mean(finals))
        assert line.get_xdata()[-1] == synthetic.STEPS
    # A band per arm.
    assert len(figure.axes[0].collections) == 3


def test_a_diverged_run_is_no_part_of_a_mean(found: CellEvidence) -> None:
    broken = synthetic.record("normuon", 0, synthetic.STEPS)
    broken.final_loss, broken.eval_losses = None, broken.eval_losses[:3]
    runs = [r for r in found.runs if (r.arm, r.seed, r.steps) != ("normuon", 0, 500)]
    figure = loss_figure(CellEvidence(cell=found.cell, runs=[*runs, broken]))
    assert figure is not None
    finals = [run.final_loss for run in found.full_runs("normuon")[1:]]
    assert line_of(figure, "NorMuon").get_ydata()[-1] == pytest.approx(np.mean(finals))


def test_the_stars_are_where_table_1_says(found: CellEvidence, table: dict[str, Any]) -> None:
    figure = schedule_figure(found, table["rows"])
    assert figure is not None
    stars = {
        to_hex(collection.get_facecolor()[0]): collection.get_offsets()[0]
        for collection in figure.axes[0].collections
        if len(collection.get_offsets()) == 1
    }
    target = np.mean([run.final_loss for run in found.full_runs("adamw")])
    for arm in ("muon", "normuon"):
        steps, loss = stars[color_of(arm).lower()]
        assert steps == pytest.approx(500 * (1 - synthetic.truth(arm) / 100), rel=0.02)
        assert loss == pytest.approx(target)


def test_the_legend_says_where_an_arm_meets_the_target_and_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shift, arm in zip((0.12, 0.13), ARMS_WITH_BOTH_OPTIONS, strict=True):
        monkeypatch.setitem(synthetic.SHIFTS, arm, shift)
    cell = synthetic.cell(other_arms=ARMS_WITH_BOTH_OPTIONS)
    synthetic.write_cell(tmp_path, cell)
    found = collect(tmp_path, {cell.name: cell})[0]
    rows = table1([found])["rows"]
    figure = schedule_figure(found, rows)
    assert figure is not None
    figure.draw_without_rendering()
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[0] == "AdamW"
    assert len(names) == 5
    for name, arm in zip(names[1:], (*MAIN_ARMS[1:], *ARMS_WITH_BOTH_OPTIONS), strict=True):
        (saved,) = [
            row["steps_saved_percent"]
            for row in rows
            if (row["arm"], row["baseline"]) == (arm, "adamw")
        ]
        words = f"{500 * (1 - saved / 100):.0f} steps, {saved:.1f}% fewer"
        assert name == f"{ARMS[arm].label}: {words}"
    for drawn in (figure, loss_figure(found)):
        assert drawn is not None
        drawn.draw_without_rendering()
        box = drawn.legends[0].get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= drawn.bbox.x1


def test_every_arm_of_table_1_is_drawn(found: CellEvidence, table: dict[str, Any]) -> None:
    figure = steps_saved_figure([found], table["rows"])
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == [ARMS[arm].label for arm in found.cell.arms if arm != "adamw"]


def test_ablations_are_paired_with_muon(found: CellEvidence) -> None:
    figure = ablation_figure(found)
    assert figure is not None
    differences = found.loss_differences("muon-frobenius", "muon")
    assert differences is not None
    # The seeds' own hardness, 0.02, cancels; noise of 0.002 on both sides stays.
    assert differences[:, -1].std() < 0.006
    assert differences.mean() == pytest.approx(0.01, abs=0.004)
    assert ablation_figure(CellEvidence(cell=found.cell, runs=found.full_runs("muon"))) is None


def test_the_best_rate_has_the_star(found: CellEvidence) -> None:
    figure = learning_rate_figure(found)
    assert figure is not None
    for axes in figure.axes:
        for star in axes.collections:
            assert star.get_offsets()[0][0] == pytest.approx(0.004)


def with_trials(found: CellEvidence, trials: list[tuple[float, float, float]]) -> CellEvidence:
    """NorMuon's tuning alone: learning rate, that of the AdamW parameters, mean final loss."""
    tuned = {
        "axes": ["learning_rate", "adam_lr", "weight_decay"],
        "trials": [
            {"learning_rate": rate, "adam_lr": other, "weight_decay": 0.1, "mean_objective": loss}
            for rate, other, loss in trials
        ],
    }
    return replace(found, tuning={"normuon": tuned})


def test_the_other_half_has_curves_of_its_own_rate(found: CellEvidence) -> None:
    trials = [(0.008, 0.008, 1.6), (0.008, 0.032, 1.5), (0.008, 0.064, 1.52), (0.004, 0.032, 1.55)]
    figure = other_rate_figure(with_trials(found, trials))
    assert figure is not None
    (line,) = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [0.008, 0.032, 0.064]
    assert list(line.get_ydata()) == [1.6, 1.5, 1.52]
    (star,) = figure.axes[0].collections
    assert star.get_offsets()[0].tolist() == [0.032, 1.5]
    figure.draw_without_rendering()
    assert figure.get_tightbbox().width <= figure.get_figwidth()


def test_an_arm_that_took_over_its_other_rate_has_no_curve_of_it(found: CellEvidence) -> None:
    only_rate = {"axes": ["learning_rate"], "trials": found.tuning["normuon"]["trials"]}
    assert other_rate_figure(replace(found, tuning={"normuon-short": only_rate})) is None


def test_arms_have_panels_of_their_kind_and_legends_fit(found: CellEvidence) -> None:
    assert [arm for _, arms in PANELS for arm in arms] == list(CELLS["bytes-small"].arms)
    figure = learning_rate_figure(found)
    assert figure is not None
    named = [
        [text.get_text() for text in legend.get_texts()]
        for axes in figure.axes
        if (legend := axes.get_legend())
    ]
    assert named == [
        [ARMS[arm].label for arm in arms if arm in found.cell.arms] for _, arms in PANELS
    ]
    width, height = figure.get_size_inches() * figure.dpi
    figure.draw_without_rendering()
    for axes in figure.axes:
        box = axes.get_legend().get_window_extent()
        assert 0 <= box.x0 < box.x1 <= width
        assert 0 <= box.y0 < box.y1 <= height


def test_a_rival_far_behind_is_named_at_the_edge(found: CellEvidence) -> None:
    figure = ablation_figure(found)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[1].texts] == []
    worse = [
        replace(run, eval_losses=[loss + 1.0 for loss in run.eval_losses])
        for run in found.full_runs("adam-mini")
    ]
    others = [run for arm in found.cell.arms if arm != "adam-mini" for run in found.full_runs(arm)]
    figure = ablation_figure(CellEvidence(cell=found.cell, runs=[*others, *worse]))
    assert figure is not None
    (text,) = figure.axes[1].texts
    assert text.get_text().startswith("+1.0")
    assert figure.axes[1].get_xlim()[1] < 0.2


def test_rivals_alone_are_drawn(found: CellEvidence) -> None:
    runs = [*found.full_runs("muon"), *found.full_runs("adam-mini")]
    figure = ablation_figure(CellEvidence(cell=found.cell, runs=runs))
    assert figure is not None
    assert [text.get_text() for text in figure.axes[1].texts] == []


def test_defaults_are_marked_among_the_values(found: CellEvidence) -> None:
    figure = sensitivity_figure(found)
    assert figure is not None
    labels = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert labels == [["0.5", "0.95", "0.99"], ["3", "5"]]


def test_all_that_is_varied_has_a_default_to_compare_with() -> None:
    assert set(DEFAULTS) == set(SENSITIVITY)
    for name, values in SENSITIVITY.items():
        assert DEFAULTS[name] not in values


def test_update_figures_show_the_momentum_and_leave_out_who_was_not_measured(
    found: CellEvidence,
) -> None:
    assert list(found.measured_updates()) == ["momentum", "adamw", "adam-mini", "muon", "normuon"]
    figures = update_figures(found)
    labels = [line.get_label() for line in figures["row-norms-layer3"].axes[0].get_lines()]
    assert labels == ["raw momentum (Muon's)", "AdamW", "Adam-mini", "Muon", "NorMuon"]
    assert update_figures(CellEvidence(cell=found.cell, runs=found.full_runs("muon-adam"))) == {}
