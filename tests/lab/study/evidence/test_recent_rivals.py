"""The rivals of 2026: their runs on a tiny cell, and what the page says of made ones."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from normuon_lab.errors import InputError
from normuon_lab.study.evidence import protocol, recent_rivals
from normuon_lab.study.evidence.build import build
from normuon_lab.study.evidence.protocol import (
    CELLS,
    CLAIM_SEEDS,
    RECENT_CELLS,
    RECENT_PARENT,
    RECENT_RIVALS,
    RECENT_SEEDS,
    RECENT_STARTS,
    RECENT_TRIALS,
    RECENT_TUNING_SEEDS,
    TUNING_SEEDS,
    Cell,
)
from normuon_lab.study.evidence.recent_rivals import RATES, compare_rivals, tune_rivals
from normuon_lab.study.evidence.runs import StoredRun, collect, read_runs, write_run
from normuon_lab.train.arms.registry import ARMS
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord
from normuon_lab.train.runs.tasks import load_task
from normuon_lab.train.runs.train import train_run
from tests.lab.study.evidence import synthetic
from tests.lab.study.evidence.test_protocol_page import numbers, rows

QUIET = Console(quiet=True)


@pytest.fixture
def trained(trained_here: list[RunSpec], monkeypatch: pytest.MonkeyPatch) -> list[RunSpec]:
    """Trains in this process, and remembers what."""
    monkeypatch.setattr(protocol, "RECENT_SEEDS", (0, 1))
    monkeypatch.setattr(protocol, "MAX_TUNING_TRIALS", 3)
    return trained_here


def write_parent(results: Path, name: str) -> None:
    """A tuning of Muon with a separate rate for the AdamW parameters."""
    best = {"learning_rate": 0.008, "adam_lr": 0.016, "weight_decay": 0.2}
    tuned = {RECENT_PARENT: {"best": best, "trials": [best]}}
    values = {"schema_version": 1, "kind": "normuon sweep", "arms": tuned}
    (results / name).mkdir(parents=True)
    (results / name / "sweep.json").write_text(json.dumps(values))


def test_rivals_are_tuned_and_compared_and_nothing_is_run_twice(
    tmp_path: Path, experiment: Experiment, trained: list[RunSpec]
) -> None:
    cell = Cell(name="tiny", task="words", size="tiny", experiment=experiment)
    arms = ("muon-eq", "hyperball")
    results = tmp_path / "results"
    with pytest.raises(InputError, match="tune muon in tiny before muon-eq"):
        tune_rivals(cell, arms, results=results, console=QUIET)
    write_parent(results, "tiny")
    with pytest.raises(InputError, match="tune muon-eq in tiny before its claim runs"):
        compare_rivals(cell, arms, results=results, console=QUIET)

    tune_rivals(cell, arms, results=results, console=QUIET)
    assert {spec.seed for spec in trained} == set(RECENT_TUNING_SEEDS)
    assert {spec.options.adam_lr for spec in trained} == {0.016}
    assert {spec.options.weight_decay for spec in trained} == {0.2}
    for arm in arms:
        rates = [spec.learning_rate for spec in trained if spec.arm == arm]
        start = RATES.value(RECENT_STARTS[arm])
        assert rates[0] == start
        assert {start / 2, start * 2} <= set(rates)
        assert len(rates) == len(set(rates))
    tuned = len(trained)
    # What is left after an interruption is done, and no more.
    removed = next((results / "recent-rivals" / "tiny" / "tuning").glob("muon-eq-*"))
    removed.unlink()
    tune_rivals(cell, arms, results=results, console=QUIET)
    assert len(trained) == tuned + 1

    losses = recent_rivals.tuning_losses(results, cell)
    compare_rivals(cell, arms, results=results, console=QUIET)
    compared = trained[tuned + 1 :]
    assert [(s.seed, s.arm) for s in compared] == [(seed, arm) for seed in (0, 1) for arm in arms]
    for spec in compared:
        best = min(losses[spec.arm].values())
        chosen = losses[spec.arm][(math.log2(spec.learning_rate / 0.001),)]
        assert chosen <= best * 1.001
    before = len(trained)
    compare_rivals(cell, arms, results=results, console=QUIET)
    assert len(trained) == before

    again = train_run(compared[0], experiment, load_task(experiment))
    stored = read_runs(results / "recent-rivals", "tiny")
    (kept,) = [
        run.record
        for run in stored
        if (run.record.arm, run.record.seed) == (compared[0].arm, compared[0].seed)
    ]
    assert kept.final_loss == again.final_loss, "evaluations on the way change nothing"


def write_runs(results: Path, arm: str, losses: Mapping[int, float | None], purpose: str) -> None:
    for seed, loss in losses.items():
        made = RunRecord(
            arm=arm,
            seed=seed,
            learning_rate=0.008,
            num_parameters=1,
            steps=synthetic.STEPS,
            final_loss=loss,
        )
        run = StoredRun(cell="bytes-small", purpose=purpose, record=made)
        machine = {"processor": "Zen 3", "cpu_capability": "AVX2"}
        write_run(results / "recent-rivals", run, {**synthetic.PROVENANCE, "machine": machine})


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Muon's own runs; a rival 0.05 below them, one above, one that diverges and one not run."""
    cell = synthetic.cell(other_arms=())
    results = tmp_path / "results"
    synthetic.write_cell(results, cell, arms=["adamw", "muon", "normuon"])
    muon = {
        run.record.seed: run.record.final_loss
        for run in read_runs(results, "bytes-small")
        if run.record.arm == "muon" and run.record.steps == synthetic.STEPS
    }
    noise = {0: 0.002, 1: -0.001, 2: 0.001, 3: -0.002}
    below = {seed: muon[seed] - 0.05 + noise[seed] for seed in RECENT_SEEDS}
    write_runs(results, "muon-eq", below, "claim")
    write_runs(results, "muown", {s: muon[s] + 0.2 + noise[s] for s in RECENT_SEEDS}, "claim")
    write_runs(results, "hyperball", {0: None, 1: muon[1]}, "claim")
    write_runs(results, "muon-eq", {RECENT_TUNING_SEEDS[0]: 1.9}, "tuning")
    return results


