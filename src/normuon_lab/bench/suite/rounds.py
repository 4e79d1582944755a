"""Prepares contenders one after another and times them in turn, round by round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.measure import (
    WEIGHT_SCALE,
    Gradients,
    median_ratio,
    quartiles,
    synchronize,
)
from normuon_lab.bench.runner import Runner, prepare
from normuon_lab.bench.suite.options import NO_TIME
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.errors import in_words

WARM_ROUNDS = 1
ROUNDS_SHARE = 0.5
"""Of the time left, for rounds beyond the fewest."""
TOP_KERNELS = 5
KERNEL_NAME_LENGTH = 160

Results = tuple[Sequence[Runner], dict[str, str]]
"""Those with a time of each round, the first being the reference; why the others did not run."""


def timed_in_turn(
    contenders: Sequence[Contender],
    params: Sequence[nn.Parameter],
    gradients: Gradients,
    context: PartContext,
    reckoned: dict[str, float],
    *,
    may_diverge: bool = False,
) -> Iterator[Results]:
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
    runner: Runner | None = None
    fewest, most = context.sizes.rounds
    for contender in contenders:
        reason = why_not(contender, context, reckoned)
        if reason is None:
            if contender.compiles and runners:
                _take_rounds(runners, gradients, context, most=fewest)
                yield tuple(runners), dict(not_run)
            context.say(f"  {contender.name}")
            try:
                runner = prepare(contender, params, gradients, context.device)
            except Exception as error:  # Whoever fails is a finding, and the others still run.
                reason = in_words(error)
            if not may_diverge and not _kept_finite(params):
                reason = reason or "its step made weights that are not finite"
            if reason is None and runner is not None:
                runners.append(runner)
                reckoned[contender.name] = runner.first_step_seconds
        if reason is not None:
            not_run[contender.name] = reason
            runner = None  # Its memory is the next one's.
            give_back(context.device)
    _take_rounds(runners, gradients, context, most=most)
    yield tuple(runners), not_run
    # A later race must not fall back to eager steps because torch.compile's limit of variants was
    # reached before it.
    torch.compiler.reset()


def rounds_of(runners: Sequence[Runner]) -> int:
    """How many rounds all of them were timed in."""
    return len(runners[0].step_ms) if runners else 0


def values_of(runner: Runner, first: Runner, context: PartContext) -> dict[str, Any]:
    """A contender's name, times and figures as plain values.

    On a CPU operators stand in for kernels, and there are no launches.
    """
    on_cuda = not context.is_dry
    kernels = runner.profile.kernels
    return {
        "name": runner.contender.name,
        "step_ms": runner.step_ms,
        "median_ms": statistics.median(runner.step_ms),
        "quartiles_ms": quartiles(runner.step_ms),
        "ratio_to_first": median_ratio(runner.step_ms, first.step_ms),
        "host_ms": statistics.median(runner.host_ms) if on_cuda else None,
        "flops": runner.flops or None,
        "flops_note": runner.flops_note,
        "first_step_seconds": runner.first_step_seconds,
        "state_bytes": runner.state_bytes,
        "scratch_kept_bytes": runner.scratch_kept_bytes,
        "scratch_peak_bytes": runner.scratch_peak_bytes,
        "launches": sum(one.count for one in kernels) if on_cuda else None,
        "device_ms": sum(one.ms for one in kernels) if on_cuda else None,
        "top_kernels": [
            {"name": one.name[:KERNEL_NAME_LENGTH], "ms": one.ms, "count": one.count}
            for one in sorted(kernels, reverse=True)[:TOP_KERNELS]
        ],
    }


def why_not(
    contender: Contender, context: PartContext, reckoned: Mapping[str, float]
) -> str | None:
    """Why a contender is not started, or None; one that compiles needs time for that."""
    needed = 0.0
    if contender.compiles:
        needed = reckoned.get(contender.name, context.sizes.compile_seconds)
    return contender.missing or (None if context.seconds_left() > needed else NO_TIME)


def timed_step(step: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Milliseconds of one step, on the device and until it returned to the host.

    On CUDA by events around it, with nothing queued before, so that slow launches by the host
    count.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        step()
        spent = 1e3 * (time.perf_counter() - started)
        return spent, spent
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    begin.record()
    started = time.perf_counter()
    step()
    host = 1e3 * (time.perf_counter() - started)
    end.record()
    synchronize(device)
    return begin.elapsed_time(end), host


def give_back(device: torch.device) -> None:
    """Frees memory that is no longer referenced."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _kept_finite(params: Sequence[nn.Parameter]) -> bool:
    """Whether all weights are finite; others become normal again, for who steps them next."""
    is_finite = all(bool(torch.isfinite(param).all()) for param in params)
    if not is_finite:
        with torch.no_grad():
            for param in params:
                param.normal_(std=WEIGHT_SCALE)
    return is_finite


def _take_rounds(
    runners: Sequence[Runner], gradients: Gradients, context: PartContext, *, most: int
) -> None:
    """Times all contenders again in turn: the fewest rounds, and more while there is time."""
    fewest = context.sizes.rounds[0]
    until = context.seconds_left() * (1 - ROUNDS_SHARE)
    for number in range(WARM_ROUNDS + most):
        if number >= WARM_ROUNDS + fewest and context.seconds_left() < until:
            break
        for runner in runners:
            if number <= WARM_ROUNDS:
                runner.step_ms.clear()
                runner.host_ms.clear()
            gradients.hand_out(runner.params)
            step_ms, host_ms = timed_step(runner.step, context.device)
            runner.step_ms.append(step_ms)
            runner.host_ms.append(host_ms)
