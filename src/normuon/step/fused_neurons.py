"""Lines 4 to 6 in two launches, by Triton kernels, where a device runs them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normuon.orthogonalize.fused import device_of
from normuon.step.rule import AdjustLrFn, muon_step_scale

BLOCK = 1024
"""Neurons that a program takes at a time."""


def neurons_fused(
    norm_BV: Tensor,
    v_BV: Tensor,
    *,
    shape: tuple[int, int],
    beta2: float,
    eps: float,
    adjust_lr_fn: AdjustLrFn,
) -> tuple[Tensor, Tensor]:
    """Lines 4 to 6 from the norms of O's neurons.

    Args:
        norm_BV: of each neuron's entries of O, contiguous, in float32.
        v_BV: second moments, in float32; not written to.
        shape: m and n of the matrices.
        beta2: b2.
        eps: added to sqrt(v).
        adjust_lr_fn: see `rule.step_scale`.

    Returns:
        The new second moments, and ``[B, 1]``: what O times the neurons' scales is multiplied by.
    """
    from normuon.step import triton_passes

    m, n = shape
    count, neurons = norm_BV.shape
    matches = adjust_lr_fn == "match_rms_adamw"
    # Muon's constant is a step's norm over that of O, whose entries have mean square 1 / max(m, n).
    target = muon_step_scale(m=m, n=n, adjust_lr_fn=adjust_lr_fn)
    if matches:
        target *= math.sqrt(min(m, n))
    v_BV = v_BV.contiguous()
    new_BV = torch.empty_like(v_BV)
    scale_B1 = torch.empty((count, 1), dtype=torch.float32, device=v_BV.device)
    with device_of(v_BV):
        triton_passes.neurons_kernel[(count,)](
            norm_BV,
            v_BV,
            new_BV,
            scale_B1,
            neurons,
            m * n // neurons,
            1.0 - beta2,
            float(eps),
            float(target),
            MATCHES_RMS=matches,
            BLOCK=BLOCK,
        )
    return new_BV, scale_B1


def factors_fused(v_KV: Tensor, scale_K1: Tensor, *, eps: float) -> Tensor:
    """``[K, V]``: what each neuron's entries of O are multiplied by; lines 5 and 6.

    Args:
        v_KV: second moments of pieces, in float32.
        scale_K1: from `neurons_fused`, for the matrix of each piece.
        eps: added to sqrt(v).
    """
    from normuon.step import triton_passes

    count, neurons = v_KV.shape
    v_KV, scale_K1 = v_KV.contiguous(), scale_K1.contiguous()
    factor_KV = torch.empty_like(v_KV)
    with device_of(v_KV):
        triton_passes.factors_kernel[(count, -(-neurons // BLOCK))](
            v_KV, scale_K1, factor_KV, neurons, float(eps), BLOCK=BLOCK
        )
    return factor_KV
