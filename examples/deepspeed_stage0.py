"""NorMuon in DeepSpeed: stage 0, whose ranks each hold whole matrices.

ZeRO (stages 1 to 3) flattens matrices into vectors, which NorMuon refuses at the first step: to
shard, use FSDP2.

$ torchrun --nproc-per-node 2 examples/deepspeed_stage0.py
"""

import argparse
import os
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

import normuon


def batch(step: int, data_rank: int) -> torch.Tensor:
    """Sequences that count upwards from anywhere; another part of the batch on every data rank."""
    torch.manual_seed(1000 * step + data_rank)
    return (torch.randint(64, (8, 1)) + torch.arange(32)) % 64


def train(steps: int, out: Path, resume: bool = False, stage: int = 0) -> None:
    deepspeed.init_distributed()
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
    )
    optimizer = normuon.NorMuon(
        normuon.param_groups(model), lr=2e-3, process_group=dist.group.WORLD
    )
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": stage > 0,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    middle, first = steps // 2, 0
    if resume:
        engine.load_checkpoint(str(out))
        first = middle
    for step in range(first, steps):
        tokens = batch(step, dist.get_rank()).to(engine.device)
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
        dist.all_reduce(mean := loss.detach() / dist.get_world_size())
        if dist.get_rank() == 0:
            print(f"step {step} loss {mean.item():.6f}", flush=True)
        if step + 1 == middle:
            engine.save_checkpoint(str(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/deepspeed_stage0"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    parser.add_argument("--stage", type=int, default=0, help="ZeRO stages are refused")
    parser.add_argument("--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")))
    arguments = parser.parse_args()
    train(arguments.steps, arguments.out, arguments.resume, arguments.stage)
