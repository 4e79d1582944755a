"""Contenders side by side in one process: each prepared and counted once, then timed in turn.

The result is plain values: what bench.json says and the table and figure show.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normuon_lab.atomic_files import read_json
from normuon_lab.bench.contender import NS_STEPS, Contender, chosen, own_contenders
from normuon_lab.bench.matrices import MatrixClass
from normuon_lab.bench.measure import (
    PRODUCTS,
    Gradients,
    StepProfile,
    matmul_peak,
    median_ratio,
    normal_matrices,
    peak_side,
    quartiles,
    timed,
)
from normuon_lab.bench.peers import PeerPaths, peer_contenders
from normuon_lab.bench.polar import polar_errors, polar_factor
from normuon_lab.bench.runner import Runner, TooSlowError, prepare
from normuon_lab.errors import RunsFailedError, in_words
from normuon_lab.machine import describe_machine, utc_now, version_of

KIND = "normuon bench"
SCHEMA_VERSION = 1
NUM_REST = 6
"""Operators besides matrix products that a profile names."""

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """What to measure, in the words of `normuon bench`'s options.

    Attributes:
        matrices: that every step takes; weights are float32.
        title: what they are, for people.
        paths: of peers that no registry has.
        rounds: timed steps of each contender.
        with_peers: whether peers take part.
        with_polar: whether to compare directions with the polar factor.
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
    runner: Runner | None
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
            runner.polar = errors
            entries.append(runner)
        except TooSlowError as reason:
            limit = f"--peer-seconds {request.peer_seconds:g}"
            not_run[contender.name] = f"slower than {limit}: {reason}"
        except Exception as error:  # A peer's fault is a finding, and the others still run.
            not_run[contender.name] = in_words(error)
        runner = None  # The memory of one that was too slow is the next one's.
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


def run_bench(request: BenchRequest, say: Say = lambda text: None) -> dict[str, Any]:
    """Measures, and returns what bench.json holds.

    Raises:
        InputError: no contender's name matches `only`.
        RunsFailedError: no contender could run; names the reason of each.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    own = own_contenders(
        dtypes=request.dtypes, coefficients=request.coefficients, device=request.device
    )
    peers = (
        peer_contenders(ns_dtype=str(own[0].ns_dtype), device=request.device, paths=request.paths)
        if request.with_peers
        else ()
    )
    race = run_race(chosen((*own, *peers), request.only), request, say)
    if not race.entries:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in race.not_run.items())
        raise RunsFailedError(f"no contender could run: {reasons}")
    return bench_contents(request, race)


def bench_contents(request: BenchRequest, race: Race) -> dict[str, Any]:
    """A race as plain values."""
    threads = torch.get_num_threads()
    reference = race.entries[0]
    matrices = request.matrices
    return {
        "kind": KIND,
        "schema_version": SCHEMA_VERSION,
        "command": request.command,
        "created": utc_now(),
        "machine": {**describe_machine(num_workers=1), "threads_per_worker": threads},
        "device": _device_name(request.device),
        "title": request.title,
        "seed": request.seed,
        "rounds": request.rounds,
        "weights_dtype": "float32",
        "matrices": [asdict(one) for one in matrices],
        "normuon_state_elements": sum(m.count * m.rows * (m.cols + 1) for m in matrices),
        "largest_class_bytes": 4 * max(one.numel for one in matrices),
        "matmul_peak_side": race.peak_side,
        "matmul_peak_flops_per_second": {
            dtype: statistics.median(rates) for dtype, rates in race.peaks.items()
        },
        "matmul_peak_rounds": race.peaks,
        "reference": reference.contender.name,
        "contenders": [_entry_values(entry, request, race) for entry in race.entries],
        "not_run": race.not_run,
    }


def read_bench(path: Path) -> dict[str, Any]:
    """A bench.json of this version.

    Raises:
        InputError: it is none.
    """
    return read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)


def _entry_values(entry: Runner, request: BenchRequest, race: Race) -> dict[str, Any]:
    contender = entry.contender
    bounds_ms = [1e3 * entry.flops / rate for rate in race.peaks[str(contender.ns_dtype)]]
    return {
        "name": contender.name,
        "package": contender.package,
        "version": version_of(contender.package),
        "method": contender.method,
        "coefficients": contender.coefficients,
        "ns_steps": NS_STEPS,
        "ns_dtype": contender.ns_dtype,
        "note": contender.note,
        "step_ms": entry.step_ms,
        "median_ms": statistics.median(entry.step_ms),
        "min_ms": min(entry.step_ms),
        "quartiles_ms": quartiles(entry.step_ms),
        "ratio_to_reference": median_ratio(entry.step_ms, race.entries[0].step_ms),
        "flops": entry.flops,
        "flops_by_model": contender.flops_by_model(request.matrices),
        # Kernels of one's own may hide their products from the counter.
        "bound_ms": statistics.median(bounds_ms) if entry.flops else None,
        "time_over_bound": median_ratio(entry.step_ms, bounds_ms) if entry.flops else None,
        "state_elements": entry.state_elements,
        "state_bytes": entry.state_bytes,
        "scratch_bytes": entry.scratch_bytes,
        "scratch_kept_bytes": entry.scratch_kept_bytes,
        "polar": [
            {"rows": rows, "cols": cols, **errors} for (rows, cols), errors in entry.polar.items()
        ],
        "profile": _profile_values(entry.profile),
    }


def _profile_values(profile: StepProfile) -> dict[str, Any]:
    rest = {one.name: one.ms for one in profile.operators if one.name not in PRODUCTS}
    products_ms = sum(one.ms for one in profile.operators if one.name in PRODUCTS)
    by_time = sorted(rest.items(), key=lambda item: -item[1])
    return {
        "wall_ms": profile.wall_ms,
        "products_ms": products_ms,
        "products_share": products_ms / profile.wall_ms,
        "rest_ms": sum(rest.values()),
        "rest_by_operator_ms": dict(by_time[:NUM_REST]),
        # Python, and on an accelerator waiting for it.
        "outside_ms": max(0.0, profile.wall_ms - sum(one.ms for one in profile.operators)),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def polar_error(values: Mapping[str, Any]) -> float | None:
    """A contender's largest direction error over the shapes; None where none was measured."""
    return max((one["direction_error"] for one in values["polar"]), default=None)
