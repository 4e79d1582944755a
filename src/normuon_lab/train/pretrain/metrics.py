"""Writes a run's numbers to metrics.jsonl and trackers, and reads the device's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from normuon_lab.atomic_files import write_text
from normuon_lab.errors import RunsFailedError, require
from normuon_lab.train.pretrain.config import PretrainConfig

METRICS_FILE = "metrics.jsonl"

# Dense bfloat16 from NVIDIA's data sheets, in 1e12 FLOPs per second, by a part of the device's
# name. The first that fits counts.
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
    "A100": 312.0,
    "L40S": 362.0,
}


Tracker = tuple[Callable[[int, Mapping[str, float]], object], Callable[[], object]]
"""Takes the numbers of a step; and ends."""


class MetricsLog:
    """Writes rows of numbers, each as one JSON object on a line, and sends them to trackers.

    A run continues from `step`; rows of later steps, from a killed run, are dropped.
    """

    def __init__(self, run_dir: Path, config: PretrainConfig, *, step: int) -> None:
        self._path = run_dir / METRICS_FILE
        names, shown = config.metrics.trackers, config.to_values()
        self._trackers = [_TRACKERS[name](run_dir, step, shown) for name in names]
        kept = [row for row in read_metrics(self._path) if row["step"] <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
        # A line at a time: a row is written whole or, after a crash, is the last and torn.
        self._file = self._path.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
        for _, close in self._trackers:
            close()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a row; values that are not finite become null.

        Raises:
            RunsFailedError: the file cannot be written.
        """
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        try:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
        except OSError as error:
            raise RunsFailedError(f"cannot write {self._path}: {error.strerror}") from None
        for log, _ in self._trackers:
            log(step, values)


def check_trackers(names: Sequence[str]) -> None:
    """Raise `InputError` unless the package of every tracker is installed."""
    for name in names:
        is_installed = find_spec(name) is not None
        require(is_installed, f"--trackers {name}: the package {name} is not installed")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl without an incomplete last line."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def _tensorboard(run_dir: Path, step: int, config: Mapping[str, Any]) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # Hides what a killed run wrote after the checkpoint this one goes on from.
    writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


def _wandb(run_dir: Path, step: int, config: Mapping[str, Any]) -> Tracker:
    import wandb

    run = wandb.init(project="normuon", name=run_dir.name, dir=str(run_dir), config=dict(config))
    return lambda step, values: run.log(dict(values), step=step), run.finish


def _trackio(run_dir: Path, step: int, config: Mapping[str, Any]) -> Tracker:
    import trackio

    trackio.init(project="normuon", name=run_dir.name, config=dict(config), resume="allow")
    return lambda step, values: trackio.log(dict(values), step=step), trackio.finish


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def peak_flops(device: torch.device, given_tflops: float | None) -> float | None:
    """The peak of one device in FLOPs per second; None where it is neither given nor known."""
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def memory_bytes(device: torch.device) -> tuple[int, int]:
    """Bytes in use now and at peak, of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    statm = Path("/proc/self/statm")
    if not statm.exists():  # Not on Linux: only the peak is known.
        return peak, peak
    return int(statm.read_text().split()[1]) * resource.getpagesize(), peak
