"""Prepares contenders one after another and times them in turn, round by round."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.measure import WEIGHT_SCALE, Gradients, median_ratio, quartiles
from normuon_lab.bench.suite.options import NO_TIME
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.bench.suite.step_timing import Runner, UnusableStepError, prepare
from normuon_lab.errors import in_words

WARM_ROUNDS = 1
ROUNDS_SHARE = 0.5
"""Of the time left, for rounds beyond the fewest."""


@dataclass(frozen=True, slots=True)
class Timed:
    """The results of a race so far.

    Attributes:
        runners: with a time of each round; the first is the reference.
        rounds: how many.
        not_run: why the others did not run, by name.
    """

    runners: Sequence[Runner]
    rounds: int
    not_run: Mapping[str, str]


def timed_in_turn(
    contenders: Sequence[Contender],
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    context: PartContext,
    reckoned: dict[str, float],
    *,
    may_diverge: bool = False,
) -> Iterator[Timed]:
    """Times all contenders that can be prepared, all in the same rounds.

    A contender that compiles may take all the time that is left, so the results are yielded before
    each of them, and at the end.

    Args:
        contenders: those that compile come last.
        params: one set of weights serves all, because a step's time does not depend on their values
            and eight sets of a large model do not fit.
        gradients: of every step.
        context: of the part.
        reckoned: seconds that each took to be made ready; written to.
        may_diverge: weights that are not finite are no failure.
    """
    runners: list[Runner] = []
    not_run: dict[str, str] = {}

    def timed(most: int) -> Timed:
        rounds = take_rounds(runners, params, gradients, context, most=most)
        known = {one.name: not_run[one.name] for one in contenders if one.name in not_run}
        return Timed(tuple(runners), rounds, known)

    fewest, most = context.sizes.rounds
    for contender in contenders:
        reason = why_not(contender, context, reckoned)
        if reason is None:
            if contender.compiles and runners:
                yield timed(fewest)
            runner, reason = ready(contender, params, gradients, context, may_diverge=may_diverge)
            if runner is not None:
                runners.append(runner)
                reckoned[contender.name] = runner.figures["first_step_seconds"]
        if reason is not None:
            not_run[contender.name] = reason
            give_back(context.device)
    yield timed(most)
    # A later race must not fall back to eager steps because torch.compile's limit of variants was
    # reached before it.
    torch.compiler.reset()


def times_of(runner: Runner, first: Runner, context: PartContext) -> dict[str, Any]:
    """A contender's name and times as plain values."""
    return {
        "name": runner.contender.name,
        "step_ms": runner.step_ms,
        "median_ms": statistics.median(runner.step_ms),
        "quartiles_ms": quartiles(runner.step_ms),
        "ratio_to_first": median_ratio(runner.step_ms, first.step_ms),
        "host_ms": statistics.median(runner.host_ms) if not context.is_dry else None,
    }


def ready(
    contender: Contender,
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    context: PartContext,
    *,
    may_diverge: bool = False,
) -> tuple[Runner | None, str | None]:
    """A contender that can be timed, or why there is none."""
    context.say(f"  {contender.name}")
    try:
        return prepare(contender, params, gradients, context.device, may_diverge=may_diverge), None
    except UnusableStepError as error:
        with torch.no_grad():
            for param in params:
                param.normal_(std=WEIGHT_SCALE)
        return None, str(error)
    except Exception as error:  # Whoever fails is a finding, and the others still run.
        return None, in_words(error)


def why_not(
    contender: Contender, context: PartContext, reckoned: Mapping[str, float]
) -> str | None:
    """Why a contender is not started, or None; one that compiles needs time for that."""
    needed = 0.0
    if contender.compiles:
        needed = reckoned.get(contender.name, context.sizes.compile_seconds)
    return contender.missing or (None if context.seconds_left() > needed else NO_TIME)


def take_rounds(
    runners: Sequence[Runner],
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    context: PartContext,
    *,
    most: int,
) -> int:
    """Times all contenders again in turn: the fewest rounds, and more while there is time."""
    fewest = context.sizes.rounds[0]
    until = context.seconds_left() * (1 - ROUNDS_SHARE)
    taken = 0
    for number in range(WARM_ROUNDS + most):
        if number >= WARM_ROUNDS + fewest and context.seconds_left() < until:
            break
        for runner in runners:
            if number <= WARM_ROUNDS:
                runner.forget_rounds()
            gradients.hand_out(params)
            runner.take_round(context.device)
        taken = max(0, number + 1 - WARM_ROUNDS)
    return taken if runners else 0


def give_back(device: torch.device) -> None:
    """Frees memory that is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
