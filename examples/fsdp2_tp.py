"""NorMuon under FSDP2 over tensor parallelism: rectangles of a matrix meet at its owner.

$ torchrun --nproc-per-node 4 examples/fsdp2_tp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

import normuon


def batch(step: int, data_rank: int, device: torch.device) -> torch.Tensor:
    """Sequences that count upwards from anywhere; another part of the batch on every data rank."""
    torch.manual_seed(1000 * step + data_rank)
    start = torch.randint(64, (8, 1), device=device)
    return (start + torch.arange(32, device=device)) % 64


def train(steps: int) -> None:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    num_ranks = int(os.environ["WORLD_SIZE"])
    mesh = init_device_mesh(device.type, (num_ranks // 2, 2), mesh_dim_names=("data", "tensor"))

    torch.manual_seed(0)  # The same weights on every rank.
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).to(device)

    for layer in model.model.layers:
        parallelize_module(
            layer,
            mesh["tensor"],
            {
                "self_attn.q_proj": ColwiseParallel(),
                "self_attn.k_proj": ColwiseParallel(),
                "self_attn.v_proj": ColwiseParallel(),
                "self_attn.o_proj": RowwiseParallel(),
                "mlp.gate_proj": ColwiseParallel(),
                "mlp.up_proj": ColwiseParallel(),
                "mlp.down_proj": RowwiseParallel(),
            },
        )
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])

    # The matrices lie on both axes, norms and embeddings on one: their meshes say so.
    optimizer = normuon.NorMuon(normuon.param_groups(model), lr=2e-3)

    for step in range(steps):
        tokens = batch(step, mesh["data"].get_local_rank(), device)
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step} loss {mean.item():.4f}", flush=True)

    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=10)
    train(parser.parse_args().steps)
