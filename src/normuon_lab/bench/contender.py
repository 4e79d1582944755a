"""Defines a contender, and NorMuon's own ones: every orthogonaliser, backend, dtype and table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

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
from normuon_lab.bench.matrices import MatrixClass
from normuon_lab.errors import require
from normuon_lab.machine import has_cpp_compiler

Builder = Callable[[Sequence[nn.Parameter]], Optimizer]
"""Makes an optimizer of plain matrices ``[out, in]``."""

OWN = "normuon"
LR = 1e-3
NS_STEPS = 5
"""Newton-Schulz steps of every contender."""
BACKENDS: tuple[Backend, ...] = ("eager", "compile", "triton", "kernels")
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One optimizer in a benchmark.

    Attributes:
        name: unique, for people.
        build: makes the optimizer whose steps are timed.
        ns_dtype: dtype of Newton-Schulz, as torch names it without its prefix; None without one.
        package: the distribution it comes from.
        build_unscaled: makes its twin without neuron scaling, Muon, whose first step from zero
            weights is proportional to what the orthogonaliser returned; None where it has no
            scaling.
        method: how the polynomial is evaluated: "newton_schulz", "gram", or "auto" for either by
            shape.
        coefficients: a table's name, in `normuon`'s words.
        compiles: whether its first steps are slow because something is compiled.
        captured: whether its step is captured in a CUDA graph and replayed.
        missing: why it cannot run here, and how to mend it; None if it can.
        note: how it differs from its release.
        orthogonalize: its orthogonaliser alone, ``[B, m, n] -> [B, m, n]``, where that has no
            scale of its own; None where it is not called apart.
        flops_per_matrix: FLOPs that its own model counts for m x n; None without one.
        hides_products: whether a counter misses products of its kernels.
        fused: for NorMuon, whether its elementwise passes are Triton kernels; None for others.
    """

    name: str
    build: Builder
    ns_dtype: str | None
    package: str = OWN
    build_unscaled: Builder | None = None
    method: str = "newton_schulz"
    coefficients: str = "jordan"
    compiles: bool = False
    captured: bool = False
    missing: str | None = None
    note: str | None = None
    orthogonalize: Callable[[Tensor], Tensor] | None = None
    flops_per_matrix: Callable[[int, int], int] | None = None
    hides_products: bool = False
    fused: bool | None = None

    @property
    def is_own(self) -> bool:
        """Whether the contender is NorMuon and not a peer."""
        return self.package == OWN

    def flops_by_model(self, matrices: Iterable[MatrixClass]) -> int | None:
        """FLOPs that its own model counts for one step; None without a model."""
        model = self.flops_per_matrix
        if model is None:
            return None
        return sum(one.count * model(one.rows, one.cols) for one in matrices)


def builder(
    module: str,
    name: str = "Muon",
    *,
    group: dict[str, Any] | None = None,
    before: Callable[[], object] = lambda: None,
    **options: Any,
) -> Builder:
    """Makes an optimizer of a class whose module is imported when it is built, after `before`.

    The class gets the options and, with options of a group, one param group; else parameters.
    """

    def build(params: Sequence[nn.Parameter]) -> Optimizer:
        before()
        given = params if group is None else [{"params": list(params), **group}]
        made: Optimizer = getattr(importlib.import_module(module), name)(given, **options)
        return made

    return build


def chosen(everyone: Sequence[Contender], only: Sequence[str]) -> list[Contender]:
    """The contenders whose names match a shell pattern; all if there is no pattern.

    Raises:
        InputError: no name matches; lists the names.
    """
    found = [one for one in everyone if not only or any(fnmatchcase(one.name, p) for p in only)]
    known = ", ".join(one.name for one in everyone)
    require(bool(found), f"--only {' '.join(only)}: no name matches; known: {known}")
    return found


def why_not_compiled() -> str | None:
    """What torch.compile lacks here, or None."""
    if has_cpp_compiler():
        return None
    return "torch.compile needs a C++ compiler, and none was found: install g++"


def own_contenders(
    *, dtypes: Sequence[str], coefficients: Sequence[str], device: torch.device
) -> tuple[Contender, ...]:
    """Every way to take a NorMuon step, what cannot run here included; the first is the default.

    Args:
        dtypes: of Newton-Schulz, as torch names them; ``"auto"`` is what the optimizer would
            choose. The first goes with every orthogonaliser and backend.
        coefficients: tables' names; the first goes with every orthogonaliser and backend, too.
        device: where the steps run.

    Returns:
        The first dtype and table with every orthogonaliser and backend; every other pair of dtype
        and table with the automatic orthogonaliser, eager.
    """
    resolved = dict.fromkeys(
        resolve_ns_dtype(
            None if name == AUTO else getattr(torch, name), param_dtype=torch.float32, device=device
        )
        for name in dtypes
    )
    (dtype, table), *others = product(resolved, dict.fromkeys(coefficients))
    every_way = [
        _own(method, backend, dtype, table, device)
        for backend, method in product(BACKENDS, (AUTO, *METHODS))
    ]
    return (*every_way, *(_own(AUTO, "eager", dtype, table, device) for dtype, table in others))


def _own(
    method: str, backend: Backend, dtype: torch.dtype, table: str, device: torch.device
) -> Contender:
    why_missing: dict[str, Callable[[], str | None]] = {
        "eager": lambda: None,
        "compile": why_not_compiled,
        "triton": partial(why_not_symmetric, device, dtype),
        "kernels": partial(why_unavailable, device, dtype),
    }
    options: dict[str, Any] = {
        "lr": LR,
        "weight_decay": 0.0,
        "ns_dtype": dtype,
        "orthogonalizer": method,
        "ns_backend": backend,
        "ns_coefficients": table,
        "ns_steps": NS_STEPS,
    }
    evaluated: dict[str, Any] = {
        "coefficients": resolve_coefficients(table, NS_STEPS),
        "dtype": dtype,
        "orthogonalizer": method,
    }
    dtype_name = str(dtype).removeprefix("torch.")
    unusual = [word for word, usual in ((backend, BACKENDS[0]), (table, "jordan")) if word != usual]
    return Contender(
        name=" ".join(("NorMuon", method, dtype_name, *unusual)),
        build=builder("normuon", "NorMuon", group={"algorithm": "normuon"}, **options),
        build_unscaled=builder("normuon", "NorMuon", group={"algorithm": "muon"}, **options),
        ns_dtype=dtype_name,
        method=method,
        coefficients=table,
        compiles=backend == "compile",
        missing=why_missing[backend](),
        orthogonalize=partial(orthogonalize, **evaluated, backend=backend),
        # The model counts what the eager backend does; the others compute products in full.
        flops_per_matrix=partial(flops_per_matrix, **evaluated, device_type=device.type)
        if backend == "eager"
        else None,
    )
