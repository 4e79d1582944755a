"""The device and its limits: memory bandwidth and rate of products."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Mapping
from typing import Any

import torch

from normuon_lab.bench.measure import matmul_peak, timed
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.machine import processor_name, version_of

DTYPES = ("bfloat16", "float16", "float32")
REPEATS = 5
PACKAGES = ("torch", "triton", "gram-newton-schulz", "quack-kernels", "nvidia-cutlass-dsl")


def run(context: PartContext) -> dict[str, Any]:
    """Device, versions and roofs."""
    device = context.device
    values: dict[str, Any] = {**device_values(device), "versions": versions()}
    context.keep(values)
    context.say("copy bandwidth")
    values["copy_bytes"] = context.sizes.copy_bytes
    values["copy_bytes_per_second"] = copy_bandwidth(context.sizes.copy_bytes, device)
    context.keep(values)
    rates: list[dict[str, Any]] = []
    values["matmul"] = rates
    for side in context.sizes.matmul_sides:
        for dtype in DTYPES:
            if rates and context.seconds_left() < 0:
                continue
            context.say(f"products of side {side} in {dtype}")
            flops_per_second = matmul_peak(side, getattr(torch, dtype), device)
            median = statistics.median(flops_per_second() for _ in range(REPEATS))
            rates.append({"side": side, "dtype": dtype, "flops_per_second": median})
    return values


def rate_of(values: Mapping[str, Any], dtype: str | None) -> float | None:
    """The highest FLOP/s of products in a dtype that the part "machine" measured, or None."""
    rates = [one for one in values.get("matmul", ()) if one["dtype"] == dtype]
    return max((float(one["flops_per_second"]) for one in rates), default=None)


def copy_bandwidth(num_bytes: int, device: torch.device) -> float:
    """Bytes per second of a copy within the device, those read and those written."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    count = 1 if device.type == "cpu" else 10

    def copy() -> None:
        for _ in range(count):
            target.copy_(source)

    copy()
    return 2 * num_bytes * count / statistics.median(timed(copy, device) for _ in range(REPEATS))


def device_values(device: torch.device) -> dict[str, Any]:
    """Name, memory and driver of a device, and the host beside it."""
    values: dict[str, Any] = {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type != "cuda":
        return {"name": "cpu", "capability": None, "memory_bytes": None, "driver": None, **values}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "capability": [found.major, found.minor],
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "driver": _driver(),
        **values,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python, CUDA and the packages that matter; None for missing ones."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{package: version_of(package) for package in PACKAGES},
        "torch": torch.__version__,
    }
    if found["triton"] is None and importlib.util.find_spec("triton") is not None:
        found["triton"] = "of unknown version"
    return found


def _driver() -> str | None:
    """The driver's version, if nvidia-smi prints it."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split("\n")
    return lines[0].strip() or None
