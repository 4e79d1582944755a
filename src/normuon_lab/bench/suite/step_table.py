"""The step table: milliseconds, memory and FLOPs of one step of every contender on every model."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.matrices import MatrixClass
from normuon_lab.bench.measure import (
    WEIGHT_SCALE,
    Gradients,
    median_ratio,
    normal_matrices,
    quartiles,
)
from normuon_lab.bench.suite.options import NO_TIME, matrices_of
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.bench.suite.roofs import rate_of
from normuon_lab.bench.suite.step_contenders import step_contenders
from normuon_lab.bench.suite.step_timing import Runner, UnusableStepError, prepare
from normuon_lab.bench.traffic import elementwise_bytes
from normuon_lab.errors import in_words

WARM_ROUNDS = 1
ROUNDS_SHARE = 0.5
"""Of the time left, for rounds beyond the fewest."""

Keep = Callable[[dict[str, Any]], None]


def run(context: PartContext) -> dict[str, Any]:
    """Two races on every model: first those that do not compile, then those that do.

    NorMuon takes part in both, and everyone is compared with it in the same race.
    """
    first, *others = step_contenders(
        context.device, dion=context.options.dion, only=context.options.only
    )
    values: dict[str, Any] = {"weights_dtype": "float32", "models": []}
    for title in context.options.models:
        model: dict[str, Any] = {"title": title, "error": None}
        try:
            matrices = matrices_of(title, tiny=context.is_dry)
        except Exception as error:  # One model that cannot be had costs no other.
            model["error"] = in_words(error)
        else:
            model["matrices"] = [asdict(one) for one in matrices]
            model["elements"] = sum(one.numel for one in matrices)
        values["models"].append({**model, "races": []})
    reckoned: dict[str, float] = {}
    for compiling in (False, True):
        field = (first, *(one for one in others if one.compiles == compiling))
        if len(field) < 2:
            continue
        for model in values["models"]:
            if model["error"] is None:
                _race_on(model, field, context, reckoned, keep=lambda: context.keep(values))
    return values


def _race_on(
    model: dict[str, Any],
    field: Sequence[Contender],
    context: PartContext,
    reckoned: dict[str, float],
    *,
    keep: Callable[[], None],
) -> None:
    """Adds a race to a model's, and to the record whatever is known of it."""
    matrices = tuple(MatrixClass(**one) for one in model["matrices"])
    context.say(f"{model['title']}: {', '.join(one.name for one in field)}")
    races = model["races"]
    number = len(races)

    def keep_race(found: dict[str, Any]) -> None:
        races[number:] = [found]
        keep()

    keep_race(race(field, matrices, context, reckoned, keep_race))


def race(
    contenders: Sequence[Contender],
    matrices: Sequence[MatrixClass],
    context: PartContext,
    reckoned: dict[str, float],
    keep: Keep,
) -> dict[str, Any]:
    """Times all contenders that can be made ready, round by round.

    Whoever compiles may take all the time that is left, so that those before it are timed first.
    The others are compared with the first that runs.

    Args:
        contenders: who.
        matrices: what each steps.
        context: of the part.
        reckoned: seconds that each took to be made ready; written to.
        keep: given what is known so far.
    """
    not_run = {
        one.name: reason
        for one in contenders[1:]
        if (reason := why_not(one, context, reckoned)) is not None
    }
    if len(not_run) == len(contenders) - 1 > 0:
        return {"rounds": 0, "reference": None, "contenders": [], "not_run": not_run}
    values = _timed_race(contenders, matrices, context, reckoned, not_run, keep)
    # A later model must not fall back to eager steps because torch.compile's limit of variants was
    # reached before it.
    torch.compiler.reset()
    give_back(context.device)
    return values


def _timed_race(
    contenders: Sequence[Contender],
    matrices: Sequence[MatrixClass],
    context: PartContext,
    reckoned: dict[str, float],
    not_run: dict[str, str],
    keep: Keep,
) -> dict[str, Any]:
    """`race` where more than one may run; what it allocates on the device is free after it."""
    # One set of weights serves all, because a step's time does not depend on their values and
    # eight sets of a large model do not fit.
    weights, grads = normal_matrices(matrices, seed=context.options.seed, device=context.device)
    params, gradients = [nn.Parameter(weight) for weight in weights], Gradients(grads)
    runners: list[Runner] = []

    def timed(most: int) -> dict[str, Any]:
        rounds = take_rounds(runners, params, gradients, context, most=most)
        entries = [entry(one, runners[0], matrices, context) for one in runners]
        known = {one.name: not_run[one.name] for one in contenders if one.name in not_run}
        reference = entries[0]["name"] if entries else None
        return {"rounds": rounds, "reference": reference, "contenders": entries, "not_run": known}

    fewest, most = context.sizes.rounds
    for number, contender in enumerate(contenders):
        reason = why_not(contender, context, reckoned)
        if reason is None:
            runner, reason = ready(contender, params, gradients, context)
            if runner is not None:
                runners.append(runner)
                reckoned[contender.name] = runner.figures["first_step_seconds"]
                if len(runners) > 1 and any(one.compiles for one in contenders[number + 1 :]):
                    keep(timed(fewest))
        if reason is not None:
            not_run[contender.name] = reason
            give_back(context.device)
    return timed(most)


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
    """Why a contender is not even begun, or None; one that compiles needs time for that."""
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
    """Times everyone anew and in turn: the fewest rounds in any case, more while there is time."""
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


def entry(
    runner: Runner, first: Runner, matrices: Sequence[MatrixClass], context: PartContext
) -> dict[str, Any]:
    """One contender's figures as plain values."""
    contender = runner.contender
    median = statistics.median(runner.step_ms)
    modelled = contender.flops_by_model(matrices)
    # A counter sees only some of the products where others are in kernels of one's own.
    figures = {**runner.figures, **({"flops": None} if contender.hides_products else {})}
    flops = figures["flops"] or modelled
    rate = rate_of(context.found["machine"], contender.ns_dtype)
    share = flops / (1e-3 * median * rate) if flops and rate else None
    return {
        "name": contender.name,
        "ns_dtype": contender.ns_dtype,
        "step_ms": runner.step_ms,
        "median_ms": median,
        "quartiles_ms": quartiles(runner.step_ms),
        "ratio_to_first": median_ratio(runner.step_ms, first.step_ms),
        "host_ms": statistics.median(runner.host_ms) if not context.is_dry else None,
        **figures,
        "flops_by_model": modelled,
        "share_of_measured_rate": share,
        "elementwise": elementwise(contender, matrices, context),
    }


def elementwise(
    contender: Contender, matrices: Sequence[MatrixClass], context: PartContext
) -> dict[str, Any] | None:
    """Bytes that NorMuon's elementwise passes move, and their time at the measured bandwidth."""
    if contender.fused is None:
        return None
    passes = elementwise_bytes(1, sum(one.numel for one in matrices), fused=contender.fused)
    bandwidth = context.found["machine"].get("copy_bytes_per_second")
    return {
        "moved_bytes": passes["moved"],
        "least_bytes": passes["least"],
        "ms_at_copy_bandwidth": 1e3 * passes["moved"] / bandwidth if bandwidth else None,
    }


def give_back(device: torch.device) -> None:
    """Frees what nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
