"""NorMuon under DDP: each matrix is orthogonalised by one rank instead of by all of them.

$ torchrun --nproc-per-node 2 examples/ddp.py
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import normuon


def batch(step: int, data_rank: int, device: torch.device) -> torch.Tensor:
    """Sequences that count upwards from anywhere; another part of the batch on every data rank."""
    torch.manual_seed(1000 * step + data_rank)
    start = torch.randint(64, (8, 1), device=device)
    return (start + torch.arange(32, device=device)) % 64


def train(steps: int) -> None:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    # Starts the process group too, and gives every rank its own device.
    init_device_mesh(device.type, (int(os.environ["WORLD_SIZE"]),))

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

    parallel = DistributedDataParallel(model)

    # The parameters are plain tensors, so the optimizer must be told which ranks hold them alike.
    optimizer = normuon.NorMuon(
        normuon.param_groups(model), lr=2e-3, process_group=dist.group.WORLD
    )

    for step in range(steps):
        tokens = batch(step, dist.get_rank(), device)
        loss = parallel(input_ids=tokens, labels=tokens).loss
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
