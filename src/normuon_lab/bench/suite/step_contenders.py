"""Whose steps the step table times: NorMuon in several ways, peers, and AdamW for reference."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from normuon import NorMuon
from normuon.orthogonalize import (
    flops_per_matrix,
    resolve_backend,
    resolve_coefficients,
    resolve_ns_dtype,
)
from normuon.orthogonalize.fused import why_not_fused, why_not_symmetric
from normuon.orthogonalize.kernels import KERNEL_DTYPE, PACKAGE, why_unavailable
from normuon_lab.bench.own import why_not_compiled
from normuon_lab.bench.peers import DION_URL
from normuon_lab.errors import require

LR, NS_STEPS = 1e-3, 5
FIRST = "NorMuon"
NEEDS_CUDA = "it needs a CUDA device"
SLOW_HERE = "it compiles, which a dry run leaves out unless --only names it"

Builder = Callable[[Sequence[nn.Parameter]], Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepContender:
    """One optimizer of the step table.

    Attributes:
        name: for people.
        build: makes it.
        ns_dtype: in which its Newton-Schulz multiplies; None without one.
        compiles: whether its first step takes long.
        captured: whether its step is captured in a CUDA graph and replayed.
        missing: why it cannot run here, or None.
        flops_per_matrix: FLOPs of one matrix by NorMuon's model, which counts products in full,
            or None.
        hides_products: whether a counter misses products of its kernels.
        fused: for NorMuon, whether its elementwise passes are Triton kernels; None for others.
    """

    name: str
    build: Builder
    ns_dtype: str | None
    compiles: bool = False
    captured: bool = False
    missing: str | None = None
    flops_per_matrix: Callable[[int, int], int] | None = None
    hides_products: bool = False
    fused: bool | None = None


def step_contenders(
    device: torch.device, *, dion: Path | None, only: Sequence[str] = ()
) -> tuple[StepContender, ...]:
    """All of them, those that compile last.

    Args:
        device: where they run.
        dion: a checkout of microsoft/dion, or None.
        only: patterns of names; empty for everyone. NorMuon stays, since all are compared with it.

    Raises:
        InputError: no name matches.
    """
    on_cuda = device.type == "cuda"
    fused = why_not_fused(device.type) is None
    taken = resolve_backend("auto", device=device, dtype=torch.bfloat16)
    same_as_first = f"{FIRST} takes this backend here" if taken == "triton" else None
    everyone = (
        _own(FIRST, device, fused=fused),
        _own("NorMuon, full products", device, fused=fused, backend="eager"),
        _own("NorMuon unfused", device, fused=False, backend="eager", options={"fused": False}),
        StepContender(
            name="torch.optim.Muon",
            build=lambda params: torch.optim.Muon(params, lr=LR, weight_decay=0.0),
            ns_dtype="bfloat16",
        ),
        StepContender(
            name="AdamW fused",
            build=lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True),
            ns_dtype=None,
        ),
        _own(
            "NorMuon triton",
            device,
            fused=fused,
            backend="triton",
            missing=why_not_symmetric(device, torch.bfloat16) or same_as_first,
        ),
        # Last of those that do not compile: a capture that fails may trouble who comes after it.
        _own(
            "NorMuon captured",
            device,
            fused=fused,
            captured=True,
            missing=None if on_cuda else NEEDS_CUDA,
        ),
        _own(
            "NorMuon kernels",
            device,
            fused=fused,
            backend="kernels",
            compiles=True,
            missing=why_unavailable(device, torch.bfloat16),
        ),
        _own(
            "NorMuon compile",
            device,
            fused=fused,
            backend="compile",
            compiles=True,
            missing=why_not_compiled(),
        ),
        *_dion(dion, on_cuda=on_cuda),
        _gram_newton_schulz(on_cuda=on_cuda),
    )
    if not on_cuda and not only:
        everyone = tuple(
            replace(one, missing=one.missing or SLOW_HERE) if one.compiles else one
            for one in everyone
        )
    chosen = tuple(
        one for one in everyone if not only or any(fnmatchcase(one.name, p) for p in only)
    )
    known = ", ".join(one.name for one in everyone)
    require(bool(chosen), f"--only {' '.join(only)}: no name matches; known: {known}")
    return chosen if chosen[0].name == FIRST else (everyone[0], *chosen)


def _own(
    name: str,
    device: torch.device,
    *,
    fused: bool,
    backend: str = "auto",
    options: dict[str, Any] | None = None,
    compiles: bool = False,
    captured: bool = False,
    missing: str | None = None,
) -> StepContender:
    def build(params: Sequence[nn.Parameter]) -> Optimizer:
        given: dict[str, Any] = {"ns_backend": backend, **(options or {})}
        return NorMuon(params, lr=LR, weight_decay=0.0, **given)

    dtype = resolve_ns_dtype(None, param_dtype=torch.float32, device=device)
    count = partial(
        flops_per_matrix,
        coefficients=resolve_coefficients("jordan", NS_STEPS),
        dtype=dtype,
        device_type=device.type,
        orthogonalizer="auto",
    )
    taken = resolve_backend("auto", device=device, dtype=dtype) if backend == "auto" else backend
    multiplies_in = KERNEL_DTYPE if taken == "kernels" else dtype
    return StepContender(
        name=name,
        build=build,
        ns_dtype=str(multiplies_in).removeprefix("torch."),
        compiles=compiles,
        captured=captured,
        missing=missing,
        flops_per_matrix=count,
        hides_products=taken in ("kernels", "triton"),
        fused=fused,
    )


def _dion(path: Path | None, *, on_cuda: bool) -> tuple[StepContender, ...]:
    def build(options: dict[str, Any], params: Sequence[nn.Parameter]) -> Optimizer:
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        made: Optimizer = importlib.import_module("dion").NorMuon(
            list(params), lr=LR, weight_decay=0.0, **options
        )
        return made

    absent = f"give --dion PATH, a checkout of {DION_URL}" if path is None else why_not_compiled()
    needs_triton = None if on_cuda else NEEDS_CUDA
    return (
        StepContender(
            name="dion NorMuon",
            build=partial(build, {}),
            ns_dtype="bfloat16",
            compiles=True,
            missing=absent,
        ),
        StepContender(
            name="dion NorMuon, Triton",
            build=partial(build, {"use_triton": True}),
            ns_dtype="bfloat16",
            compiles=True,
            missing=absent or needs_triton,
        ),
    )


def _gram_newton_schulz(*, on_cuda: bool) -> StepContender:
    def build(params: Sequence[nn.Parameter]) -> Optimizer:
        muon = importlib.import_module(PACKAGE).Muon
        made: Optimizer = muon(list(params), lr=LR, weight_decay=0.0)
        return made

    missing = None if on_cuda else NEEDS_CUDA
    if importlib.util.find_spec(PACKAGE) is None:
        missing = "not installed: pip install gram-newton-schulz"
    return StepContender(
        name="gram-newton-schulz Muon",
        build=build,
        ns_dtype="float16",
        compiles=True,
        missing=missing,
    )
