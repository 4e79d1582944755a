"""How far one step's direction is from the polar factor, by dtype and backend.

The first update from zero weights is compared, without neuron scaling.
"""

from __future__ import annotations

from typing import Any

import torch

from normuon_lab.bench.contender import Contender, own_contenders
from normuon_lab.bench.peers import torch_muon
from normuon_lab.bench.polar import polar_errors, polar_factor
from normuon_lab.bench.suite.options import NO_TIME
from normuon_lab.bench.suite.part import PartContext
from normuon_lab.errors import in_words

DTYPES = ("bfloat16", "float16", "float32")


def run(context: PartContext) -> dict[str, Any]:
    """Errors of every contender on every shape; those that compile come last."""
    device = context.device
    torch.manual_seed(context.options.seed)
    values: dict[str, Any] = {"shapes": [], "contenders": [], "not_run": {}}
    samples = []
    for rows, cols in context.sizes.accuracy_shapes:
        context.say(f"polar factor of {rows} x {cols}")
        gradient = torch.randn(rows, cols, device=device)
        samples.append((gradient, polar_factor(gradient)))
        values["shapes"].append([rows, cols])
    for contender in contenders(device):
        reason = _why_not(contender, context)
        if reason is None:
            context.say(contender.name)
            try:
                errors = [polar_errors(contender, *sample) for sample in samples]
            except Exception as error:  # Whoever fails is a finding, and the others still run.
                reason = in_words(error)
            else:
                values["contenders"].append(
                    {"name": contender.name, "ns_dtype": contender.ns_dtype, "errors": errors}
                )
        if reason is not None:
            values["not_run"][contender.name] = reason
        context.keep(values)
    return values


def contenders(device: torch.device) -> list[Contender]:
    """NorMuon in every dtype and backend, and torch.optim.Muon."""
    ours = [
        one
        for dtype in DTYPES
        for one in own_contenders(dtypes=(dtype,), coefficients=("jordan",), device=device)
        if one.method == "auto"
    ]
    quick = [one for one in ours if one.name == f"NorMuon auto {one.ns_dtype}"]
    kernels = [one for one in ours if one not in quick and not one.compiles]
    return [*quick, torch_muon(), *kernels, *(one for one in ours if one.compiles)]


def _why_not(contender: Contender, context: PartContext) -> str | None:
    """Why it is not started, or None; compiling is done for every shape and dtype."""
    if contender.missing is None and contender.compiles and context.is_dry:
        return "it compiles, which a dry run leaves out"
    needed = 0.5 * context.sizes.compile_seconds if contender.compiles else 0.0
    return contender.missing or (NO_TIME if context.seconds_left() < needed else None)
