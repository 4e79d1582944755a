"""NorMuon in Lightning: one line in configure_optimizers, also under FSDP2.

$ python examples/lightning_module.py
$ python examples/lightning_module.py --devices 2
"""

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import normuon


class LanguageModel(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=64,
                hidden_size=64,
                intermediate_size=160,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
            )
        )

    def configure_model(self) -> None:
        if self.device_mesh is None or isinstance(self.model, FSDPModule):
            return  # One device, or sharded already.
        for layer in self.model.model.layers:
            fully_shard(layer, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return normuon.NorMuon(normuon.param_groups(self), lr=2e-3)


def batches(steps: int) -> torch.utils.data.DataLoader:
    """Sequences that count upwards from anywhere."""
    starts = torch.arange(8 * steps)[:, None]
    return torch.utils.data.DataLoader((starts + torch.arange(32)) % 64, batch_size=8)


def train(steps: int, out: Path, resume: bool = False, devices: int = 1) -> list[float]:
    """Trains for two epochs, saves after each, and returns every step's loss."""
    torch.manual_seed(0)
    model = LanguageModel()
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="auto" if torch.accelerator.is_available() else "cpu",
        devices=devices,
        strategy="auto"
        if devices == 1
        else ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(out, filename="{epoch}", save_top_k=-1)],
    )
    checkpoint = out / "epoch=0.ckpt" if resume else None
    trainer.fit(model, batches(steps // 2 * devices), ckpt_path=checkpoint)
    return model.losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/lightning_module"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    parser.add_argument("--devices", type=int, default=1, help="more than one: FSDP2")
    arguments = parser.parse_args()
    losses = train(arguments.steps, arguments.out, arguments.resume, arguments.devices)
    if rank_zero_only.rank == 0:
        for step, loss in enumerate(losses):
            print(f"step {step} loss {loss:.4f}")
