"""The Triton kernels on shards, in Triton's interpreter: the step of one rank on every layout."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from normuon import MatrixView, NorMuon
from tests.distributed.parity import gradient, spread, weights, whole
from tests.interpreted import interpreted_kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="kernels are compiled here, for CUDA tensors: tests/gpu"
)

MESHES = {
    "rows": ((2,), [Shard(0)]),
    "columns": ((2,), [Shard(1)]),
    "rows_and_columns": ((2, 2), [Shard(0), Shard(1)]),
    "hsdp": ((2, 2), [Replicate(), Shard(0)]),
}
SHAPES = [(17, 5), (18, 40), (24, 24), (24, 24), (5, 8, 12)]


def fused_case(rank, world_size, layout, options):
    """Differences of the shared fused step from one rank's, fused and not."""
    mesh_shape, placements = MESHES[layout]
    mesh = init_device_mesh("cpu", mesh_shape)

    def groups_of(params):
        return [{"params": params[:4]}, {"params": params[4:], "view": MatrixView.experts()}]

    def stepped(params, *, is_shared, fused):
        optimizer = NorMuon(
            groups_of(params), lr=1e-2, ns_dtype=torch.float32, fused=fused, **options
        )
        for step in range(3):
            for number, param in enumerate(params):
                grad = gradient(param.shape, step, number).float()
                if options.get("skip_nonfinite") and (step, number) == (1, 2):
                    grad[0, 0] = float("nan")
                param.grad = spread(grad, mesh, placements) if is_shared else grad
            optimizer.step()
        return [whole(param).double() for param in params]

    starts = [start.float() for start in weights(SHAPES)]
    shared = [nn.Parameter(spread(start, mesh, placements)) for start in starts]
    with interpreted_kernels():
        many = stepped(shared, is_shared=True, fused=True)
        one = stepped([nn.Parameter(s.clone()) for s in starts], is_shared=False, fused=True)
    plain = stepped([nn.Parameter(s.clone()) for s in starts], is_shared=False, fused=False)

    def most(others):
        return max(float((a - b).abs().max()) for a, b in zip(many, others, strict=True))

    return most(one), most(plain)


@pytest.mark.parametrize("layout", MESHES)
def test_a_fused_step_is_the_same_on_every_layout(ranks, layout):
    world_size = 4 if len(MESHES[layout][0]) == 2 else 2
    for from_one, from_plain in ranks.run(fused_case, world_size, layout=layout, options={}):
        assert from_one == 0, "the same kernels on the same numbers"
        assert from_plain <= 1e-6


@pytest.mark.parametrize(
    "options", [{"skip_nonfinite": True}, {"cautious_weight_decay": True, "neuron_axis": "short"}]
)
def test_options_on_shards(ranks, options):
    for from_one, from_plain in ranks.run(fused_case, 2, layout="rows", options=options):
        assert from_one == 0
        assert from_plain <= 1e-6
