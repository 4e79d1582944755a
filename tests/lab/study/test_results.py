"""The results file: a round trip, never torn, never overwritten by another comparison."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from normuon_lab.atomic_files import write_json
from normuon_lab.command_line import MAKE_TARGET
from normuon_lab.config_difference import first_difference
from normuon_lab.errors import InputError
from normuon_lab.study.compare.report import print_summary, say, verdict
from normuon_lab.study.compare.results import (
    RESULTS_FILE,
    SCHEMA_VERSION,
    Results,
    open_results,
)
from normuon_lab.train.runs.records import RunRecord


def record(arm: str, seed: int, final: float | None) -> RunRecord:
    return RunRecord(
        arm=arm,
        seed=seed,
        learning_rate=0.01,
        num_parameters=5,
        eval_steps=[0, 10],
        eval_losses=[5.0] if final is None else [5.0, final],
        eval_seconds=[0.0, 1.0],
        train_losses=[5.0, 4.0],
        final_loss=final,
    )


def make_results(**config: Any) -> Results:
    return Results(
        config={
            "arms": ["adamw", "muon", "normuon"],
            "seeds": [0, 1],
            "training": {"steps": 10},
            **config,
        },
        corpus={"sha256": "a" * 64},
        learning_rates={},
        machine={},
        created="2026-01-01T00:00:00+00:00",
        records=[],
    )


def test_round_trip(tmp_path: Path) -> None:
    results = make_results()
    results.records.extend([record("adamw", 0, 2.0), record("muon", 0, None)])
    path = tmp_path / RESULTS_FILE
    write_json(path, results.to_json())
    written = json.loads(path.read_text())
    assert written["schema_version"] == SCHEMA_VERSION
    assert written["status"] == "partial"
    again = Results.from_json(written)
    assert again.records == results.records
    assert again.to_json() == written


def test_missing_runs_go_seed_by_seed() -> None:
    results = make_results()
    results.records.append(record("muon", 0, 2.0))
    expected = [("adamw", 0), ("normuon", 0), ("adamw", 1), ("muon", 1), ("normuon", 1)]
    assert results.missing_runs() == expected


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == [RESULTS_FILE]


def test_every_arm_is_held_against_the_reference_and_those_before_it() -> None:
    results = make_results(arms=["normuon", "adamw", "muon"])
    for seed in (0, 1):
        results.records.append(record("adamw", seed, 3.0))
        results.records.append(record("muon", seed, 2.5))
        results.records.append(record("normuon", seed, 2.0))
    found = [(c.arm, c.baseline, c.loss_difference.mean) for c in results.comparisons()]
    assert found == [
        ("normuon", "adamw", -1.0),
        ("muon", "adamw", -0.5),
        ("muon", "normuon", 0.5),
    ]


def test_diverged_runs_are_left_out_of_comparisons() -> None:
    results = make_results()
    results.records.extend(
        [record("adamw", 0, 3.0), record("adamw", 1, 3.0), record("muon", 0, 2.0)]
    )
    results.records.append(record("muon", 1, None))
    comparison = next(c for c in results.comparisons() if c.arm == "muon")
    assert comparison.seeds == (0,)


def test_resuming_another_configuration_names_the_first_differing_field(tmp_path: Path) -> None:
    old = make_results()
    write_json(tmp_path / RESULTS_FILE, old.to_json())
    assert open_results(tmp_path, make_results(), resume=True).to_json() == old.to_json()
    with pytest.raises(InputError, match=r"--steps 10, not --steps 20"):
        open_results(tmp_path, make_results(training={"steps": 20}), resume=True)
    with pytest.raises(InputError, match=r"--steps 10, not --steps 20; give the same"):
        open_results(tmp_path, make_results(training={"steps": 20}), resume=False)


def test_an_unfinished_folder_says_how_to_go_on_and_a_finished_one_needs_no_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = make_results(arms=["adamw"])
    kept.records.append(record("adamw", 0, 2.0))
    write_json(tmp_path / RESULTS_FILE, kept.to_json())
    monkeypatch.setenv(MAKE_TARGET, "compare")
    monkeypatch.setattr("sys.argv", ["normuon", "compare"])
    hint = "holds 1 of the 2 runs of this comparison; continue with: make compare ARGS=--resume, or"
    with pytest.raises(InputError, match=hint):
        open_results(tmp_path, make_results(arms=["adamw"]), resume=False)
    kept.records.append(record("adamw", 1, 2.0))
    write_json(tmp_path / RESULTS_FILE, kept.to_json())
    again = open_results(tmp_path, make_results(arms=["adamw"]), resume=False)
    assert again.records == kept.records


def test_resuming_on_another_text_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / RESULTS_FILE, make_results().to_json())
    new = make_results()
    new.corpus = {"sha256": "b" * 64}
    with pytest.raises(InputError, match="another text"):
        open_results(tmp_path, new, resume=True)


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / RESULTS_FILE
    for text, message in [
        ("{}", "was not written by"),
        ("no json", "not valid JSON"),
        ('{"kind": "normuon compare", "schema_version": 99}', "schema version 99"),
    ]:
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            open_results(tmp_path, make_results(), resume=True)
        assert path.read_text() == text


def test_first_difference_finds_added_and_removed_fields() -> None:
    assert first_difference({"a": 1}, {"a": 1, "b": 2}) == ("b", None, 2)
    assert first_difference({"a": 1, "b": 2}, {"a": 1}) == ("b", 2, None)
    assert first_difference({"a": {"x": [1]}}, {"a": {"x": [2]}}) == ("a.x", [1], [2])


def test_steps_are_not_compared_where_a_seed_never_reached_the_target() -> None:
    results = make_results()
    results.learning_rates = {arm: {"value": 0.01} for arm in results.arms}
    for seed in (0, 1):
        results.records.append(record("adamw", seed, 2.5))
        results.records.append(record("muon", seed, 3.0))
        results.records.append(record("normuon", seed, 2.0))
    console = Console(file=io.StringIO(), width=200)
    print_summary(results, console)
    shown = console.file.getvalue()
    assert "NorMuon against Muon: loss -1.0000 [-1.0000, -1.0000], steps not compared: " in shown
    assert "a seed did not reach AdamW's loss" in shown


def test_a_line_with_brackets_is_printed_as_it_is() -> None:
    """Rich takes brackets for markup: a text's name or a folder would lose them."""
    console = Console(file=io.StringIO(), width=20)
    say(console, "runs[bold]/report.html of a [b].txt")
    assert console.file.getvalue() == "runs[bold]/report.html of a [b].txt\n"


def test_the_verdict_says_in_a_sentence_that_the_target_was_not_reached() -> None:
    results = make_results(arms=["adamw", "muon"])
    results.learning_rates = {arm: {"value": 0.01} for arm in results.arms}
    for seed, final in ((0, 2.0), (1, 3.0)):
        results.records.append(record("adamw", seed, 2.5))
        results.records.append(record("muon", seed, final))
    assert verdict(results) == "Muon did not reach AdamW's final loss on 1 of 2 seeds."
