"""NorMuon on a timm vision transformer: patch embedding, position table and head go to AdamW.

$ python examples/timm_vit.py
"""

import argparse
from pathlib import Path

import timm
import torch

import normuon


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of four directions of stripes, and which direction it is."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(4, (16,), generator=generator)
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    angles = (labels * torch.pi / 4)[:, None, None]
    stripes = torch.sin(rows * torch.cos(angles) + columns * torch.sin(angles))
    noise = torch.randn(16, 3, 32, 32, generator=generator)
    return stripes[:, None] + 0.5 * noise, labels


def train(steps: int, out: Path, resume: bool = False) -> list[float]:
    """Trains, saves in the middle, and returns every step's loss."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=4
    )
    optimizer = normuon.NorMuon(normuon.param_groups(model), lr=1e-3)
    middle, first = steps // 2, 0
    if resume:
        saved = torch.load(out / "checkpoint.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = middle
    losses = []
    for step in range(first, steps):
        images, labels = batch(step)
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step + 1 == middle:
            out.mkdir(parents=True, exist_ok=True)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(saved, out / "checkpoint.pt")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/timm_vit"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in OUT")
    arguments = parser.parse_args()
    for step, loss in enumerate(train(arguments.steps, arguments.out, arguments.resume)):
        print(f"step {step} loss {loss:.4f}")
