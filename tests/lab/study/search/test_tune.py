"""Tuning: the grid grows until the best rate is interior, at the same budget for every arm."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from normuon_lab.atomic_files import write_json
from normuon_lab.errors import InputError
from normuon_lab.study.search.searching import Trial, do_rounds
from normuon_lab.study.search.tune import (
    KIND,
    SCHEMA_VERSION,
    SHIPPED,
    TuneRequest,
    best_rate,
    is_interior,
    next_rate,
    tuned_rates,
)
from normuon_lab.train.runs.config import Experiment, RunSpec
from normuon_lab.train.runs.records import RunRecord

LossOf = Callable[[RunSpec], float | None]
Losses = dict[float, float]


def bowl(best: float) -> Callable[[RunSpec], float]:
    return lambda spec: abs(math.log2(spec.learning_rate / best)) + spec.seed / 1e6


def request_for(
    *,
    arms: tuple[str, ...] = ("adamw",),
    rates: tuple[float, ...] = (1.0, 2.0, 4.0),
    seeds: tuple[int, ...] = (1000, 1001),
    min_rounds: int = 0,
    max_rounds: int = 8,
) -> TuneRequest:
    return TuneRequest(
        experiment=Experiment(),
        arms=arms,
        seeds=seeds,
        out=Path("tuned.json"),
        rates=rates,
        min_rounds=min_rounds,
        max_rounds=max_rounds,
    )


def do_tune(loss_of: LossOf, request: TuneRequest) -> tuple[dict[str, Losses], int]:
    """Mean losses by arm and rate, and how often they were saved."""
    saves = 0

    def run_many(specs: Sequence[RunSpec]) -> dict[RunSpec, RunRecord]:
        return {
            spec: RunRecord(
                arm=spec.arm,
                seed=spec.seed,
                learning_rate=spec.learning_rate,
                num_parameters=1,
                final_loss=loss_of(spec),
            )
            for spec in specs
        }

    def save() -> None:
        nonlocal saves
        saves += 1

    tried = request.tried_before({})
    do_rounds(request, tried, run_many=run_many, save=save)
    losses = {
        arm: {trial.place[0]: trial.mean for trial in trials} for arm, trials in tried.items()
    }
    return losses, saves


@pytest.mark.parametrize("best", [0.05, 1.0, 2.0, 30.0])
def test_the_grid_grows_until_the_best_is_interior(best: float) -> None:
    losses = do_tune(bowl(best), request_for())[0]["adamw"]
    assert is_interior(losses)
    # Neighbours are a factor 2 apart, so that the best is within it.
    assert 0.5 <= best_rate(losses) / best <= 2.0


def test_growth_is_bounded() -> None:
    found, saves = do_tune(lambda spec: -spec.learning_rate, request_for(max_rounds=3))
    assert saves == 4
    assert max(found["adamw"]) == 32.0
    assert not is_interior(found["adamw"])


def test_every_arm_gets_the_same_number_of_trials() -> None:
    def loss_of(spec: RunSpec) -> float:
        return bowl(16.0 if spec.arm == "muon" else 2.0)(spec)

    found, _ = do_tune(loss_of, request_for(arms=("adamw", "muon")))
    assert len(found["adamw"]) == len(found["muon"]) > 3


def test_rounds_after_the_best_is_interior_refine_towards_the_better_side() -> None:
    found, _ = do_tune(bowl(2.6), request_for(min_rounds=2))
    assert sorted(found["adamw"]) == pytest.approx([1.0, 2.0, 2.0 * 2**0.25, 2.0 * 2**0.5, 4.0])


def test_a_new_rate_is_never_one_that_was_tried() -> None:
    losses = {1.0: 3.0, 2.0: 2.0, 4.0: 3.0}
    for _ in range(20):
        rate = next_rate(losses)
        assert rate not in losses
        losses[rate] = abs(math.log2(rate) - 1.1)


def test_a_rate_with_one_diverged_seed_is_the_worst() -> None:
    def loss_of(spec: RunSpec) -> float | None:
        return None if spec.learning_rate > 2.0 and spec.seed == 1001 else 5.0

    losses = do_tune(loss_of, request_for())[0]["adamw"]
    assert losses[4.0] == math.inf
    assert best_rate(losses) <= 2.0


@pytest.mark.parametrize("rates", [(1.0, 2.0), (1.0, 1.0, 2.0), (0.0, 1.0, 2.0), (1.0, -1.0, 2.0)])
def test_bad_grids_are_refused(rates: tuple[float, ...]) -> None:
    with pytest.raises(InputError, match="--lrs"):
        request_for(rates=rates)


@pytest.fixture
def tuning_file(tmp_path: Path) -> Path:
    losses = {0.2: 2.0, 0.1: 3.0, 0.4: None}
    trials = [
        Trial(place=(rate,), setting={"learning_rate": rate}, objectives={1000: loss})
        for rate, loss in losses.items()
    ]
    path = tmp_path / "tuned.json"
    contents = {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "seeds": [1000],
        "config": Experiment().to_json(),
        "arms": {"adamw": request_for(seeds=(1000,)).arm_to_json(trials)},
        "corpus": {"sha256": "a"},
    }
    write_json(path, contents)
    assert contents["arms"]["adamw"]["trials"] == [
        {"learning_rate": rate, "mean_final_loss": loss, "final_losses": {"1000": loss}}
        for rate, loss in sorted(losses.items())
    ]
    return path


def rate_of(
    path: Path | None, arm: str, experiment: Experiment, corpus_digest: str
) -> tuple[float, str]:
    """A tuned rate, and how it was chosen."""
    found = tuned_rates(
        None if path is None else str(path),
        [arm],
        seeds=[0],
        experiment=experiment,
        corpus_digest=corpus_digest,
    )[arm]
    return found["value"], found["source"]


def test_a_tuning_file_gives_the_best_rate_and_says_how(tuning_file: Path) -> None:
    rate, summary = rate_of(tuning_file, "adamw", Experiment(), "a")
    assert rate == 0.2
    assert "3 rates from 0.1 to 0.4, seeds 1000, mean final loss 2.0000" in summary
    assert "another" not in summary
    _, summary = rate_of(tuning_file, "adamw", Experiment(), "b")
    assert "another version of the text" in summary
    _, summary = rate_of(tuning_file, "adamw", Experiment(data=("shakespeare",)), "a")
    assert "another configuration (--data" in summary
    with pytest.raises(InputError, match="normuon tune --arms muon"):
        rate_of(tuning_file, "muon", Experiment(), "a")


def test_the_shipped_rates_are_for_the_default_comparison() -> None:
    shipped = json.loads(SHIPPED.read_text())
    for arm in ("adamw", "muon", "normuon"):
        assert shipped["arms"][arm]["is_interior"]
        assert "another configuration" not in rate_of(None, arm, Experiment(), "")[1]
    assert len({len(arm["trials"]) for arm in shipped["arms"].values()}) == 1
    assert min(shipped["seeds"]) >= 1000
