"""Contenders side by side in one process: each prepared and counted once, then timed in turn."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.matrices import MatrixClass
from normuon_lab.bench.measure import Gradients, matmul_peak, normal_matrices, peak_side, timed
from normuon_lab.bench.peers import PeerPaths
from normuon_lab.bench.polar import polar_errors, polar_factor
from normuon_lab.bench.runner import Runner, TooSlowError, prepare
from normuon_lab.errors import in_words

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """What to measure.

    Attributes:
        matrices: that every step takes; weights are float32.
        title: what they are, for people.
        device: where.
        paths: of peers that no registry has.
        dtypes: of our Newton-Schulz; peers that take a dtype get the first.
        coefficients: tables of ours.
        rounds: timed steps of each contender.
        threads: of the CPU; None leaves torch's own number.
        with_peers: whether peers take part.
        peer_seconds: what a peer may take, compiling apart; one that would take more does not run.
        only: patterns of contenders' names, as a shell matches them; empty for everyone.
        with_polar: whether to compare directions with the polar factor.
        seed: of weights and gradients, both normal.
        command: what was typed.
    """

    matrices: tuple[MatrixClass, ...]
    title: str
    device: torch.device
    paths: PeerPaths
    dtypes: tuple[str, ...] = ("auto",)
    coefficients: tuple[str, ...] = ("jordan",)
    rounds: int = 7
    threads: int | None = None
    with_peers: bool = True
    peer_seconds: float = math.inf
    only: tuple[str, ...] = ()
    with_polar: bool = True
    seed: int = 0
    command: str = ""


@dataclass(slots=True)
class Race:
    """What came of it.

    Attributes:
        entries: contenders that ran, in the order given.
        not_run: why the others did not, by name.
        peak_side: side of the square product that measured the machine.
        peaks: its FLOP/s, one per round, by dtype.
    """

    entries: list[Runner]
    not_run: dict[str, str]
    peak_side: int
    peaks: dict[str, list[float]]


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


def run_race(
    contenders: Sequence[Contender], request: BenchRequest, say: Say = lambda text: None
) -> Race:
    """Measures every contender that can run, one step of each after the other, round by round."""
    device = request.device
    weights, grads = normal_matrices(request.matrices, seed=request.seed, device=device)
    gradients, polar = Gradients(grads), {}
    if request.with_polar:
        say("polar factors")
        samples = {(one.shape[0], one.shape[1]): one for one in grads}
        polar = {shape: (sample, polar_factor(sample)) for shape, sample in samples.items()}
    entries: list[Runner] = []
    not_run: dict[str, str] = {}
    for contender in contenders:
        if contender.missing is not None:
            not_run[contender.name] = contender.missing
            continue
        say(f"preparing {contender.name}")
        allowance = Allowance(math.inf if contender.is_own else request.peer_seconds)
        try:
            # Eagerly: compiling a second optimizer for its first step alone takes minutes.
            with torch.compiler.set_stance("force_eager"), allowance:
                errors = {shape: polar_errors(contender, *pair) for shape, pair in polar.items()}
            params = [nn.Parameter(weight.clone()) for weight in weights]
            runner = prepare(contender, params, gradients, device, limit=allowance)
            allowance.check_rounds(request.rounds, 1e-3 * runner.profile.wall_ms)
        except TooSlowError as reason:
            limit = f"--peer-seconds {request.peer_seconds:g}"
            not_run[contender.name] = f"slower than {limit}: {reason}"
        except Exception as error:  # A peer's fault is a finding, and the others still run.
            not_run[contender.name] = in_words(error)
        else:
            runner.polar = errors
            entries.append(runner)
    side = peak_side([one.shape for one in request.matrices])
    machine = {
        dtype: matmul_peak(side, getattr(torch, dtype), device)
        for dtype in dict.fromkeys(str(entry.contender.ns_dtype) for entry in entries)
    }
    race = Race(entries, not_run, side, {dtype: [] for dtype in machine})
    for number in range(request.rounds):
        say(f"round {number + 1} of {request.rounds}")
        for dtype, flops_per_second in machine.items():
            race.peaks[dtype].append(flops_per_second())
        for entry in entries:
            gradients.hand_out(entry.params)
            entry.step_ms.append(1e3 * timed(entry.step, device))
    return race
