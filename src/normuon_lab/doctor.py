"""`normuon doctor`: versions, devices, what NorMuon chooses on each, and what was tested there.

Its output is the start of a bug report, so it has no host name, user or paths.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normuon_lab.atomic_files import read_toml
from normuon_lab.machine import processor_name, version_of

# The command line is read before torch is imported, which takes seconds.
if TYPE_CHECKING:
    import torch

SCHEMA_VERSION = 2

PACKAGES = {
    "library": ("normuon", "torch"),
    "kernels": ("gram-newton-schulz", "triton"),
    "lab": ("transformers", "datasets", "tokenizers"),
    "frameworks": ("accelerate", "peft", "lightning", "deepspeed", "torchtitan", "timm"),
}
EXAMPLE_SHAPE = (4096, 14336)
"""An example of what `auto` chooses: Llama-3-8B's down projection."""

TESTED = read_toml(Path(__file__).with_name("doctor.toml"))
"""By device type, what the tests check and what nothing has checked."""


@dataclass(frozen=True, kw_only=True)
class DoctorCommand:
    """Print versions, devices, what NorMuon would choose on them, and what was tested on them."""

    json: bool = False
    """Print everything as JSON."""

    def run(self) -> int:
        """Run the command and return its exit code."""
        found = examine()
        print(json.dumps(found, indent=2) if self.json else as_text(found))
        return 0


def examine() -> dict[str, Any]:
    """Everything that the command tells, in plain values."""
    import torch
    import torch.distributed as dist

    devices = [torch.device("cpu")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        assert kind is not None
        count = torch.accelerator.device_count()
        devices += [torch.device(kind.type, index) for index in range(count)]
    distributed = dist.is_available()
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "normuon doctor",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {
            area: {name: _version(name) for name in names} for area, names in PACKAGES.items()
        },
        "collectives": {
            "gloo": distributed and dist.is_gloo_available(),
            "nccl": distributed and dist.is_nccl_available(),
        },
        "devices": [_device(device) for device in devices],
    }


def _device(device: torch.device) -> dict[str, Any]:
    """A device, what is chosen on it for float32 weights, and what was tested on its kind."""
    import torch

    from normuon.orthogonalize import (
        multiplies_bfloat16_natively,
        resolve_backend,
        resolve_coefficients,
        resolve_ns_dtype,
    )
    from normuon.orthogonalize.flops import num_panels
    from normuon.orthogonalize.fused import why_not_fused
    from normuon.orthogonalize.kernels import why_unavailable
    from normuon.orthogonalize.segments import plain_segments, segments_for

    dtype = resolve_ns_dtype(None, param_dtype=torch.float32, device=device)
    coefficients = resolve_coefficients("jordan", 5)
    m, n = EXAMPLE_SHAPE
    panels = num_panels(min(m, n), device_type=device.type)
    segments = segments_for("auto", m, n, coefficients=coefficients, dtype=dtype, panels=panels)
    return {
        "device": str(device),
        "name": _device_name(device),
        "bfloat16_is_native": multiplies_bfloat16_natively(device.type),
        "ns_dtype": str(dtype).removeprefix("torch."),
        "ns_backend": resolve_backend("auto", device=device, dtype=dtype),
        "kernels_unavailable": why_unavailable(device, dtype),
        "orthogonalizer": "newton_schulz" if segments == plain_segments(coefficients) else "gram",
        "example_shape": [m, n],
        "fused_unavailable": why_not_fused(device.type),
        **{
            name: TESTED.get(device.type, TESTED["other"])[name]
            for name in ("proved", "not_proved")
        },
    }


def _device_name(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return processor_name() if device.type == "cpu" else device.type
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, capability {capability}"


def _version(package: str) -> str | None:
    found = version_of(package)
    if found is None and util.find_spec(package.replace("-", "_")) is not None:
        return "unknown version"  # Not installed by a package manager, as on PYTHONPATH.
    return found


def as_text(found: dict[str, Any]) -> str:
    """The output of `examine` as text."""
    lines = [f"Python {found['python']} on {found['system']}"]
    for area, packages in found["packages"].items():
        versions = (f"{name} {version or '-'}" for name, version in packages.items())
        lines.append(f"{area:<12}{', '.join(versions)}")
    available = [name for name, there in found["collectives"].items() if there]
    lines.append(f"{'collectives':<12}{', '.join(available) or '-'}")
    for device in found["devices"]:
        m, n = device["example_shape"]
        native = "native" if device["bfloat16_is_native"] else "emulated"
        kernels = device["kernels_unavailable"]
        lines += [
            "",
            f"{device['device']}: {device['name']}",
            f"  bfloat16 products are {native}: ns_dtype=None computes in {device['ns_dtype']}",
            f"  ns_backend='auto' uses {device['ns_backend']!r}"
            + (f"; not 'kernels': {kernels}" if kernels else ""),
            f"  orthogonalizer='auto' uses {device['orthogonalizer']!r} for {m} x {n}",
            f"  fused=None uses {fused_choice(device['fused_unavailable'])}",
            *(f"  tested by {proof['tests']}: {proof['what']}" for proof in device["proved"]),
            f"  not tested: {'; '.join(device['not_proved'])}",
        ]
    return "\n".join(lines)


def fused_choice(unavailable: str | None) -> str:
    """What ``fused=None`` chooses, in words."""
    if unavailable is None:
        return "Triton kernels"
    return f"torch's own operations: {unavailable}"
