"""The contenders of the step table: NorMuon in several ways, peers, and AdamW for reference."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from normuon.orthogonalize import (
    flops_per_matrix,
    resolve_backend,
    resolve_coefficients,
    resolve_ns_dtype,
)
from normuon.orthogonalize.fused import why_not_fused, why_not_symmetric
from normuon.orthogonalize.kernels import KERNEL_DTYPE, PACKAGE, why_unavailable
from normuon_lab.bench.contender import (
    LR,
    NS_STEPS,
    Contender,
    builder,
    chosen,
    why_not_compiled,
)
from normuon_lab.bench.peers import dion_normuon, torch_muon

FIRST = "NorMuon"
CAPTURED = "NorMuon captured"
NEEDS_CUDA = "it needs a CUDA device"
SLOW_HERE = "it compiles, which a dry run leaves out unless --only names it"


def step_contenders(
    device: torch.device, *, dion: Path | None, only: Sequence[str] = ()
) -> tuple[Contender, ...]:
    """All of them, or those that `only` names and NorMuon; those that compile come last.

    Raises:
        InputError: no name matches.
    """
    needs_cuda = None if device.type == "cuda" else NEEDS_CUDA
    own = partial(_own, device=device, fused=why_not_fused(device.type) is None)
    taken = resolve_backend("auto", device=device, dtype=torch.bfloat16)
    same_as_first = f"{FIRST} takes this backend here" if taken == "triton" else None
    why_not_triton = why_not_symmetric(device, torch.bfloat16) or same_as_first
    everyone = [
        own(FIRST),
        own("NorMuon, full products", backend="eager"),
        own("NorMuon unfused", backend="eager", options={"fused": False}, fused=False),
        torch_muon(),
        Contender(
            name="AdamW fused",
            package="torch",
            build=builder("torch.optim", "AdamW", lr=LR, weight_decay=0.0, fused=True),
            ns_dtype=None,
        ),
        own("NorMuon triton", backend="triton", missing=why_not_triton),
        # Last of those that do not compile: a capture that fails may trouble who comes after it.
        own(CAPTURED, captured=True, missing=needs_cuda),
        own(
            "NorMuon kernels",
            backend="kernels",
            compiles=True,
            missing=why_unavailable(device, torch.bfloat16),
        ),
        own("NorMuon compile", backend="compile", compiles=True, missing=why_not_compiled()),
        dion_normuon("dion NorMuon", dion),
        dion_normuon("dion NorMuon, Triton", dion, missing=needs_cuda, use_triton=True),
        Contender(
            name="gram-newton-schulz Muon",
            package="gram-newton-schulz",
            build=builder(PACKAGE, lr=LR, weight_decay=0.0),
            ns_dtype="float16",
            compiles=True,
            missing=needs_cuda
            if importlib.util.find_spec(PACKAGE) is not None
            else "not installed: pip install gram-newton-schulz",
        ),
    ]
    if needs_cuda and not only:
        everyone = [
            replace(one, missing=one.missing or SLOW_HERE) if one.compiles else one
            for one in everyone
        ]
    found = chosen(everyone, only)
    return tuple(found if found[0].name == FIRST else (everyone[0], *found))


def _own(
    name: str,
    *,
    device: torch.device,
    backend: str = "auto",
    options: dict[str, Any] | None = None,
    **fields: Any,
) -> Contender:
    dtype = resolve_ns_dtype(None, param_dtype=torch.float32, device=device)
    taken = resolve_backend("auto", device=device, dtype=dtype) if backend == "auto" else backend
    multiplies_in = KERNEL_DTYPE if taken == "kernels" else dtype
    return Contender(
        name=name,
        build=builder(
            "normuon", "NorMuon", lr=LR, weight_decay=0.0, ns_backend=backend, **(options or {})
        ),
        ns_dtype=str(multiplies_in).removeprefix("torch."),
        # NorMuon's model, which counts products in full.
        flops_per_matrix=partial(
            flops_per_matrix,
            coefficients=resolve_coefficients("jordan", NS_STEPS),
            dtype=dtype,
            device_type=device.type,
        ),
        hides_products=taken in ("kernels", "triton"),
        **fields,
    )
