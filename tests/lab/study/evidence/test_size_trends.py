"""Savings at two sizes, against results whose change with size is known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from normuon_lab.study.evidence import paper
from normuon_lab.study.evidence.build import build
from normuon_lab.study.evidence.figures.savings import size_figure
from normuon_lab.study.evidence.protocol import Cell
from normuon_lab.study.evidence.runs import CellEvidence, collect
from normuon_lab.study.evidence.table1 import table1
from tests.lab.study.evidence import synthetic

SMALL, LARGE = 500_000, 4_000_000
STRENGTH = 1.5
"""How much further ahead the arms are at the larger size."""


def cells() -> dict[str, Cell]:
    """The larger first, which must not matter."""
    large = replace(synthetic.cell("bytes-large", ()), size="4.0M")
    return {"bytes-large": large, "bytes-small": synthetic.cell(other_arms=())}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    synthetic.write_cell(folder, cells()["bytes-small"], num_parameters=SMALL)
    synthetic.write_cell(folder, cells()["bytes-large"], num_parameters=LARGE, strength=STRENGTH)
    return folder


@pytest.fixture(scope="module")
def evidence(results: Path) -> list[CellEvidence]:
    return collect(results, cells())


@pytest.fixture(scope="module")
def trends(evidence: list[CellEvidence]) -> list[dict[str, Any]]:
    return table1(evidence)["size_trends"]


@pytest.mark.parametrize(
    ("arm", "baseline"), [("muon", "adamw"), ("normuon", "adamw"), ("normuon", "muon")]
)
def test_the_change_with_size_is_found(
    evidence: list[CellEvidence], trends: list[dict[str, Any]], arm: str, baseline: str
) -> None:
    (trend,) = [t for t in trends if (t["arm"], t["baseline"]) == (arm, baseline)]
    assert [point["size"] for point in trend["sizes"]] == ["0.5M", "4.0M"]
    assert [point["num_parameters"] for point in trend["sizes"]] == [SMALL, LARGE]
    truth = synthetic.truth(arm, baseline, strength=STRENGTH) - synthetic.truth(arm, baseline)
    assert trend["change_points"] == pytest.approx(truth, abs=2.0)
    low, high = trend["change_ci95_t"]
    assert low < truth < high
    assert high - low < 5.0
    rows = {(r["cell"], r["arm"], r["baseline"]): r for r in table1(evidence)["rows"]}
    for point, cell in zip(trend["sizes"], ("bytes-small", "bytes-large"), strict=True):
        row = rows[cell, arm, baseline]
        assert {key: row[key] for key in ("steps_saved_percent", "ci95", "ci95_t")} == {
            key: point[key] for key in ("steps_saved_percent", "ci95", "ci95_t")
        }


def test_one_size_is_no_trend(evidence: list[CellEvidence]) -> None:
    for found in evidence:
        assert table1([found])["size_trends"] == []
    renamed = [replace(evidence[0], cell=replace(evidence[0].cell, task="another text"))]
    assert table1([*renamed, evidence[1]])["size_trends"] == []


def test_no_interval_where_a_seed_has_no_saving_of_its_own(evidence: list[CellEvidence]) -> None:
    large, small = evidence
    shortest = min(run.steps or 0 for run in small.runs)
    # Seed 0 is below its target at once; seed 1 makes up for it in the mean.
    moved = {("normuon", 0, shortest): 1.0, ("normuon", 1, shortest): 3.0}
    runs = [
        replace(run, final_loss=moved.get((run.arm, run.seed, run.steps or 0), run.final_loss))
        for run in small.runs
    ]
    (trend,) = [
        t
        for t in table1([large, replace(small, runs=runs)])["size_trends"]
        if (t["arm"], t["baseline"]) == ("normuon", "adamw")
    ]
    assert trend["change_points"] is not None
    assert trend["change_ci95_t"] is None


def test_the_figure_has_our_sizes_and_the_papers(trends: list[dict[str, Any]]) -> None:
    assert size_figure([]) is None
    figure = size_figure(trends)
    assert figure is not None
    against_adamw, against_muon = figure.axes
    papers = {
        line.get_label(): dict(zip(*line.get_data(), strict=True))
        for axes in (against_adamw, against_muon)
        for line in axes.get_lines()
        if str(line.get_label()).endswith("the paper")
    }
    assert papers["Muon, the paper"] == paper.saved_of_adamw("muon")
    assert papers["NorMuon, the paper"] == paper.saved_of_muon()
    ours = {str(c.get_label()): c for c in against_adamw.containers}
    assert list(ours) == ["Muon", "NorMuon"]
    x, y = ours["NorMuon"].lines[0].get_data()  # type: ignore[attr-defined]
    assert list(x) == pytest.approx([SMALL, LARGE], rel=0.05)
    (trend,) = [t for t in trends if (t["arm"], t["baseline"]) == ("normuon", "adamw")]
    assert list(y) == [point["steps_saved_percent"] for point in trend["sizes"]]


def test_every_arm_is_named_once(trends: list[dict[str, Any]]) -> None:
    only_against_muon = [t for t in trends if (t["arm"], t["baseline"]) != ("normuon", "adamw")]
    figure = size_figure(only_against_muon)
    assert figure is not None
    (legend,) = figure.legends
    assert sorted(text.get_text() for text in legend.get_texts()) == sorted(
        ["Muon", "NorMuon", "Muon, the paper", "NorMuon, the paper"]
    )


def test_the_page_says_it(tmp_path: Path, results: Path, trends: list[dict[str, Any]]) -> None:
    build(results, tmp_path, cells=cells())
    page = (tmp_path / "results.md").read_text()
    assert "(figures/results/sizes.svg)" in page
    for trend in trends:
        assert f"| 8.0 | **{trend['change_points']:+.1f}** |" in page
    build(results, tmp_path, cells={"bytes-small": cells()["bytes-small"]}, with_figures=False)
    assert "No task has figures at two sizes yet." in (tmp_path / "results.md").read_text()
