"""NorMuon under FSDP2: whole matrices meet at their owners, the shards stay where they are.

$ torchrun --nproc-per-node 2 examples/fsdp2.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import normuon


def batch(step: int, data_rank: int, device: torch.device) -> torch.Tensor:
    """Sequences that count upwards from anywhere; another part of the batch on every data rank."""
    torch.manual_seed(1000 * step + data_rank)
    start = torch.randint(64, (8, 1), device=device)
    return (start + torch.arange(32, device=device)) % 64


def train(steps: int) -> None:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    mesh = init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))

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
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # After fully_shard: the optimizer must see the sharded parameters. Nothing else is needed.
    optimizer = normuon.NorMuon(normuon.param_groups(model), lr=2e-3)

    for step in range(steps):
        tokens = batch(step, dist.get_rank(), device)
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
