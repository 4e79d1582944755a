"""The step table: milliseconds, memory and FLOPs of one step of every contender on every model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.matrices import MatrixClass
from normuon_lab.bench.measure import Gradients, normal_matrices
from normuon_lab.bench.runner import Runner
from normuon_lab.bench.suite.options import matrices_of
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.bench.suite.roofs import rate_of
from normuon_lab.bench.suite.rounds import (
    give_back,
    rounds_of,
    timed_in_turn,
    values_of,
    why_not,
)
from normuon_lab.bench.suite.step_contenders import step_contenders
from normuon_lab.bench.traffic import elementwise_bytes
from normuon_lab.errors import in_words


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
            if model["error"] is not None:
                continue
            context.say(f"{model['title']}: {', '.join(one.name for one in field)}")
            matrices = tuple(MatrixClass(**one) for one in model["matrices"])
            earlier = model["races"]
            for found in race(field, matrices, context, reckoned):
                model["races"] = [*earlier, found]
                context.keep(values)
            give_back(context.device)
    return values


def race(
    contenders: Sequence[Contender],
    matrices: Sequence[MatrixClass],
    context: PartContext,
    reckoned: dict[str, float],
) -> Iterator[dict[str, Any]]:
    """Times the contenders on all matrices, and compares them with the first that runs.

    Args:
        contenders: who.
        matrices: what each steps.
        context: of the part.
        reckoned: seconds that each took to be made ready; written to.

    Yields:
        What is known so far; at the end, everything.
    """
    not_run = {
        one.name: reason
        for one in contenders[1:]
        if (reason := why_not(one, context, reckoned)) is not None
    }
    if len(not_run) == len(contenders) - 1 > 0:
        yield {"rounds": 0, "reference": None, "contenders": [], "not_run": not_run}
        return
    weights, grads = normal_matrices(matrices, seed=context.options.seed, device=context.device)
    params, gradients = [nn.Parameter(weight) for weight in weights], Gradients(grads)
    for runners, not_run in timed_in_turn(contenders, params, gradients, context, reckoned):
        yield {
            "rounds": rounds_of(runners),
            "reference": runners[0].contender.name if runners else None,
            "contenders": [entry(one, runners[0], matrices, context) for one in runners],
            "not_run": not_run,
        }


def entry(
    runner: Runner, first: Runner, matrices: Sequence[MatrixClass], context: PartContext
) -> dict[str, Any]:
    """One contender's figures as plain values."""
    contender, machine = runner.contender, context.found["machine"]
    values = {**values_of(runner, first, context), "ns_dtype": contender.ns_dtype}
    if contender.hides_products:  # A counter sees only some of the products.
        values["flops"] = None
    values["flops_by_model"] = contender.flops_by_model(matrices)
    flops, rate = values["flops"] or values["flops_by_model"], rate_of(machine, contender.ns_dtype)
    share = flops / (1e-3 * statistics.median(runner.step_ms) * rate) if flops and rate else None
    return {
        **values,
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