def test_the_page_says_what_was_shown_and_what_is_missing(made: Path, tmp_path: Path) -> None:
    cell = synthetic.cell(other_arms=())
    docs = tmp_path / "docs"
    docs.mkdir()
    build(made, docs, cells={cell.name: cell}, with_figures=False)
    page = (docs / "results.md").read_text().replace("&nbsp;", " ")
    section = page[page.index("## Rivals of 2026") : page.index("## Muon-rescale")]
    label = ARMS["muon-eq"].label
    (row,) = re.findall(rf"\| {label} \| Muon \|.*", section)
    assert "| 0, 1, 2, 3 | **-0.0500** |" in row
    assert row.endswith("| below |")
    assert f"| {ARMS['muown'].label} | Muon |" in section
    (row,) = re.findall(rf"\| {ARMS['muown'].label} \| Muon \|.*", section)
    assert row.endswith("| above |")
    (row,) = re.findall(rf"\| {ARMS['hyperball'].label} \| Muon \|.*", section)
    assert "0, 1 (diverged: 0) | **+0.0000** |" in row
    assert row.endswith("| too few seeds |")
    assert f"Compared seeds, 0 of {len(RECENT_SEEDS)}: {ARMS['ema-nesterov'].label}." in section
    assert f"Rates tried, 1 of {RECENT_TRIALS}: {label}." in section
    assert f"| {label} | 0.008 | 0.008 | no | 1.9000 |" in section
    assert "The rivals ran on Zen 3, AVX2, the published runs on" in section


def test_a_loss_of_the_same_seed_is_what_tuning_is_held_against(made: Path) -> None:
    cell = synthetic.cell(other_arms=())
    path = made / cell.name / "sweep.json"
    values = json.loads(path.read_text())
    seed = str(RECENT_TUNING_SEEDS[0])
    for trial in values["arms"]["muon"]["trials"]:
        is_best = (trial["learning_rate"], trial["weight_decay"]) == (0.004, 0.1)
        trial["objectives"] = {seed: 1.95 if is_best else 1.0, "1001": 7.0}
    path.write_text(json.dumps(values))
    (table,) = recent_rivals.recent_tables(made, collect(made, {cell.name: cell}))
    (row,) = table["tuning"]
    assert row["minus"]["muon"] == pytest.approx(-0.05, abs=1e-12)
    assert row["minus"]["normuon"] is None


def test_without_runs_there_is_no_section(tmp_path: Path) -> None:
    cell = synthetic.cell(other_arms=())
    synthetic.write_cell(tmp_path, cell, arms=["adamw"])
    assert recent_rivals.recent_tables(tmp_path, collect(tmp_path, {cell.name: cell})) == []
    other = replace(cell, name="elsewhere")
    assert recent_rivals.recent_tables(tmp_path, collect(tmp_path, {other.name: other})) == []


def test_the_protocol_page_gives_their_budget() -> None:
    starts = ", ".join(f"{RATES.value(RECENT_STARTS[arm]):g}" for arm in RECENT_RIVALS)
    assert rows("recent") == [
        *([f"arms in `{cell}`", numbers(arms)] for cell, arms in RECENT_CELLS.items()),
        ["tuned", f"the learning rate, from {starts}"],
        ["tuning seeds", ", ".join(map(str, RECENT_TUNING_SEEDS))],
        ["trials of an arm, at least", str(RECENT_TRIALS)],
        ["taken over from", f"`{RECENT_PARENT}`"],
        ["compared seeds", ", ".join(map(str, RECENT_SEEDS))],
    ]
    assert set(RECENT_SEEDS) <= set(CLAIM_SEEDS)
    assert set(RECENT_TUNING_SEEDS) <= set(TUNING_SEEDS)
    assert set(RECENT_CELLS) <= set(CELLS)
    assert set(RECENT_STARTS) == set(RECENT_RIVALS)
    assert next(iter(RECENT_CELLS.values())) == RECENT_RIVALS
