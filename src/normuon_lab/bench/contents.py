"""A benchmark's result as plain values: what bench.json says and the table and figure show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from normuon_lab.atomic_files import read_json
from normuon_lab.bench.contender import NS_STEPS, chosen, own_contenders
from normuon_lab.bench.matrices import MatrixClass, largest_class_elements
from normuon_lab.bench.measure import median_ratio, quartiles
from normuon_lab.bench.peers import PeerPaths, peer_contenders
from normuon_lab.bench.race import Entry, Race, Say, run_race
from normuon_lab.errors import RunsFailedError
from normuon_lab.machine import describe_machine, utc_now

KIND = "normuon bench"
SCHEMA_VERSION = 1
NUM_REST = 6
"""Operators besides matrix products that a profile names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchRequest:
    """What to measure.

    Attributes:
        matrices: that every step takes.
        title: what they are, for people.
        device: where.
        paths: of peers that no registry has.
        dtypes: of our Newton-Schulz; peers that take a dtype get the first.
        coefficients: tables of ours.
        rounds: timed steps of each contender.
        threads: of the CPU; None leaves torch's own number.
        with_peers: whether peers take part.
        peer_seconds: what a peer may take, compiling apart.
        only: patterns of contenders' names, as a shell matches them; empty for everyone.
        with_polar: whether to compare directions with the polar factor.
        seed: of weights and gradients.
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
    race = run_race(
        chosen((*own, *peers), request.only),
        request.matrices,
        rounds=request.rounds,
        seed=request.seed,
        device=request.device,
        peer_seconds=request.peer_seconds,
        with_polar=request.with_polar,
        say=say,
    )
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
        "matrices": [{"rows": m.rows, "cols": m.cols, "count": m.count} for m in matrices],
        "normuon_state_elements": sum(m.count * m.rows * (m.cols + 1) for m in matrices),
        "largest_class_bytes": 4 * largest_class_elements(matrices),
        "matmul_peak_side": race.peak_side,
        "matmul_peak_flops_per_second": {
            dtype: statistics.median(rates) for dtype, rates in race.peaks.items()
        },
        "matmul_peak_rounds": race.peaks,
        "reference": reference.contender.name,
        "contenders": [_entry_values(entry, race) for entry in race.entries],
        "not_run": race.not_run,
    }


def read_bench(path: Path) -> dict[str, Any]:
    """A bench.json of this version.

    Raises:
        InputError: it is none.
    """
    return read_json(path, kind=KIND, schema_version=SCHEMA_VERSION)


def _entry_values(entry: Entry, race: Race) -> dict[str, Any]:
    contender = entry.contender
    seconds = entry.step_seconds
    bounds = [entry.flops / rate for rate in race.peaks[str(contender.ns_dtype)]]
    return {
        "name": contender.name,
        "package": contender.package,
        "version": _version(contender.package),
        "method": contender.method,
        "coefficients": contender.coefficients,
        "ns_steps": NS_STEPS,
        "ns_dtype": contender.ns_dtype,
        "note": contender.note,
        "step_ms": [1e3 * value for value in seconds],
        "median_ms": 1e3 * statistics.median(seconds),
        "min_ms": 1e3 * min(seconds),
        "quartiles_ms": quartiles([1e3 * value for value in seconds]),
        "ratio_to_reference": median_ratio(seconds, race.entries[0].step_seconds),
        "flops": entry.flops,
        "flops_by_model": _modelled_flops(entry, race),
        # Kernels of one's own may hide their products from the counter.
        "bound_ms": 1e3 * statistics.median(bounds) if entry.flops else None,
        "time_over_bound": median_ratio(seconds, bounds) if entry.flops else None,
        "state_elements": entry.state_elements,
        "state_bytes": entry.state_bytes,
        "scratch_bytes": entry.scratch_bytes,
        "scratch_kept_bytes": entry.scratch_kept_bytes,
        "polar": [
            {"rows": rows, "cols": cols, **errors} for (rows, cols), errors in entry.polar.items()
        ],
        "profile": _profile_values(entry),
    }


def _modelled_flops(entry: Entry, race: Race) -> int | None:
    model = entry.contender.flops_per_matrix
    if model is None:
        return None
    return sum(one.count * model(one.rows, one.cols) for one in race.matrices)


def _profile_values(entry: Entry) -> dict[str, Any]:
    profile = entry.profile
    by_time = sorted(profile.rest_ms.items(), key=lambda item: -item[1])
    return {
        "wall_ms": profile.wall_ms,
        "products_ms": profile.products_ms,
        "products_share": profile.products_ms / profile.wall_ms,
        "rest_ms": sum(profile.rest_ms.values()),
        "rest_by_operator_ms": dict(by_time[:NUM_REST]),
        "outside_ms": profile.outside_ms,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _version(package: str) -> str | None:
    """None for what no package index installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def polar_error(values: Mapping[str, Any]) -> float | None:
    """A contender's largest direction error over the shapes; None where none was measured."""
    return max((one["direction_error"] for one in values["polar"]), default=None)
