"""NorMuon's own contenders: every orthogonaliser, backend, dtype and table of coefficients."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import partial
from itertools import product
from typing import Any

import torch

from normuon import NorMuon
from normuon.orthogonalize import (
    METHODS,
    Backend,
    flops_per_matrix,
    orthogonalize,
    resolve_coefficients,
    resolve_ns_dtype,
)
from normuon.orthogonalize.fused import why_not_symmetric
from normuon.orthogonalize.kernels import why_unavailable
from normuon_lab.bench.contender import OWN, Contender

NS_STEPS = 5
BACKENDS: tuple[Backend, ...] = ("eager", "compile", "triton", "kernels")
AUTO = "auto"


def own_contenders(
    *, dtypes: Sequence[str], coefficients: Sequence[str], device: torch.device
) -> tuple[Contender, ...]:
    """Every way to take a NorMuon step, what cannot run here included; the first is the default.

    Args:
        dtypes: of Newton-Schulz, as torch names them; ``"auto"`` is what the optimizer would
            choose. The first goes with every orthogonaliser and backend.
        coefficients: tables' names, of which the same holds.
        device: where the steps run.

    Returns:
        The first dtype and table with every orthogonaliser and backend; every other pair of dtype
        and table with the automatic orthogonaliser, eager.
    """
    resolved = list(dict.fromkeys(_resolved(name, device) for name in dtypes))
    (dtype, table), *others = product(resolved, dict.fromkeys(coefficients))
    every_way = [
        _own(method, backend, dtype, table, device)
        for backend, method in product(BACKENDS, (AUTO, *METHODS))
    ]
    return (*every_way, *(_own(AUTO, "eager", dtype, table, device) for dtype, table in others))


def why_not_compiled() -> str | None:
    """What torch.compile lacks here, or None."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if any(shutil.which(compiler) for compiler in compilers):
        return None
    return "torch.compile needs a C++ compiler, and none was found: install g++"


def _resolved(dtype: str, device: torch.device) -> torch.dtype:
    given = None if dtype == AUTO else getattr(torch, dtype)
    return resolve_ns_dtype(given, param_dtype=torch.float32, device=device)


def _own(
    method: str, backend: Backend, dtype: torch.dtype, table: str, device: torch.device
) -> Contender:
    missing = None
    if backend == "kernels":
        missing = why_unavailable(device, dtype)
    elif backend == "triton":
        missing = why_not_symmetric(device, dtype)
    elif backend == "compile":
        missing = why_not_compiled()
    options: dict[str, Any] = {
        "ns_dtype": dtype,
        "orthogonalizer": method,
        "ns_backend": backend,
        "ns_coefficients": table,
        "ns_steps": NS_STEPS,
        "weight_decay": 0.0,
    }
    triples = resolve_coefficients(table, NS_STEPS)
    dtype_name = str(dtype).removeprefix("torch.")
    unusual = [word for word, usual in ((backend, BACKENDS[0]), (table, "jordan")) if word != usual]
    return Contender(
        name=" ".join(("NorMuon", method, dtype_name, *unusual)),
        package=OWN,
        build=partial(_build, options, "normuon"),
        build_unscaled=partial(_build, options, "muon"),
        method=method,
        coefficients=table,
        ns_steps=NS_STEPS,
        ns_dtype=dtype_name,
        compiles=backend == "compile",
        missing=missing,
        orthogonalize=partial(
            orthogonalize,
            coefficients=triples,
            dtype=dtype,
            orthogonalizer=method,
            backend=backend,
        ),
        # The model counts what the eager backend does; the others compute products in full.
        flops_per_matrix=partial(
            flops_per_matrix,
            coefficients=triples,
            dtype=dtype,
            device_type=device.type,
            orthogonalizer=method,
        )
        if backend == "eager"
        else None,
    )


def _build(
    options: dict[str, Any], algorithm: str, params: Sequence[torch.nn.Parameter]
) -> torch.optim.Optimizer:
    return NorMuon([{"params": list(params), "algorithm": algorithm}], lr=1e-3, **options)
