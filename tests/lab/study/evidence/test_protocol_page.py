"""The page that describes the protocol says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from normuon_lab.study.evidence.protocol import (
    CELLS,
    CLAIM_SEEDS,
    FULL_TUNING_TRIALS,
    INHERITED_FROM,
    LARGE_RATE_TUNING_TRIALS,
    LARGE_STARTS,
    LARGE_TUNING_TRIALS,
    MAIN_ARMS,
    OTHER_ARMS,
    RATE_TUNING_TRIALS,
    SENSITIVITY,
    STARTS,
    TUNING_SEEDS,
    schedule_steps,
)
from normuon_lab.study.evidence.runs import SWEEP_FILE
from normuon_lab.study.search.searching import AXES
from normuon_lab.study.search.sweep import read_tuned_arms
from normuon_lab.train.arms.registry import ARMS

ROOT = Path(__file__).parents[4]
PAGE = ROOT / "docs" / "lab" / "protocol.md"
RESULTS = ROOT / "results"


def rows(name: str) -> list[list[str]]:
    """The cells of one of the page's tables, without its head."""
    table = re.search(rf"<!-- {name} -->\n(.*?)<!-- /{name} -->", PAGE.read_text(), re.S)
    assert table is not None, name
    lines = table.group(1).strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(values: tuple[object, ...]) -> str:
    return ", ".join(f"`{value}`" for value in values)


def arms_in_words(others: tuple[str, ...]) -> str:
    if others == OTHER_ARMS:
        return "all"
    return ", ".join(["main", *(f"`{arm}`" for arm in others)])


def test_cells() -> None:
    assert rows("cells") == [
        [
            f"`{cell.name}`",
            f"{cell.task}, {cell.size}",
            str(cell.experiment.model.num_layers),
            str(cell.experiment.model.width),
            str(cell.experiment.model.mlp_width),
            str(cell.experiment.model.vocab_size),
            str(cell.experiment.model.sequence_length),
            str(cell.experiment.training.batch_size),
            str(cell.experiment.training.steps),
            arms_in_words(cell.other_arms),
        ]
        for cell in CELLS.values()
    ]


def test_tuning() -> None:
    lattice = [
        [
            f"`{name}`",
            f"`{axis.base:g} * {axis.ratio:.4g}^k`, from "
            + ", ".join(f"{axis.value(STARTS[arm][name]):g} ({arm})" for arm in MAIN_ARMS),
        ]
        for name, axis in AXES.items()
    ]
    assert rows("tuning") == [
        ["tuning seeds", ", ".join(map(str, TUNING_SEEDS))],
        ["trials of a main arm", f"{FULL_TUNING_TRIALS}, each on all tuning seeds"],
        ["trials of another arm", f"{RATE_TUNING_TRIALS}, of its learning rate"],
        *lattice,
    ]


def test_the_larger_size_starts_where_the_smaller_one_ended() -> None:
    tuned = read_tuned_arms(RESULTS / "bytes-small" / SWEEP_FILE)
    for arm in MAIN_ARMS:
        start = {name: axis.value(LARGE_STARTS[arm][name]) for name, axis in AXES.items()}
        assert start == pytest.approx(tuned[arm]["best"], rel=1e-6)
    for arm in CELLS["bytes-large"].other_arms:
        rate = AXES["learning_rate"].value(LARGE_STARTS[arm]["learning_rate"])
        assert rate == pytest.approx(tuned[arm]["best"]["learning_rate"], rel=1e-6)
    text = " ".join(PAGE.read_text().split())
    assert f"each main arm has {LARGE_TUNING_TRIALS} trials" in text
    assert f"Each other arm has {LARGE_RATE_TUNING_TRIALS}:" in text
    cell = CELLS["bytes-large"]
    assert {cell.tuning_trials(arm) for arm in MAIN_ARMS} == {LARGE_TUNING_TRIALS}
    assert {cell.tuning_trials(arm) for arm in cell.other_arms} == {LARGE_RATE_TUNING_TRIALS}


def test_inherited_settings() -> None:
    assert rows("inherited") == [[f"`{arm}`", f"`{INHERITED_FROM[arm]}`"] for arm in OTHER_ARMS]


def test_ladder() -> None:
    steps = CELLS["bytes-small"].experiment.training.steps
    lengths = ", ".join(str(schedule_steps(steps, rung)) for rung in range(-4, 3))
    assert rows("ladder") == [
        ["claim seeds", ", ".join(map(str, CLAIM_SEEDS))],
        ["lengths", f"`{steps} * 10^(k/10)`: ..., {lengths}, ..."],
    ]


def test_sensitivity() -> None:
    assert rows("sensitivity") == [
        [f"`{name}`", numbers(values)] for name, values in SENSITIVITY.items()
    ]


def test_seeds_are_disjoint_and_arms_are_known() -> None:
    assert not set(TUNING_SEEDS) & set(CLAIM_SEEDS)
    assert len(set(CLAIM_SEEDS)) >= 5
    for cell in CELLS.values():
        assert set(cell.arms) <= set(ARMS)
        assert set(cell.arms) <= set(cell.starts)
        assert set(cell.other_arms) <= set(INHERITED_FROM)
