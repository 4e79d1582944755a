"""Another rule in the normalizer's place: every layout carries its vectors, and steps alike."""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

from normuon import MatrixView, NorMuon
from normuon.step import rule
from tests.distributed.parity import differing, gradient, spread, values, weights

MESHES = {
    "rows": ((4,), [Shard(0)]),
    "columns": ((4,), [Shard(1)]),
    "rows_and_columns": ((2, 2), [Shard(0), Shard(1)]),
    "hsdp": ((2, 2), [Replicate(), Shard(0)]),
}
SHAPES = [(17, 5), (18, 40), (24, 24), (16, 16)]


class RowsAndColumns:
    """Second moments of rows and of columns, as Adafactor factors them, and NorMuon's step size."""

    def state_dims(self, m, n):
        return {"row_moment": -2, "column_moment": -1}

    def summary_dims(self, m, n):
        return {"scale": None}

    def update(self, o_BMN, state):
        _, m, n = o_BMN.shape
        new = {
            name: rule.update_second_moment(
                state[name], rule.mean_square_per_neuron(o_BMN, dim=dim), beta2=0.9
            )
            for name, dim in self.state_dims(m, n).items()
        }
        (_, rows_BM), (_, columns_BN) = self.factors(new, {"scale": 1.0}, (m, n))
        normalized_BMN = o_BMN.to(rows_BM.dtype) * rows_BM[:, :, None] * columns_BN[:, None, :]
        norm_B = torch.linalg.vector_norm(normalized_BMN, dim=(-2, -1))
        return new, {"scale": (0.2 * (m * n) ** 0.5 / norm_B)[:, None]}

    def factors(self, state, summary, shape):
        rows_KM = rule.neuron_scale(state["row_moment"], eps=1e-8) * summary["scale"]
        return [(-2, rows_KM), (-1, rule.neuron_scale(state["column_moment"], eps=1e-8))]

    def constant(self, m, n):
        return 1.0


def rule_case(rank, world_size, layout):
    mesh_shape, placements = MESHES[layout]
    mesh = init_device_mesh("cpu", mesh_shape)
    shapes = [*SHAPES, (5, 8, 12)]
    alone = [nn.Parameter(start) for start in weights(shapes)]
    shared = [nn.Parameter(spread(start, mesh, placements)) for start in weights(shapes)]

    def groups_of(params):
        return [{"params": params[:4]}, {"params": params[4:], "view": MatrixView.experts()}]

    with ExitStack() as stack:
        for module in ("normuon.options", "normuon.state"):
            stack.enter_context(
                mock.patch(f"{module}.normalizer_of", return_value=RowsAndColumns())
            )
        one = NorMuon(groups_of(alone), lr=1e-2)
        many = NorMuon(groups_of(shared), lr=1e-2, bucket_bytes=4096)
        for step in range(4):
            for number, (a, b) in enumerate(zip(alone, shared, strict=True)):
                a.grad = gradient(a.shape, step, number)
                b.grad = spread(a.grad, mesh, placements)
            one.step()
            many.step()
    assert one.state[alone[0]].keys() == {"momentum_buffer", "row_moment", "column_moment"}
    return differing(values(alone, one), values(shared, many))


@pytest.mark.parametrize("layout", list(MESHES))
def test_a_rule_with_row_and_column_state_gives_the_same_step_on_every_layout(ranks, layout):
    assert ranks.run(rule_case, 4, layout=layout) == [[]] * 4
