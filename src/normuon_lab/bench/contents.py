"""A benchmark's result as plain values: what bench.json says and the table and figure show."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from normuon_lab.atomic_files import read_json
from normuon_lab.bench.contender import NS_STEPS, chosen, own_contenders
from normuon_lab.bench.measure import PRODUCTS, StepProfile, median_ratio, quartiles
from normuon_lab.bench.peers import peer_contenders
from normuon_lab.bench.race import BenchRequest, Race, Say, run_race
from normuon_lab.bench.runner import Runner
from normuon_lab.errors import RunsFailedError
from normuon_lab.machine import describe_machine, utc_now, version_of

KIND = "normuon bench"
SCHEMA_VERSION = 1
NUM_REST = 6
"""Operators besides matrix products that a profile names."""


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
