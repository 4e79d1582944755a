"""Other packages' optimizers as contenders: how each is built, what it computes, how to get it.

Nothing is imported before a contender is built, and what is missing is described all the same.
Every peer runs as released with weight decay 0; where it cannot, its note says what was done.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.bench.contender import Contender
from normuon_lab.bench.own import why_not_compiled
from normuon_lab.errors import InputError, require

LR = 1e-3
JORDAN = (3.4445, -4.7750, 2.0315)
DION_URL = "github.com/microsoft/dion"
AUTHORS_URL = "github.com/zichongli5/NorMuon"

Params = Sequence[nn.Parameter]


@dataclass(frozen=True, slots=True)
class PeerPaths:
    """Peers that no registry has, by where the user keeps them.

    Attributes:
        dion: a checkout of microsoft/dion.
        authors: the paper's authors' normuon.py.

    Raises:
        InputError: a path that is not what it should be.
    """

    dion: Path | None = None
    authors: Path | None = None

    def __post_init__(self) -> None:
        require(
            self.dion is None or (self.dion / "dion" / "__init__.py").is_file(),
            f"--dion {self.dion}: it has no dion/__init__.py; give a checkout of {DION_URL}",
        )
        require(
            self.authors is None or self.authors.is_file(),
            f"--authors {self.authors}: give the file normuon.py of {AUTHORS_URL}",
        )


def peer_contenders(
    *, ns_dtype: str, device: torch.device, paths: PeerPaths
) -> tuple[Contender, ...]:
    """Every peer that is known, installed or not.

    Args:
        ns_dtype: for peers whose Newton-Schulz takes a dtype; the others have their own.
        device: where the steps run.
        paths: of peers that no registry has.
    """
    return (
        _torch_muon(),
        *_optimuon(ns_dtype),
        *_pytorch_optimizer(),
        _heavyball(),
        _muonium(device),
        _muon_fsdp2(),
        _dion(paths.dion),
        _authors(paths.authors),
    )


def _torch_muon() -> Contender:
    def build(params: Params) -> Optimizer:
        return torch.optim.Muon(params, lr=LR, weight_decay=0.0)

    return Contender(
        name="torch.optim.Muon",
        package="torch",
        build=build,
        build_unscaled=build,
        method="newton_schulz",
        coefficients="jordan",
        ns_steps=5,
        ns_dtype="bfloat16",
    )


def _optimuon(ns_dtype: str) -> tuple[Contender, ...]:
    variants: dict[str, dict[str, Any]] = {
        "": {},
        ", no restart": {"gns_restart_after": None},
        ", jordan": {"ns_coefficients": JORDAN, "ns_norm_scale": 1.0},
    }

    def build(options: dict[str, Any], normuon: bool, params: Params) -> Optimizer:
        from optimuon import Muon

        dtype = getattr(torch, ns_dtype)
        return Muon(params, lr=LR, gram_ns=True, ns_dtype=dtype, normuon=normuon, **options)

    return tuple(
        Contender(
            name=f"optimuon Gram {ns_dtype}{suffix}",
            package="optimuon",
            build=partial(build, options, True),
            build_unscaled=partial(build, options, False),
            method="gram",
            coefficients="jordan" if "ns_coefficients" in options else "polar_express",
            ns_steps=5,
            ns_dtype=ns_dtype,
            missing=_why_not_installed("optimuon", "optimuon"),
        )
        for suffix, options in variants.items()
    )


def _pytorch_optimizer() -> tuple[Contender, ...]:
    def build(method: str, params: Params) -> Optimizer:
        from pytorch_optimizer import Muon

        options: dict[str, Any] = {"ns_method": method}
        return Muon([{"params": list(params), "use_muon": True}], lr=LR, **options)

    dtypes = {"newton_schulz": "bfloat16", "gram_newton_schulz": "float16"}
    return tuple(
        Contender(
            name=f"pytorch_optimizer Muon {'Gram ' if 'gram' in method else ''}{dtype}",
            package="pytorch_optimizer",
            build=partial(build, method),
            build_unscaled=partial(build, method),
            method=method.removesuffix("_newton_schulz"),
            coefficients="jordan",
            ns_steps=5,
            ns_dtype=dtype,
            missing=_why_not_installed("pytorch_optimizer", "pytorch_optimizer"),
        )
        for method, dtype in dtypes.items()
    )


def _heavyball() -> Contender:
    def build(params: Params) -> Optimizer:
        from heavyball import Muon

        return Muon(params, lr=LR, weight_decay=0)

    return Contender(
        name="heavyball Muon",
        package="heavyball",
        build=build,
        build_unscaled=build,
        method="newton_schulz",
        coefficients="you",
        ns_steps=5,
        ns_dtype="bfloat16",
        compiles=True,
        missing=_why_not_installed("heavyball", "heavyball") or why_not_compiled(),
    )


def _muonium(device: torch.device) -> Contender:
    def build(algorithm: str, params: Params) -> Optimizer:
        from muonium.optim import Muon

        if device.type != "cuda":
            package: Any = importlib.import_module("muonium.orthogonalize.orthogonalize")
            package.pe_loop_triton = package.pe_loop
        group = {"params": list(params), "algorithm": algorithm}
        return Muon([group], lr=LR, wd=0.0)

    return Contender(
        name="muonium NorMuon",
        package="muonium",
        build=partial(build, "normuon"),
        build_unscaled=partial(build, "muon"),
        method="newton_schulz",
        coefficients="polar_express",
        ns_steps=5,
        ns_dtype="bfloat16",
        compiles=True,
        missing=_why_not_installed("muonium", "muonium") or why_not_compiled(),
        note=None
        if device.type == "cuda"
        else "as released it asserts a CUDA device: its plain loop stands in for its Triton one",
    )


def _muon_fsdp2() -> Contender:
    def build(params: Params) -> Optimizer:
        from muon_fsdp2 import Muon

        return Muon([{"params": list(params), "lr": LR, "use_muon": True}])

    return Contender(
        name="muon-fsdp2",
        package="muon-fsdp2",
        build=build,
        build_unscaled=build,
        method="newton_schulz",
        coefficients="jordan",
        ns_steps=5,
        ns_dtype="bfloat16",
        compiles=True,
        missing=_why_not_installed("muon_fsdp2", "muon-fsdp2") or why_not_compiled(),
    )


def _dion(path: Path | None) -> Contender:
    def build(name: str, params: Params) -> Optimizer:
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))
        return getattr(importlib.import_module("dion"), name)(params, lr=LR, weight_decay=0.0)

    missing = f"give --dion PATH, a checkout of {DION_URL}" if path is None else why_not_compiled()
    return Contender(
        name="dion NorMuon",
        package="dion",
        build=partial(build, "NorMuon"),
        build_unscaled=partial(build, "Muon"),
        method="newton_schulz",
        coefficients="polar_express",
        ns_steps=5,
        ns_dtype="bfloat16",
        compiles=True,
        missing=missing,
    )


def _authors(path: Path | None) -> Contender:
    def build(params: Params) -> Optimizer:
        module = _module_from(path)
        released = module.zeropower_via_newtonschulz5

        def in_weights_dtype(grad: Tensor, steps: int = 5) -> Tensor:
            return released(grad, steps).to(grad.dtype)

        module.zeropower_via_newtonschulz5 = in_weights_dtype
        return module.SingleDeviceNorMuon(params, lr=LR)

    def build_unscaled(params: Params) -> Optimizer:
        return DirectionStep(params, _module_from(path).zeropower_via_newtonschulz5)

    return Contender(
        name="authors' NorMuon",
        package="authors",
        build=build,
        build_unscaled=build_unscaled,
        method="newton_schulz",
        coefficients="jordan",
        ns_steps=5,
        ns_dtype="bfloat16",
        missing=f"give --authors FILE, normuon.py of {AUTHORS_URL}" if path is None else None,
        note="as released it takes bfloat16 weights only: what its Newton-Schulz returns is cast "
        "to float32",
    )


class DirectionStep(Optimizer):
    """Steps along a function of each gradient: for files that have an orthogonaliser, but no Muon.

    Args:
        params: matrices.
        direction: ``[m, n] -> [m, n]``.
    """

    def __init__(self, params: Params, direction: Callable[[Tensor], Tensor]) -> None:
        super().__init__(params, {"lr": LR})
        self._direction = direction

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(self._direction(param.grad), alpha=group["lr"])


def _why_not_installed(module: str, distribution: str) -> str | None:
    if importlib.util.find_spec(module) is not None:
        return None
    return f"not installed: pip install {distribution}"


def _module_from(path: Path | None) -> Any:
    assert path is not None, "a contender that is missing is never built"
    spec = importlib.util.spec_from_file_location("authors_normuon", path)
    if spec is None or spec.loader is None:
        raise InputError(f"--authors {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
