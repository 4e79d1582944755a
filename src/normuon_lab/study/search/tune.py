"""`normuon tune`: its search, its file, and the learning rates of such a file.

First every arm gets the same grid. Then, round by round, every arm gets one more rate, so that the
budgets stay equal: an arm whose best rate is at an end of what it tried gets one beyond that end;
any other gets the geometric mean of its best rate and a neighbour. It ends once every arm's best
rate is interior and at least a given number of rounds were made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normuon_lab.atomic_files import damage_named, read_json
from normuon_lab.config_difference import first_difference
from normuon_lab.errors import InputError, require
from normuon_lab.machine import utc_now
from normuon_lab.study.search.searching import Place, SearchRequest, Setting, Trial, Tried
from normuon_lab.train.runs.config import Experiment, flag_of
from normuon_lab.train.runs.tasks import Task

KIND = "normuon tune"
SCHEMA_VERSION = 1
SHIPPED = Path(__file__).with_name("tuned.json")
"""The rates of the default comparison."""

Losses = Mapping[float, float]
"""The mean final loss by learning rate; infinite where a run diverged."""

EXTENSION_FACTOR = 2.0
# Finer steps than this are lost in the noise between seeds.
_FINEST_RATIO = 2.0**0.25


def best_rate(losses: Losses) -> float:
    """The rate of the lowest loss; the lower rate of two that are equal."""
    return min(sorted(losses), key=lambda rate: losses[rate])


def is_interior(losses: Losses) -> bool:
    """Whether the best rate has a tried rate on both sides.

    >>> is_interior({1.0: 3.0, 2.0: 2.0, 4.0: 2.5})
    True
    >>> is_interior({1.0: 3.0, 2.0: 2.0})
    False
    """
    return min(losses) < best_rate(losses) < max(losses)


def next_rate(losses: Losses) -> float:
    """The one rate to try next for an arm.

    >>> next_rate({1.0: 3.0, 2.0: 2.0})
    4.0
    >>> round(next_rate({1.0: 3.0, 2.0: 2.0, 4.0: 2.5}), 3)  # towards the better neighbour
    2.828
    """
    best = best_rate(losses)
    below = [rate for rate in losses if rate < best]
    above = [rate for rate in losses if rate > best]
    if not below:
        return best / EXTENSION_FACTOR
    if not above:
        return best * EXTENSION_FACTOR
    neighbours = sorted((max(below), min(above)), key=lambda rate: losses[rate])
    for neighbour in neighbours:
        if max(neighbour / best, best / neighbour) > _FINEST_RATIO * 1.01:
            return math.sqrt(best * neighbour)
    # Both neighbours are as near as the noise: one more rate at an end costs the same budget and
    # can only widen what was searched.
    return max(losses) * EXTENSION_FACTOR


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneRequest(SearchRequest):
    """The learning rate alone, first on a grid; a place is a rate.

    Attributes:
        rates: the first grid.
        min_rounds: rounds after the grid, one more rate per arm each.
        max_rounds: the rounds after which a search stops without an interior best rate.
    """

    rates: tuple[float, ...]
    min_rounds: int
    max_rounds: int

    def __post_init__(self) -> None:
        SearchRequest.__post_init__(self)
        rates = self.rates
        require(len(rates) >= 3, "--lrs needs at least three learning rates")
        is_positive = all(math.isfinite(rate) and rate > 0.0 for rate in rates)
        require(is_positive, "--lrs must be positive numbers")
        require(len(set(rates)) == len(rates), "--lrs names a learning rate twice")
        require(
            0 <= self.min_rounds <= self.max_rounds,
            f"--rounds {self.min_rounds} must be between 0 and --max-rounds {self.max_rounds}",
        )

    def next_round(self, tried: Tried) -> dict[str, list[Place]]:
        losses = {arm: _losses(trials) for arm, trials in tried.items()}
        num_tried = min(map(len, losses.values()))
        if num_tried == 0:
            return {arm: [(rate,) for rate in self.rates] for arm in self.arms}
        rounds_made = num_tried - len(self.rates)
        is_enough = rounds_made >= self.min_rounds and all(map(is_interior, losses.values()))
        if is_enough or rounds_made >= self.max_rounds:
            return {}
        return {arm: [(next_rate(losses[arm]),)] for arm in self.arms}

    def setting(self, arm: str, place: Place) -> Setting:
        return {"learning_rate": place[0]}

    def contents(self, task: Task) -> dict[str, Any]:
        require(not self.out.exists(), f"--out {self.out} exists already: give another file")
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "seeds": list(self.seeds),
            "config": self.experiment.to_json(),
            "arms": {},
            "corpus": task.to_json(),
            "created": utc_now(),
        }

    def arm_to_json(self, trials: Sequence[Trial]) -> dict[str, Any]:
        losses = _losses(trials)
        by_rate = {trial.place[0]: trial for trial in trials}
        chosen = best_rate(losses)
        return {
            "learning_rate": chosen,
            "mean_final_loss": by_rate[chosen].finite_mean,
            "is_interior": is_interior(losses),
            "trials": [
                {
                    "learning_rate": rate,
                    "mean_final_loss": trial.finite_mean,
                    "final_losses": {str(seed): trial.objectives[seed] for seed in self.seeds},
                }
                for rate, trial in sorted(by_rate.items())
            ],
        }


def _losses(trials: Sequence[Trial]) -> dict[float, float]:
    return {trial.place[0]: trial.mean for trial in trials}


def tuned_rates(
    path: str | None,
    arms: Sequence[str],
    *,
    seeds: Sequence[int],
    experiment: Experiment,
    corpus_digest: str,
) -> dict[str, dict[str, Any]]:
    """What a tuning file says of arms: each one's rate, how it was chosen, and its trials.

    Without a path, of the file that is shipped with the package. The seeds, the experiment and the
    text are those of a comparison with these rates.

    Raises:
        InputError: the file has no rate of an arm, or was made on one of the seeds.
    """
    source, file = ("shipped tuned.json", SHIPPED) if path is None else (path, Path(path))
    require(path is None or file.is_file(), f"--tuned: no such file: {path}")
    values = read_json(file, kind=KIND, schema_version=SCHEMA_VERSION)
    with damage_named(source):
        for seed in sorted(set(values["seeds"]) & set(seeds)):
            raise InputError(
                f"{source} was tuned on seed {seed}, which this comparison uses too: tune on other "
                "seeds"
            )
        return {
            arm: {
                "value": _chosen_rate(values, arm, source),
                "source": _how_chosen(values, arm, source, experiment, corpus_digest),
                "trials": values["arms"][arm]["trials"],
                "command": values.get("command"),
            }
            for arm in arms
        }


def _chosen_rate(values: Mapping[str, Any], arm: str, source: str) -> float:
    if arm not in values["arms"]:
        raise InputError(
            f"{source} has no learning rate for {arm}: give --lr {arm}=VALUE, "
            f"or tune it with `normuon tune --arms {arm}`"
        )
    found = values["arms"][arm]
    require(
        found["mean_final_loss"] is not None,
        f"{source}: every learning rate of {arm} diverged; tune again with lower --lrs",
    )
    return float(found["learning_rate"])


def _how_chosen(
    values: Mapping[str, Any], arm: str, source: str, experiment: Experiment, corpus_digest: str
) -> str:
    """One sentence: how the rate was chosen, and whether for this experiment."""
    chosen = values["arms"][arm]
    rates = [trial["learning_rate"] for trial in chosen["trials"]]
    text = (
        f"tuned: {len(rates)} rates from {min(rates):.3g} to {max(rates):.3g}, "
        f"seeds {', '.join(map(str, values['seeds']))}, "
        f"mean final loss {chosen['mean_final_loss']:.4f} ({source})"
    )
    difference = first_difference(values["config"], experiment.to_json())
    if difference is not None:
        name, before, after = difference
        text += f"; tuned for another configuration ({flag_of(name)} {before}, here {after})"
    elif values["corpus"]["sha256"] != corpus_digest:
        # The standard library of another Python, say.
        text += "; tuned on another version of the text"
    return text
