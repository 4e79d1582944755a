"""The step table: milliseconds, memory and FLOPs of one step of every contender on every model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.matrices import MatrixClass
from normuon_lab.bench.measure import Gradients, normal_matrices
from normuon_lab.bench.suite.options import matrices_of
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.bench.suite.roofs import rate_of
from normuon_lab.bench.suite.rounds import give_back, timed_in_turn, times_of, why_not
from normuon_lab.bench.suite.step_contenders import step_contenders
from normuon_lab.bench.suite.step_timing import Runner
from normuon_lab.bench.traffic import elementwise_bytes
from normuon_lab.errors import in_words

Keep = Callable[[dict[str, Any]], None]


def run(context: PartContext) -> dict[str, Any]:
    """Two races on every model: first those that do not compile, then those that do.

    NorMuon takes part in both, and the others are compared with it in the same race.
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
    """Adds a race to a model's, and its results so far to the record."""
    matrices = tuple(MatrixClass(**one) for one in model["matrices"])
    context.say(f"{model['title']}: {', '.join(one.name for one in field)}")
    races = model["races"]
    number = len(races)

    def keep_race(found: dict[str, Any]) -> None:
        races[number:] = [found]
        keep()

    keep_race(race(field, matrices, context, reckoned, keep_race))
    give_back(context.device)


def race(
    contenders: Sequence[Contender],
    matrices: Sequence[MatrixClass],
    context: PartContext,
    reckoned: dict[str, float],
    keep: Keep,
) -> dict[str, Any]:
    """Times the contenders on all matrices, and compares them with the first that runs.

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
    weights, grads = normal_matrices(matrices, seed=context.options.seed, device=context.device)
    params, gradients = [nn.Parameter(weight) for weight in weights], Gradients(grads)
    found: dict[str, Any] = {}
    for timed in timed_in_turn(contenders, params, gradients, context, reckoned):
        entries = [entry(one, timed.runners[0], matrices, context) for one in timed.runners]
        found = {
            "rounds": timed.rounds,
            "reference": entries[0]["name"] if entries else None,
            "contenders": entries,
            "not_run": timed.not_run,
        }
        keep(found)
    return found


def entry(
    runner: Runner, first: Runner, matrices: Sequence[MatrixClass], context: PartContext
) -> dict[str, Any]:
    """One contender's figures as plain values."""
    contender = runner.contender
    modelled = contender.flops_by_model(matrices)
    # A counter sees only some of the products where others are in kernels of one's own.
    figures = {**runner.figures, **({"flops": None} if contender.hides_products else {})}
    flops = figures["flops"] or modelled
    rate = rate_of(context.found["machine"], contender.ns_dtype)
    share = flops / (1e-3 * statistics.median(runner.step_ms) * rate) if flops and rate else None
    return {
        **times_of(runner, first, context),
        "ns_dtype": contender.ns_dtype,
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
