"""The table of 8-bit momentum: the runs' own numbers, in the place that the page has for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from normuon_lab.errors import InputError
from normuon_lab.study.evidence.build import EIGHT_BIT_PAGE, eight_bit_table, page_with
from normuon_lab.study.evidence.runs import collect
from normuon_lab.study.statistics.estimates import t_interval
from tests.lab.study.evidence import synthetic

ROOT = Path(__file__).parents[4]


def test_losses_are_compared_seed_by_seed(tmp_path: Path) -> None:
    cell = synthetic.cell()
    synthetic.write_cell(
        tmp_path, cell, arms=["normuon"], sensitivity={"momentum_dtype": ["int8"], "beta2": [0.5]}
    )
    (found,) = collect(tmp_path, {cell.name: cell})
    plain = {run.seed: run.final_loss for run in found.full_runs("normuon")}
    pairs = [
        (run.record.final_loss, plain[run.record.seed])
        for run in found.sensitivity
        if run.varied == ("momentum_dtype", "int8")
    ]
    estimate = t_interval([ours - theirs for ours, theirs in pairs if ours and theirs])
    assert estimate.mean is not None
    assert estimate.low is not None
    assert estimate.high is not None
    head, rule, row = eight_bit_table([found]).splitlines()
    assert head.count("|") == rule.count("|") == row.count("|") == 6
    ours, theirs = (
        sum(v or 0.0 for v in values) / len(pairs) for values in zip(*pairs, strict=True)
    )
    assert row == (
        f"| {found.title} | {len(pairs)} | {theirs:.4f} | {ours:.4f} | {estimate.mean:+.4f} "
        f"({estimate.low:+.4f} to {estimate.high:+.4f}) |"
    )


def test_without_runs_there_is_no_table(tmp_path: Path) -> None:
    cell = synthetic.cell()
    synthetic.write_cell(tmp_path, cell, arms=["normuon"])
    assert eight_bit_table(collect(tmp_path, {cell.name: cell})) == ""


def test_the_page_has_the_table_of_the_published_runs() -> None:
    page = (ROOT / "docs" / EIGHT_BIT_PAGE).read_text()
    table = eight_bit_table(collect(ROOT / "results"))
    assert page_with(table, page) == page, "run normuon evidence build"


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(InputError, match="has no <!-- table"):
        page_with("| |", "# A page")
