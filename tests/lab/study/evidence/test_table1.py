"""Table 1 against results whose truth is known, and against results that are not all there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from normuon_lab.plot_style import label_of
from normuon_lab.study.evidence.runs import StoredRun, collect, write_run
from normuon_lab.study.evidence.table1 import table1
from tests.lab.study.evidence import synthetic


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    results = tmp_path_factory.mktemp("results")
    cell = synthetic.cell()
    synthetic.write_cell(results, cell)
    return table1(collect(results, {cell.name: cell}))


def row_of(table: dict[str, Any], arm: str, baseline: str) -> dict[str, Any]:
    return next(r for r in table["rows"] if (r["arm"], r["baseline"]) == (arm, baseline))


@pytest.mark.parametrize(
    ("arm", "baseline"),
    [
        ("muon", "adamw"),
        ("normuon", "adamw"),
        ("normuon", "muon"),
        ("normuon-short", "muon"),
        ("adam-mini", "adamw"),
    ],
)
def test_the_truth_is_found(made: dict[str, Any], arm: str, baseline: str) -> None:
    row = row_of(made, arm, baseline)
    # Noise of 0.002 on each of 6 seeds of both arms, over a slope of 0.25, is about 0.5 points.
    assert row["steps_saved_percent"] == pytest.approx(synthetic.truth(arm, baseline), abs=1.5)
    low, high = row["ci95"]
    assert low < row["steps_saved_percent"] < high
    assert row["ci95_t"][0] < row["steps_saved_percent"] < row["ci95_t"][1]
    assert row["p_value"] < 0.01
    assert row["p_value_sign_flip"] == row["smallest_p_value_sign_flip"] == 2 / 64
    assert row["claim_seeds"] == [0, 1, 2, 3, 4, 5]
    assert (row["tuning_trials"], row["tuning_is_interior"]) == (12, True)
    assert row["reason_if_missing"] is None
    assert (row["loss_difference"] < 0) == (row["steps_saved_percent"] > 0)


def test_muon_needs_more_steps_to_normuons_loss(made: dict[str, Any]) -> None:
    (row,) = made["muon_rescale"]
    assert row["more_steps_percent"] == pytest.approx(-synthetic.truth("muon", "normuon"), abs=2.0)
    assert row["ci95"][0] < row["more_steps_percent"] < row["ci95"][1]


def test_every_pair_of_the_protocol_has_a_row(made: dict[str, Any]) -> None:
    pairs = [(row["arm"], row["baseline"]) for row in made["rows"]]
    assert len(pairs) == len(set(pairs))
    assert ("adamw", "adamw") not in pairs
    assert {arm for arm, _ in pairs} == set(synthetic.cell().arms) - {"adamw"}


def test_what_is_missing_is_said_and_not_made_up(tmp_path: Path) -> None:
    cell = synthetic.cell(other_arms=())
    table = table1(collect(tmp_path, {cell.name: cell}))
    for row in table["rows"]:
        assert row["steps_saved_percent"] is row["ci95"] is row["p_value"] is None
        assert row["reason_if_missing"] == f"{label_of(row['arm'])} has not been run"
        assert row["tuning_trials"] is None
    synthetic.write_cell(tmp_path, cell, arms=["adamw", "muon"], seeds=[0, 1])
    table = table1(collect(tmp_path, {cell.name: cell}))
    muon, normuon = row_of(table, "muon", "adamw"), row_of(table, "normuon", "adamw")
    assert muon["steps_saved_percent"] is not None
    assert muon["notes"][-1] == "4 of 6 claim seeds have not been run yet"
    assert normuon["reason_if_missing"] == "NorMuon has not been run"
    assert table["muon_rescale"][0]["reason_if_missing"] == "NorMuon has not been run"


def test_a_diverged_claim_run_is_no_figure(tmp_path: Path) -> None:
    cell = synthetic.cell(other_arms=())
    synthetic.write_cell(tmp_path, cell)
    run = synthetic.record("normuon", 3, 500)
    run.final_loss = None
    write_run(
        tmp_path, StoredRun(cell=cell.name, purpose="claim", record=run), synthetic.PROVENANCE
    )
    row = row_of(table1(collect(tmp_path, {cell.name: cell})), "normuon", "adamw")
    assert row["steps_saved_percent"] is None
    assert row["reason_if_missing"] == "1 of 6 runs over 500 steps diverged"


def test_runs_on_other_seeds_are_not_claimed_on(tmp_path: Path) -> None:
    cell = synthetic.cell(other_arms=())
    synthetic.write_cell(tmp_path, cell, seeds=[0, 1, 1000])
    row = row_of(table1(collect(tmp_path, {cell.name: cell})), "normuon", "adamw")
    assert row["claim_seeds"] == [0, 1]


def test_steps_to_an_accuracy_are_compared_by_their_means(tmp_path: Path) -> None:
    cell = synthetic.arithmetic_cell()
    synthetic.write_arithmetic(tmp_path)
    table = table1(collect(tmp_path, {cell.name: cell}))
    muon, normuon = row_of(table, "muon", "adamw"), row_of(table, "normuon", "muon")
    assert muon["measure"] == normuon["measure"] == "99% held-out accuracy"
    # Seeds 0 to 5 are 0 to 50 steps later: 325 against 425 steps.
    assert muon["steps_saved_percent"] == pytest.approx(100 * (1 - 325 / 425), abs=0.01)
    assert (muon["notes"], muon["loss_difference"]) == ([], None)
    # NorMuon's means: 360 to 400 for five seeds, and 1.5 * 1000 for the one that never learns.
    mean = (sum(360 + 10 * seed for seed in range(5)) + 1500) / 6
    assert normuon["steps_saved_percent"] == pytest.approx(100 * (1 - mean / 325), abs=0.01)
    assert "NorMuon never had the accuracy in 1 of 6 runs" in normuon["notes"][0]
    (rescale,) = table["muon_rescale"]
    assert rescale["more_steps_percent"] == pytest.approx(100 * (325 / mean - 1), abs=0.01)
