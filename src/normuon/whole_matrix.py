"""Lines 3, 4 and 6 of Algorithm 1: the part of a step that needs whole matrices.

What comes out (O, v and one scale per matrix) is all that a shard needs to finish the step on its
own (lines 5 and 7, in `rule.py`). Shapes as in `rule.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from normuon import rule
from normuon.options import MatrixOptions
from normuon.orthogonalize import Workspace, orthogonalize


@dataclass(slots=True)
class WholeUpdate:
    """What a batch of whole matrices yields; the step is ``lr * scale * O / (sqrt(v) + eps)``.

    Args:
        o_BMN: orthogonalised directions, in ``ns_dtype``; the holder may overwrite them.
        v_BV: the new second moments; None for `muon`.
        scale_B: line 6 divided by the learning rate, in ``stats_dtype``.
    """

    o_BMN: Tensor
    v_BV: Tensor | None
    scale_B: Tensor


def update_whole_matrices(
    direction_BMN: Tensor,
    v_BV: Tensor | None,
    *,
    options: MatrixOptions,
    ns_dtype: torch.dtype,
    stats_dtype: torch.dtype,
    workspace: Workspace,
    scratch: Tensor | None = None,
) -> WholeUpdate:
    """Orthogonalises a batch, advances its second moments and finds each matrix's scale.

    Args:
        direction_BMN: what line 3 takes; not written to unless it is ``scratch``.
        v_BV: the second moments before the step, not written to; None for `muon`.
        options: of the group.
        ns_dtype: dtype to orthogonalise in.
        stats_dtype: dtype of second moments and scales, whatever Newton-Schulz computes in.
        workspace: scratch kept between calls; O may live there until its next use.
        scratch: of `orthogonalize`; O may live there too.
    """
    o_BMN = orthogonalize(
        direction_BMN,
        coefficients=options.coefficients,
        dtype=ns_dtype,
        orthogonalizer=options.orthogonalizer,
        backend=options.ns_backend,
        equilibrate=options.equilibrate,
        workspace=workspace,
        scratch=scratch,
    )
    batch, m, n = o_BMN.shape
    if v_BV is None:
        scale = rule.muon_step_scale(m=m, n=n, adjust_lr_fn=options.adjust_lr_fn)
        scale_B = torch.full(
            (batch,),
            scale,
            dtype=stats_dtype,
            device=o_BMN.device,
        )
        return WholeUpdate(o_BMN, None, scale_B)
    mean_square_BV = rule.mean_square_per_neuron(
        o_BMN, dim=rule.neuron_dim(m, n, options.neuron_axis)
    )
    new_v_BV = rule.update_second_moment(v_BV, mean_square_BV, beta2=options.beta2)
    scale_B = rule.step_scale(
        mean_square_BV,
        rule.neuron_scale(new_v_BV, eps=options.eps),
        m=m,
        n=n,
        adjust_lr_fn=options.adjust_lr_fn,
    )
    return WholeUpdate(o_BMN, new_v_BV, scale_B.to(stats_dtype))
