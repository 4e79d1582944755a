"""NorMuon in torchtitan: its model, FSDP2, optimizer container, schedule and checkpoints.

A training job sets `build_optimizers_fn=normuon.integrations.torchtitan.build_optimizers` in its
TrainSpec; this script calls the same pieces, so that it runs without torchtitan's data and GPUs.

$ torchrun --nproc-per-node 2 examples/torchtitan_llama.py
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.checkpoint import ModelWrapper
from torchtitan.components.lr_scheduler import build_lr_schedulers
from torchtitan.config import LRScheduler, Optimizer
from torchtitan.distributed import ParallelDims
from torchtitan.models.llama3 import Transformer, TransformerModelArgs

from normuon.integrations.torchtitan import build_optimizers


def batch(step: int, data_rank: int, device: torch.device) -> torch.Tensor:
    """Sequences that count upwards from anywhere; another part of the batch on every data rank."""
    torch.manual_seed(1000 * step + data_rank)
    start = torch.randint(64, (8, 1), device=device)
    return (start + torch.arange(33, device=device)) % 64


def sharded_model(device: torch.device, world_size: int) -> Transformer:
    torch.manual_seed(0)  # The same weights on every rank.
    model = Transformer(
        TransformerModelArgs(
            dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, max_seq_len=64
        )
    ).to(device)
    with torch.no_grad():
        model.init_weights()
    mesh = init_device_mesh(device.type, (world_size,))
    for layer in model.layers.values():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(steps: int, out: Path, resume: bool = False) -> None:
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    world_size = int(os.environ["WORLD_SIZE"])
    model = sharded_model(device, world_size)
    dims = ParallelDims(
        dp_replicate=1, dp_shard=world_size, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=world_size
    )
    optimizers = build_optimizers([model], Optimizer(lr=2e-3), dims)
    schedulers = build_lr_schedulers(optimizers, LRScheduler(warmup_steps=5), steps)
    state = {"model": ModelWrapper(model), "optimizer": optimizers, "lr_scheduler": schedulers}

    middle, first = steps // 2, 0
    if resume:
        dcp.load(state, checkpoint_id=out)
        first = middle
    for step in range(first, steps):
        tokens = batch(step, dist.get_rank(), device)
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        schedulers.step()
        dist.all_reduce(mean := loss.detach() / world_size)
        if dist.get_rank() == 0:
            print(f"step {step} loss {mean.item():.6f}", flush=True)
        if step + 1 == middle:
            dcp.save(state, checkpoint_id=out)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/torchtitan_llama"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    arguments = parser.parse_args()
    train(arguments.steps, arguments.out, arguments.resume)
