"""A whole transformers model, sharded by torch's own tools, trains like one process.

The step itself is exact (test_same_step_on_every_layout.py), but the gradients are not: each rank
sums over its part of the batch, or multiplies its part of a matrix, so sums are taken in another
order. A float32 sum of K terms in another order differs by about sqrt(K) * 6e-8 of its terms; here
K <= 4 * 16 * 72, hence 4e-6. Newton-Schulz lifts small singular values by up to 3.4445^5 = 485, so
the weakest directions of a step may differ by 2e-3 of it. A step has an RMS of 2e-4 and 20 of them
move the loss by 0.6; 2e-3 of that, were every direction a weakest one, would be 1e-3. Most are not:
measured are 2e-5 at most, and 1e-4 is allowed. A learning rate wrong by 0.2% is ten times that.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from normuon import NorMuon, param_groups

transformers = pytest.importorskip("transformers")

STEPS = 20
TOLERANCE = 1e-4
BATCH, LENGTH, VOCABULARY = 4, 16, 64


def build():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=72,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=generator)
    return (start + 3 * torch.arange(LENGTH)) % VOCABULARY


def losses(model, optimizer, *, part=slice(None), num_parts=1, group=None):
    """The global batch's loss at each step; this rank computes its part of the batch."""
    found = []
    for step in range(STEPS):
        tokens = batch(step)[part]
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / num_parts
        if num_parts > 1:
            dist.all_reduce(mean, group=group)
        found.append(float(mean))
    return found


def one_process(lr=1e-3):
    model = build()
    return losses(model, NorMuon(param_groups(model), lr=lr))


def part_of(index, num_parts):
    size = BATCH // num_parts
    return slice(index * size, (index + 1) * size)


TP_PLAN = {
    "self_attn.q_proj": ColwiseParallel,
    "self_attn.k_proj": ColwiseParallel,
    "self_attn.v_proj": ColwiseParallel,
    "self_attn.o_proj": RowwiseParallel,
    "mlp.gate_proj": ColwiseParallel,
    "mlp.up_proj": ColwiseParallel,
    "mlp.down_proj": RowwiseParallel,
}


MESHES = {"ddp": (4, 1), "fsdp2": (4, 1), "hsdp": (4, 1), "tp": (1, 2), "fsdp2_tp": (2, 2)}
"""Ranks that split the batch, and ranks that split each matrix."""


def model_case(rank, world_size, layout):
    model = build()
    data, tensor = MESHES[layout]
    mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
    process_group = None
    if tensor > 1:
        for layer in model.model.layers:
            plan = {name: style() for name, style in TP_PLAN.items()}
            parallelize_module(layer, mesh["tensor"], plan, src_data_rank=None)
    if layout == "ddp":
        process_group = dist.group.WORLD
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        wrapped = model
    if layout in ("fsdp2", "fsdp2_tp", "hsdp"):
        over = mesh["data"]
        if layout == "hsdp":
            over = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        for layer in model.model.layers:
            fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over)
    optimizer = NorMuon(
        param_groups(model), lr=1e-3, bucket_bytes=16384, process_group=process_group
    )
    position = mesh["data"].get_local_rank()
    return losses(
        wrapped,
        optimizer,
        part=part_of(position, data),
        num_parts=data,
        group=mesh["data"].get_group(),
    )


@pytest.fixture(scope="module")
def expected():
    return one_process()


@pytest.mark.parametrize("layout", list(MESHES))
def test_llama_trains_alike_on_every_layout(ranks, expected, layout):
    data, tensor = MESHES[layout]
    answers = ranks.run(model_case, data * tensor, layout=layout)
    for found in answers:
        assert found == pytest.approx(expected, rel=0, abs=TOLERANCE)
    assert expected[-1] < expected[0] - 0.5


def test_the_tolerance_is_narrow(expected):
    """A step that is 0.2% too long is found."""
    other = one_process(lr=1.002e-3)
    assert max(abs(a - b) for a, b in zip(expected, other, strict=True)) > 5 * TOLERANCE
