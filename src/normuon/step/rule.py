"""The numerics of one NorMuon step as pure functions: Algorithm 1 of arXiv 2510.05491, by line.

Shapes: B matrices of M rows and N columns; V is the neuron axis, M when rows are neurons and N when
columns are. ``o_BMN`` is a batch of orthogonalised directions and ``v_BV`` their second moments.
Functions whose name ends in ``_`` write to their first argument.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

AdjustLrFn = Literal["match_rms_adamw", "original", "spectral_unclamped"]
ADJUST_LR_FNS: tuple[AdjustLrFn, ...] = ("match_rms_adamw", "original", "spectral_unclamped")

NeuronAxis = Literal["row", "short"]
NEURON_AXES: tuple[NeuronAxis, ...] = ("row", "short")

ADAMW_RMS = 0.2
"""RMS of a typical AdamW step divided by its learning rate (Alg. 1, line 6; Moonlight)."""


LARGE_NUMEL = 2**16
"""Elements from which a pass over a tensor takes a CPU longer than a call does."""


def neuron_dim(m: int, n: int, neuron_axis: NeuronAxis) -> int:
    """The dim of ``[B, M, N]`` that counts neurons: -2 for rows, -1 for columns.

    ``row`` is the paper's: an output neuron is a row, as in ``nn.Linear.weight``. ``short`` takes
    statistics along the short side, so the neurons are the columns of a wide matrix.

    Example:
        >>> neuron_dim(768, 3072, "row"), neuron_dim(768, 3072, "short")
        (-2, -1)
    """
    return -1 if neuron_axis == "short" and m < n else -2


def update_momenta_(
    momenta: Sequence[Tensor], grads: Sequence[Tensor], *, momentum_beta: float
) -> None:
    """Line 2: ``M_t = b1 M_{t-1} + (1 - b1) G_t``, for many tensors in one operation.

    Args:
        momenta: written to.
        grads: one each, in the momentum's dtype.
        momentum_beta: b1.

    Example:
        >>> m = torch.zeros(2)
        >>> update_momenta_([m], [torch.ones(2)], momentum_beta=0.75)
        >>> m
        tensor([0.2500, 0.2500])
    """
    torch._foreach_lerp_(list(momenta), list(grads), 1 - momentum_beta)  # Alg. 1, line 2


def look_ahead_(
    directions: Sequence[Tensor],
    momenta: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    momentum_beta: float,
) -> None:
    """What line 3 orthogonalises when Nesterov is on: ``b1 M_t + (1 - b1) G_t``.

    Differs: Algorithm 1 orthogonalises M_t itself; the authors' released code and torch.optim.Muon
    look one step ahead, and so does this library by default.

    Args:
        directions: written to; in the momentum's dtype.
        momenta: M_t, one each.
        grads: G_t, one each, in the momentum's dtype.
        momentum_beta: b1.

    Example:
        >>> d = torch.empty(2)
        >>> look_ahead_([d], [torch.zeros(2)], [torch.ones(2)], momentum_beta=0.75)
        >>> d
        tensor([0.2500, 0.2500])
    """
    if momenta[0].device.type == "cpu" and momenta[0].numel() >= LARGE_NUMEL:
        # One pass over memory instead of two, which a CPU feels more than a call for each tensor.
        for direction, momentum, grad in zip(directions, momenta, grads, strict=True):
            torch.lerp(grad, momentum, momentum_beta, out=direction)
        return
    torch._foreach_copy_(list(directions), list(grads))
    torch._foreach_lerp_(list(directions), list(momenta), momentum_beta)


def mean_square_per_neuron(o_BMN: Tensor, *, dim: int, num_inputs: int | None = None) -> Tensor:
    """Line 4's ``mean_cols(O * O)``: each neuron's mean square, in at least float32.

    Args:
        o_BMN: orthogonalised directions, any floating dtype.
        dim: the neuron dim, -2 (rows) or -1 (columns).
        num_inputs: of a neuron of the whole matrix, where ``o_BMN`` has a part of them only; such
            parts add up. None: all are here.

    Returns:
        ``[B, V]`` in float32, or float64 for float64 input.

    Example:
        >>> o = torch.tensor([[[3.0, 4.0], [0.0, 2.0]]])
        >>> mean_square_per_neuron(o, dim=-2), mean_square_per_neuron(o, dim=-1)
        (tensor([[12.5000,  2.0000]]), tensor([[ 4.5000, 10.0000]]))
    """
    norm_BV = norm_per_neuron(o_BMN, dim=dim)
    return torch.square(norm_BV) / (num_inputs or o_BMN.shape[-1 if dim == -2 else -2])


def norm_per_neuron(o_BMN: Tensor, *, dim: int) -> Tensor:
    """``[B, V]``: the norm of each neuron's entries of O, in at least float32.

    Args:
        o_BMN: orthogonalised directions, any floating dtype.
        dim: the neuron dim, -2 (rows) or -1 (columns).

    Example:
        >>> norm_per_neuron(torch.tensor([[[3.0, 4.0], [0.0, 2.0]]]), dim=-2)
        tensor([[5., 2.]])
    """
    # A norm accumulates in float32 without writing the float32 copy of O that a product would.
    dtype = torch.promote_types(o_BMN.dtype, torch.float32)
    norm_BV: Tensor = torch.linalg.vector_norm(o_BMN, dim=-1 if dim == -2 else -2, dtype=dtype)
    return norm_BV


def update_second_moment(v_BV: Tensor, mean_square_BV: Tensor, *, beta2: float) -> Tensor:
    """Line 4: ``v_t = b2 v_{t-1} + (1 - b2) mean_cols(O * O)``.

    Multiplying v by a constant changes no step (line 6 divides it out), so there is no bias
    correction.

    Returns:
        A new ``[B, V]`` tensor in v's dtype.

    Example:
        >>> update_second_moment(torch.zeros(1, 2), torch.ones(1, 2), beta2=0.75)
        tensor([[0.2500, 0.2500]])
    """
    return torch.lerp(v_BV, mean_square_BV.to(v_BV.dtype), 1 - beta2)  # Alg. 1, line 4


def neuron_scale(v_BV: Tensor, *, eps: float) -> Tensor:
    """Line 5's factor per neuron, ``1 / (sqrt(v) + eps)``; 0 for a neuron that never moved.

    Nor does one count as moved whose v is below the smallest normal number, 1e-38 in float32. With
    ``eps=0`` the square of its factor, which line 6 sums, would be infinite and stop all neurons.

    Example:
        >>> neuron_scale(torch.tensor([[4.0, 0.0]]), eps=0.0)
        tensor([[0.5000, 0.0000]])
    """
    denominator_BV = v_BV.sqrt() + eps
    never_moved_BV = denominator_BV < math.sqrt(torch.finfo(v_BV.dtype).tiny)
    return denominator_BV.reciprocal_().masked_fill_(never_moved_BV, 0.0)  # Alg. 1, line 5


def neuron_sums(
    mean_square_BV: Tensor, neuron_scale_BV: Tensor, *, adjust_lr_fn: AdjustLrFn
) -> list[Tensor]:
    """What line 6 sums over neurons, each ``[B]``: mean squares of ``Oh = O * neuron_scale``.

    But for ``match_rms_adamw`` those of O as well. The sums of parts of a matrix's neurons add up.

    Args:
        mean_square_BV: from `mean_square_per_neuron`.
        neuron_scale_BV: from `neuron_scale`.
        adjust_lr_fn: see `step_scale`.

    Example:
        >>> neuron_sums(torch.ones(1, 3), torch.ones(1, 3), adjust_lr_fn="match_rms_adamw")
        [tensor([3.])]
    """
    sums = [(mean_square_BV * neuron_scale_BV.square()).sum(-1)]
    return sums if adjust_lr_fn == "match_rms_adamw" else [*sums, mean_square_BV.sum(-1)]


def step_scale(
    sums: Sequence[Tensor], *, m: int, n: int, num_neurons: int, adjust_lr_fn: AdjustLrFn
) -> Tensor:
    """Line 6 divided by the learning rate: the one factor a whole matrix is multiplied by.

    With ``Oh = O * neuron_scale``, whose norm follows from the row statistics without a second
    pass over O:

    - ``match_rms_adamw`` (the paper): ``0.2 sqrt(m n) / ||Oh||_F``, so that the step's RMS is
      exactly ``0.2 lr``;
    - ``original`` (the authors' released code): ``max(1, m / n)^0.5 ||O||_F / ||Oh||_F``;
    - ``spectral_unclamped``: ``(m / n)^0.5 ||O||_F / ||Oh||_F``.

    Args:
        sums: from `neuron_sums`, over all neurons.
        m: rows of the matrix.
        n: columns of the matrix.
        num_neurons: which of the two counts neurons.
        adjust_lr_fn: which of these scales.

    Returns:
        ``[B]``; 0 for an all-zero direction, which must give a zero step, never NaN.

    Example:
        >>> sums = [torch.tensor([2.0])]
        >>> step_scale(sums, m=2, n=8, num_neurons=2, adjust_lr_fn="match_rms_adamw")
        tensor([0.2000])
    """
    # Each neuron has m n / V entries, so ||O||_F^2 = (m n / V) * sum of the mean squares.
    entries = m * n / num_neurons
    normalized_norm_B = (sums[0] * entries).sqrt()  # ||Oh||_F
    if adjust_lr_fn == "match_rms_adamw":
        target_B: Tensor | float = ADAMW_RMS * math.sqrt(m * n)  # Alg. 1, line 6
    else:
        target_B = (sums[1] * entries).sqrt() * muon_step_scale(m=m, n=n, adjust_lr_fn=adjust_lr_fn)
    return (target_B / normalized_norm_B).masked_fill_(normalized_norm_B == 0, 0.0)


def muon_step_scale(*, m: int, n: int, adjust_lr_fn: AdjustLrFn) -> float:
    """Muon's own factor for a whole matrix, as torch.optim.Muon defines it, by name.

    ``spectral_unclamped``, Bernstein's (jeremybernste.in/writing/deriving-muon), came with torch
    2.15.

    Example:
        >>> muon_step_scale(m=4, n=25, adjust_lr_fn="match_rms_adamw")
        1.0
        >>> muon_step_scale(m=36, n=4, adjust_lr_fn="original")
        3.0
        >>> muon_step_scale(m=4, n=36, adjust_lr_fn="spectral_unclamped")
        0.3333333333333333
    """
    if adjust_lr_fn == "match_rms_adamw":
        return ADAMW_RMS * math.sqrt(max(m, n))
    ratio = m / n
    return math.sqrt(ratio if adjust_lr_fn == "spectral_unclamped" else max(1.0, ratio))


def apply_steps_(
    params: Sequence[Tensor], steps: Sequence[Tensor], *, kept: float | Tensor
) -> None:
    """Line 7: ``W_t = kept W_{t-1} - step``, for many tensors in two operations.

    Args:
        params: the weights, written to.
        steps: ``eta' Oh``, one each, of the same shape and dtype.
        kept: ``1 - lr * weight_decay``.

    Example:
        >>> w = torch.tensor([1.0, -1.0])
        >>> apply_steps_([w], [torch.tensor([0.5, 0.5])], kept=0.9)
        >>> w
        tensor([ 0.4000, -1.4000])
    """
    if isinstance(kept, Tensor):
        torch._foreach_mul_(list(params), kept.reshape(()))  # All that it takes of tensors.
    elif kept != 1:
        torch._foreach_mul_(list(params), kept)
    torch._foreach_sub_(list(params), list(steps))  # Alg. 1, line 7


def applied_step(
    param_BMN: Tensor,
    step_BMN: Tensor,
    *,
    decay: float | Tensor,
    cautious: bool,
    moves_B11: Tensor | None,
) -> Tensor:
    """Line 7 in the step's dtype, for weights that are rounded afterwards or stepped in part.

    Half-precision weights are decayed and moved in the step's float32 and rounded once; two
    roundings in bfloat16 would swallow a decay of 1e-4 altogether.

    Args:
        param_BMN: the weights, in the step's dtype; written to.
        step_BMN: ``eta' Oh``, in at least float32; zero where nothing moves.
        decay: ``lr * weight_decay``.
        cautious: decay only entries whose step moves them towards zero (``step * W >= 0``; cautious
            weight decay, arXiv 2510.12402).
        moves_B11: booleans; where False nothing decays. None decays everywhere.

    Returns:
        ``param_BMN``.

    Example:
        >>> w = torch.tensor([[[1.0, -1.0]]])
        >>> step = torch.tensor([[[0.5, 0.5]]])
        >>> applied_step(w, step, decay=0.1, cautious=True, moves_B11=None)
        tensor([[[ 0.4000, -1.5000]]])
    """
    if cautious:
        shrinks_BMN = param_BMN * step_BMN >= 0
        if moves_B11 is not None:
            shrinks_BMN &= moves_B11
        param_BMN.sub_(param_BMN * shrinks_BMN * decay)
    elif moves_B11 is None:
        param_BMN.mul_(1 - decay)
    else:
        one = torch.ones((), dtype=step_BMN.dtype, device=step_BMN.device)
        param_BMN.mul_(torch.where(moves_B11, one - decay, one))
    return param_BMN.sub_(step_BMN)  # Alg. 1, line 7
