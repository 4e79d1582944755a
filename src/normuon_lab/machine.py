"""The machine of a result: its description, and settings of its processor."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

_RECORDED_PACKAGES = ("normuon", "torch", "transformers", "numpy", "scipy")


def describe_machine(*, num_workers: int) -> dict[str, Any]:
    """Plain values that name the machine and the software; no host name, no user."""
    import torch

    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "worker_processes": num_workers,
        "threads_per_worker": 1,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version_of(name) or "not installed" for name in _RECORDED_PACKAGES},
    }


def default_num_workers(num_jobs: int) -> int:
    """As many workers as cores that this process may use, at most one per job."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(cores or 1, num_jobs))


def has_cpp_compiler() -> bool:
    """Whether torch.compile finds a compiler for its code for CPUs."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    return any(shutil.which(compiler) for compiler in compilers)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Inside, this thread rounds denormal numbers, which are slow on CPUs, to zero."""
    import torch

    flushed_before = sys.float_info.min / 2 == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed_before)


def utc_now() -> str:
    """The date and time in UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def version_of(package: str) -> str | None:
    """The version of an installed distribution; None if no package manager installed it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor_name() -> str:
    """The processor's marketing name, with its family and model on Linux."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        fields = [line.partition(":") for line in info.read_text().splitlines()]
        values = {key.strip(): value.strip() for key, _, value in fields}
        if "model name" in values:
            family = f"family {values.get('cpu family')}, model {values.get('model')}"
            return f"{values['model name']} ({family})"
    return platform.processor() or "unknown"
