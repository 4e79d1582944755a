"""Contenders side by side in one process: each prepared and counted once, then timed in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.matrices import MatrixClass
from normuon_lab.bench.measure import (
    Gradients,
    MatmulPeak,
    StepProfile,
    build_and_step,
    counted_flops,
    normal_matrices,
    peak_side,
    profile_step,
    tensor_elements,
    timed,
)
from normuon_lab.bench.polar import polar_errors, polar_factor
from normuon_lab.errors import in_words

Shape = tuple[int, int]
Say = Callable[[str], None]


@dataclass(slots=True)
class Entry:
    """One contender's figures.

    Attributes:
        contender: who.
        flops: of the matrix products of one step, counted.
        state_elements: of its optimizer state, step counts apart.
        state_bytes: of the same.
        scratch_kept_bytes: what it holds between steps besides parameters, gradients and state.
        scratch_peak_bytes: the most that a step allocates beyond all that is held between steps.
        polar: errors by shape; empty when they were not asked for.
        profile: of one step.
        take_step: takes one and returns its seconds.
        step_seconds: one per round.
    """

    contender: Contender
    flops: int
    state_elements: int
    state_bytes: int
    scratch_kept_bytes: int
    scratch_peak_bytes: int
    polar: dict[Shape, dict[str, float]]
    profile: StepProfile
    take_step: Callable[[], float]
    step_seconds: list[float] = field(default_factory=list)

    @property
    def scratch_bytes(self) -> int:
        """All memory it needs besides parameters, gradients and state."""
        return self.scratch_kept_bytes + self.scratch_peak_bytes


@dataclass(slots=True)
class Race:
    """What came of it.

    Attributes:
        entries: contenders that ran, in the order given.
        not_run: why the others did not, by name.
        matrices: what each of them stepped.
        peak_side: side of the square product that measured the machine.
        peaks: its FLOP/s, one per round, by dtype.
    """

    entries: list[Entry]
    not_run: dict[str, str]
    matrices: tuple[MatrixClass, ...]
    peak_side: int
    peaks: dict[str, list[float]]


class TooSlowError(Exception):
    """A peer would take more time than it was given."""


class Allowance(TorchDispatchMode):
    """The seconds that a contender may take besides compiling; looked at before every operation.

    Args:
        seconds: for everything inside the blocks together.
    """

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._left = seconds
        self._entered = 0.0

    def __enter__(self) -> Any:
        self._entered = time.perf_counter()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        self._left -= time.perf_counter() - self._entered
        super().__exit__(*raised)

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if time.perf_counter() - self._entered > self._left:
            raise TooSlowError("its first steps took longer")
        return operation(*args, **(kwargs or {}))

    def check_rounds(self, rounds: int, seconds_per_step: float) -> None:
        """Raise `TooSlowError` unless there is time for so many steps."""
        needed = rounds * seconds_per_step
        if needed > self._left:
            raise TooSlowError(f"{rounds} steps would take about {needed:.0f} s more")


@dataclass(slots=True)
class _Track:
    """What every contender starts from.

    Attributes:
        weights: copied by each.
        gradients: the same for each.
        polar: a gradient of every shape and its polar factor; empty when errors are not asked for.
        device: where all of them are.
        rounds: timed steps of each contender.
    """

    weights: list[Tensor]
    gradients: Gradients
    polar: dict[Shape, tuple[Tensor, Tensor]]
    device: torch.device
    rounds: int


def run_race(
    contenders: Sequence[Contender],
    matrices: Sequence[MatrixClass],
    *,
    rounds: int,
    seed: int,
    device: torch.device,
    peer_seconds: float = math.inf,
    with_polar: bool = True,
    say: Say = lambda text: None,
) -> Race:
    """Measures every contender that can run.

    Args:
        contenders: who.
        matrices: what a step takes, all of them in every step; weights are float32.
        rounds: timed steps of each, one contender after the other, round by round.
        seed: of weights and gradients, both normal.
        device: where.
        peer_seconds: a peer that would take more than that, compiling apart, does not run.
        with_polar: whether to compare directions with the polar factor.
        say: told what is being done.
    """
    track = _make_track(
        matrices, seed=seed, device=device, rounds=rounds, with_polar=with_polar, say=say
    )
    entries: list[Entry] = []
    not_run: dict[str, str] = {}
    for contender in contenders:
        if contender.missing is not None:
            not_run[contender.name] = contender.missing
            continue
        say(f"preparing {contender.name}")
        allowance = Allowance(math.inf if contender.is_own else peer_seconds)
        try:
            entries.append(_prepared(contender, track, allowance))
        except TooSlowError as reason:
            not_run[contender.name] = f"slower than --peer-seconds {peer_seconds:g}: {reason}"
        except Exception as error:  # A peer's fault is a finding, and the others still run.
            not_run[contender.name] = in_words(error)
    side = peak_side([one.shape for one in matrices])
    machine = {
        dtype: MatmulPeak(side, getattr(torch, dtype), device)
        for dtype in dict.fromkeys(str(entry.contender.ns_dtype) for entry in entries)
    }
    race = Race(entries, not_run, tuple(matrices), side, {dtype: [] for dtype in machine})
    for number in range(rounds):
        say(f"round {number + 1} of {rounds}")
        for dtype, peak in machine.items():
            race.peaks[dtype].append(peak.flops_per_second())
        for entry in entries:
            entry.step_seconds.append(entry.take_step())
    return race


def _make_track(
    matrices: Sequence[MatrixClass],
    *,
    seed: int,
    device: torch.device,
    rounds: int,
    with_polar: bool,
    say: Say,
) -> _Track:
    weights, gradients = normal_matrices(matrices, seed=seed, device=device)
    polar = {}
    if with_polar:
        say("polar factors")
        samples = {(one.shape[0], one.shape[1]): one for one in gradients}
        polar = {shape: (sample, polar_factor(sample)) for shape, sample in samples.items()}
    return _Track(weights, Gradients(gradients), polar, device, rounds)


def _prepared(contender: Contender, track: _Track, allowance: Allowance) -> Entry:
    """Everything but the timed rounds; what is compiled is compiled here.

    Raises:
        TooSlowError: the contender would need more than the allowance.
    """
    # Eagerly, because compiling a second optimizer for its first step alone takes minutes.
    with torch.compiler.set_stance("force_eager"), allowance:
        errors = {shape: polar_errors(contender, *pair) for shape, pair in track.polar.items()}
    params = [nn.Parameter(weight.clone()) for weight in track.weights]

    def count(step: Callable[[], object]) -> int:
        with allowance:
            return counted_flops(step)

    built = build_and_step(contender.build, params, track.gradients, track.device, count=count)
    optimizer = built.optimizer

    def take_step() -> float:
        track.gradients.hand_out(params)
        return timed(optimizer.step, track.device)

    if contender.compiles:
        take_step()
    track.gradients.hand_out(params)
    profile = profile_step(optimizer.step, track.device)
    allowance.check_rounds(track.rounds, 1e-3 * profile.wall_ms)
    return Entry(
        contender=contender,
        flops=built.flops,
        state_elements=tensor_elements(list(optimizer.state.values())),
        state_bytes=built.state_bytes,
        scratch_kept_bytes=built.scratch_kept_bytes,
        scratch_peak_bytes=profile.memory.peak,
        polar=errors,
        profile=profile,
        take_step=take_step,
    )
