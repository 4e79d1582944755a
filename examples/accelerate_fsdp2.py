"""NorMuon under Accelerate with its FSDP2 plugin: accumulation, clipping, schedule, checkpoints.

$ torchrun --nproc-per-node 2 examples/accelerate_fsdp2.py
"""

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from transformers import LlamaConfig, LlamaForCausalLM

import normuon

ACCUMULATED = 2
"""Batches per step: `Accelerator(gradient_accumulation_steps=...)`."""


def batch(number: int, data_rank: int, device: torch.device) -> torch.Tensor:
    """Sequences that count upwards from anywhere; another part of the batch on every data rank."""
    torch.manual_seed(1000 * number + data_rank)
    start = torch.randint(64, (4, 1), device=device)
    return (start + torch.arange(32, device=device)) % 64


def fsdp2_plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        state_dict_type="SHARDED_STATE_DICT",
    )


def train(accelerator: Accelerator, steps: int, out: Path, resume: bool = False) -> None:
    """Trains, saves in the middle, and prints every step's loss."""
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
    optimizer = normuon.NorMuon(normuon.param_groups(model), lr=2e-3)
    # At every step Accelerate advances a schedule as often as there are ranks.
    total = steps * accelerator.num_processes
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=total)
    # Accelerate shards the model and puts the shards into the optimizer's groups.
    model, optimizer, schedule = accelerator.prepare(model, optimizer, schedule)
    middle, first = steps // 2, 0
    if resume:
        accelerator.load_state(str(out))
        first = middle
    for step in range(first, steps):
        total_loss = torch.zeros((), device=accelerator.device)
        for part in range(ACCUMULATED):
            number = ACCUMULATED * step + part
            tokens = batch(number, accelerator.process_index, accelerator.device)
            with accelerator.accumulate(model):
                loss = model(input_ids=tokens, labels=tokens).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            total_loss += loss.detach()
        mean = accelerator.reduce(total_loss / ACCUMULATED, reduction="mean")
        accelerator.print(f"step {step} loss {mean.item():.6f}", flush=True)
        if step + 1 == middle:
            accelerator.save_state(str(out))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/accelerate_fsdp2"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    arguments = parser.parse_args()
    # Without GPUs Accelerate passes over the plugin and takes DDP.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        fsdp_plugin=fsdp2_plugin(),
        gradient_accumulation_steps=ACCUMULATED,
    )
    train(accelerator, arguments.steps, arguments.out, arguments.resume)
