"""Other packages' optimizers as contenders: how each is built, what it computes, how to get it.

Nothing is imported before a contender is built, and what is missing is described all the same.
Every peer runs as released with weight decay 0; where it cannot, its note says what was done.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from normuon_lab.bench.contender import LR, Builder, Contender, builder, why_not_compiled
from normuon_lab.errors import InputError, require

JORDAN = (3.4445, -4.7750, 2.0315)
DION_URL = "github.com/microsoft/dion"
AUTHORS_URL = "github.com/zichongli5/NorMuon"


@dataclass(frozen=True, slots=True)
class PeerPaths:
    """Peers that no registry has: a checkout of microsoft/dion, and the authors' normuon.py.

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

    `ns_dtype` is for peers whose Newton-Schulz takes a dtype; the others have their own.
    """
    return (
        torch_muon(),
        *_optimuon(ns_dtype),
        *_pytorch_optimizer(),
        _peer(
            "heavyball Muon",
            "heavyball",
            builder("heavyball", lr=LR, weight_decay=0),
            coefficients="you",
            compiles=True,
            missing=_why_not_installed("heavyball"),
        ),
        _muonium(device),
        _peer(
            "muon-fsdp2",
            "muon-fsdp2",
            builder("muon_fsdp2", group={"lr": LR, "use_muon": True}),
            compiles=True,
            missing=_why_not_installed("muon-fsdp2"),
        ),
        dion_normuon("dion NorMuon", paths.dion),
        _authors(paths.authors),
    )


def torch_muon() -> Contender:
    """torch's own Muon."""
    return _peer("torch.optim.Muon", "torch", builder("torch.optim", lr=LR, weight_decay=0.0))


def dion_normuon(
    name: str, path: Path | None, *, missing: str | None = None, **options: Any
) -> Contender:
    """Dion's NorMuon from a checkout, with options of its own."""

    def find_checkout() -> None:
        if str(path) not in sys.path:
            sys.path.insert(0, str(path))

    of_dion = partial(builder, "dion", before=find_checkout, lr=LR, weight_decay=0.0, **options)
    return _peer(
        name,
        "dion",
        of_dion(name="NorMuon"),
        build_unscaled=of_dion(name="Muon"),
        coefficients="polar_express",
        compiles=True,
        missing=f"give --dion PATH, a checkout of {DION_URL}"
        if path is None
        else why_not_compiled() or missing,
    )


def _peer(
    name: str,
    package: str,
    build: Builder,
    *,
    ns_dtype: str = "bfloat16",
    compiles: bool = False,
    missing: str | None = None,
    **fields: Any,
) -> Contender:
    if compiles:
        missing = missing or why_not_compiled()
    return Contender(
        name=name,
        package=package,
        build=build,
        ns_dtype=ns_dtype,
        compiles=compiles,
        missing=missing,
        **fields,
    )


def _optimuon(ns_dtype: str) -> tuple[Contender, ...]:
    variants: dict[str, dict[str, Any]] = {
        "": {},
        ", no restart": {"gns_restart_after": None},
        ", jordan": {"ns_coefficients": JORDAN, "ns_norm_scale": 1.0},
    }
    common: dict[str, Any] = {"lr": LR, "gram_ns": True, "ns_dtype": getattr(torch, ns_dtype)}
    return tuple(
        _peer(
            f"optimuon Gram {ns_dtype}{suffix}",
            "optimuon",
            builder("optimuon", **common, normuon=True, **options),
            build_unscaled=builder("optimuon", **common, normuon=False, **options),
            method="gram",
            coefficients="jordan" if "ns_coefficients" in options else "polar_express",
            ns_dtype=ns_dtype,
            missing=_why_not_installed("optimuon"),
        )
        for suffix, options in variants.items()
    )


def _pytorch_optimizer() -> tuple[Contender, ...]:
    dtypes = {"newton_schulz": "bfloat16", "gram_newton_schulz": "float16"}
    return tuple(
        _peer(
            f"pytorch_optimizer Muon {'Gram ' if 'gram' in method else ''}{dtype}",
            "pytorch_optimizer",
            builder("pytorch_optimizer", group={"use_muon": True}, lr=LR, ns_method=method),
            method=method.removesuffix("_newton_schulz"),
            ns_dtype=dtype,
            missing=_why_not_installed("pytorch_optimizer"),
        )
        for method, dtype in dtypes.items()
    )


def _muonium(device: torch.device) -> Contender:
    on_cuda = device.type == "cuda"

    def replace_triton() -> None:
        importlib.import_module("muonium.optim")
        if not on_cuda:
            package: Any = importlib.import_module("muonium.orthogonalize.orthogonalize")
            package.pe_loop_triton = package.pe_loop

    of_muonium = partial(builder, "muonium.optim", before=replace_triton, lr=LR, wd=0.0)
    return _peer(
        "muonium NorMuon",
        "muonium",
        of_muonium(group={"algorithm": "normuon"}),
        build_unscaled=of_muonium(group={"algorithm": "muon"}),
        coefficients="polar_express",
        compiles=True,
        missing=_why_not_installed("muonium"),
        note=None
        if on_cuda
        else "as released it asserts a CUDA device: its plain loop stands in for its Triton one",
    )


def _authors(path: Path | None) -> Contender:
    def build(params: Sequence[nn.Parameter]) -> Optimizer:
        module = _module_from(path)
        released = module.zeropower_via_newtonschulz5

        def in_weights_dtype(grad: Tensor, steps: int = 5) -> Tensor:
            return released(grad, steps).to(grad.dtype)

        module.zeropower_via_newtonschulz5 = in_weights_dtype
        made: Optimizer = module.SingleDeviceNorMuon(params, lr=LR)
        return made

    def build_unscaled(params: Sequence[nn.Parameter]) -> Optimizer:
        """Plain descent along what their orthogonaliser returns: the file has no Muon."""
        direction = _module_from(path).zeropower_via_newtonschulz5
        descent = torch.optim.SGD(params, lr=LR)

        def turn(*_: Any) -> None:
            for param in params:
                param.grad = direction(param.grad).to(param.dtype)

        descent.register_step_pre_hook(turn)
        return descent

    return _peer(
        "authors' NorMuon",
        "authors",
        build,
        build_unscaled=build_unscaled,
        missing=f"give --authors FILE, normuon.py of {AUTHORS_URL}" if path is None else None,
        note="as released it takes bfloat16 weights only: what its Newton-Schulz returns is cast "
        "to float32",
    )


def _why_not_installed(distribution: str) -> str | None:
    if importlib.util.find_spec(distribution.replace("-", "_")) is not None:
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
