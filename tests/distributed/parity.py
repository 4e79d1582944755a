"""The same seeded parameters on one process and on ranks, and where their training differs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from normuon import NorMuon

PLACEMENTS = {"shard_rows": Shard(0), "shard_columns": Shard(1), "replicate": Replicate()}


def gradient(shape: Sequence[int], step: int, number: int) -> Tensor:
    """The gradient of parameter ``number`` at a step, the same in every process."""
    generator = torch.Generator().manual_seed(1000 * step + number)
    return torch.randn(tuple(shape), generator=generator)


def weights(shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Starting weights, the same in every process."""
    return [gradient(shape, 999, number) for number, shape in enumerate(shapes)]


def spread(tensor: Tensor, mesh, placements) -> DTensor:
    """A tensor that every rank holds whole, spread over a mesh: nothing is sent."""
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def distributed(shapes, mesh, placements) -> list[nn.Parameter]:
    """The starting weights as parameters spread over a mesh."""
    return [nn.Parameter(spread(start, mesh, placements)) for start in weights(shapes)]


def whole(tensor: Tensor) -> Tensor:
    """The value of a tensor, gathered where it is spread over ranks."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def snapshot(param: Tensor, optimizer: NorMuon) -> dict[str, Tensor]:
    """Copies of this rank's part of a parameter and of all its state."""
    kept = {key: local(value).clone() for key, value in optimizer.state[param].items()}
    return {"weight": local(param).clone(), **kept}


def changed(before: dict[str, Tensor], param: Tensor, optimizer: NorMuon) -> set[str]:
    """Names of what is no longer bit for bit what it was; NaN counts as changed."""
    after = snapshot(param, optimizer)
    assert set(before) == set(after)
    return {key for key in before if not torch.equal(before[key], after[key])}


def values(params: Sequence[Tensor], optimizer: NorMuon) -> list[dict[str, Tensor]]:
    """Weights and state of every parameter, gathered."""
    return [
        {
            "weight": whole(param).clone(),
            **{key: whole(value).clone() for key, value in optimizer.state[param].items()},
        }
        for param in params
    ]


def differing(first: Sequence[dict[str, Tensor]], second: Sequence[dict[str, Tensor]]) -> list[str]:
    """Where two lists of `values` differ: bit by bit for matrices, to 1e-6 for AdamW's.

    torch's fused AdamW on CPU rounds the last elements of a tensor, which do not fill a vector
    register, otherwise than the rest: where a shard ends decides, so equality is to 1e-6.
    """
    found = []
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        assert set(a) == set(b), (set(a), set(b))
        close = {"rtol": 1e-6, "atol": 1e-6} if "exp_avg" in a else {"rtol": 0.0, "atol": 0.0}
        found += [
            f"{key} of parameter {number} {list(a['weight'].shape)} by "
            f"{(a[key].double() - b[key].double()).abs().max():.1e}"
            for key in a
            if not torch.allclose(a[key], b[key], **close)
        ]
    return found
