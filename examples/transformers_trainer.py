"""NorMuon in transformers' Trainer: one argument, and its checkpoints resume as ever.

$ python examples/transformers_trainer.py
"""

import argparse
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from normuon.integrations.transformers import trainer_optimizer


class Counting(torch.utils.data.Dataset):
    """Sequences that count upwards from anywhere."""

    def __len__(self) -> int:
        return 64 * 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + torch.arange(32)) % 64
        return {"input_ids": tokens, "labels": tokens}


def train(steps: int, out: Path, resume: bool = False) -> list[float]:
    """Trains, saves in the middle, and returns every step's loss."""
    torch.manual_seed(0)
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
    arguments = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        learning_rate=2e-3,
        weight_decay=0.1,
        per_device_train_batch_size=8,
        logging_steps=1,
        save_steps=steps // 2,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Counting(),
        # Rates, decay and schedule are those of `arguments`. `optimizers=` takes a NorMuon that is
        # built already.
        optimizer_cls_and_kwargs=trainer_optimizer(arguments, quiet=resume),
    )
    trainer.train(resume_from_checkpoint=f"{out}/checkpoint-{steps // 2}" if resume else None)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/transformers_trainer"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    arguments = parser.parse_args()
    for step, loss in enumerate(train(arguments.steps, arguments.out, arguments.resume)):
        print(f"step {step} loss {loss:.4f}")
