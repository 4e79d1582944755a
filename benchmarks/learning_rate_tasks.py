"""Six small and different tasks on which learning rates are compared; nothing is downloaded.

Each task trains one model for `STEPS` steps with a linear warm-up and decay, and gives its loss on
held-out data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional

from normuon_lab.train.runs.corpus import Corpus, load_corpus

STEPS, WARM_UP, BATCH = 150, 10, 32
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
SIDE, CONTEXT, WIDTH = 16, 64, 64

Batch = tuple[Tensor, Tensor]
Data = Callable[[torch.Generator], Batch]


@dataclass(frozen=True)
class Task:
    """A model and its data.

    Args:
        build: the model, from a seed set beforehand.
        train: a batch of inputs and targets.
        held_out: batches for the loss that counts.
    """

    build: Callable[[], nn.Module]
    train: Data
    held_out: Sequence[Batch]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of logits [..., classes] and targets [...]."""
    logits = model(batch[0])
    return functional.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def run(task: Task, optimizer_of: Callable[[nn.Module], torch.optim.Optimizer], seed: int) -> float:
    """The loss on held-out data after training, infinite where it is no number."""
    torch.manual_seed(seed)
    model = task.build()
    optimizer = optimizer_of(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(seed)
    for step in range(STEPS):
        share = min((step + 1) / WARM_UP, (STEPS - step) / (STEPS - WARM_UP))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * share
        optimizer.zero_grad()
        loss_of(model, task.train(generator)).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        losses = [loss_of(model, batch).item() for batch in task.held_out]
    mean = sum(losses) / len(losses)
    return mean if math.isfinite(mean) else math.inf


@cache
def letters(fonts_like: str) -> tuple[Batch, Batch]:
    """Letters and digits in matplotlib's fonts, turned, moved, with noise: training, held out."""
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [ImageFont.truetype(str(p), 12) for p in sorted(folder.glob(fonts_like))]
    generator = np.random.default_rng(0)
    images, labels = [], []
    for number in range(6200):
        label = number % len(LETTERS)
        image = Image.new("L", (SIDE, SIDE))
        place = tuple(int(x) for x in generator.integers(0, 6, 2))
        font = fonts[int(generator.integers(len(fonts)))]
        ImageDraw.Draw(image).text((place[0] + 1, place[1] - 2), LETTERS[label], 255, font)
        turned = image.rotate(float(generator.normal(0, 12)))
        images.append(np.asarray(turned) / 255 + generator.normal(0, 0.2, (SIDE, SIDE)))
        labels.append(label)
    inputs = torch.tensor(np.stack(images), dtype=torch.float32)[:, None]
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    inputs, targets = inputs[order], torch.tensor(labels)[order]
    return (inputs[:5200], targets[:5200]), (inputs[5200:], targets[5200:])


def image_task(build: Callable[[], nn.Module], fonts_like: str = "DejaVu*.ttf") -> Task:
    """Which of 62 letters and digits."""
    (inputs, targets), held_out = letters(fonts_like)

    def train(generator: torch.Generator) -> Batch:
        chosen = torch.randint(len(inputs), (BATCH,), generator=generator)
        return inputs[chosen], targets[chosen]

    return Task(build, train, [held_out])


def convolutions() -> nn.Module:
    """Three convolutions with batch norm."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 32), (32, 64), (64, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4, len(LETTERS)))


class Block(nn.Module):
    """A transformer block, norms first."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.causal = causal

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, [batch, length, width]."""
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        seen = functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.proj(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Three blocks over tokens."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block(causal=True) for _ in range(3))
        self.norm, self.lm_head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)
        for embedding in (self.embed, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token, [batch, length, vocabulary]."""
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.norm(x))


class Vit(nn.Module):
    """Three blocks over patches of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(1, WIDTH, 4, 4)
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 16, WIDTH))
        self.blocks = nn.ModuleList(Block(causal=False) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(LETTERS))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [batch, classes]."""
        x = self.patch_embed(images).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.mean(1)))


class Lstm(nn.Module):
    """One recurrent layer over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, WIDTH)
        self.rnn = nn.LSTM(WIDTH, 128, batch_first=True)
        self.decoder = nn.Linear(128, 256)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next byte, [batch, length, 256]."""
        return self.decoder(self.rnn(self.embed(tokens))[0])


@cache
def text(source: str, tokenizer: str) -> Corpus:
    """Bytes, or the tokens of a BPE of 1,024."""
    size = 256 if tokenizer == "bytes" else 1024
    return load_corpus([source], tokenizer=tokenizer, vocab_size=size)


def windows(tokens: np.ndarray, generator: torch.Generator, count: int) -> Batch:
    """Windows of tokens, and the tokens after each."""
    starts = torch.randint(len(tokens) - CONTEXT - 1, (count,), generator=generator)
    found = np.stack([tokens[s : s + CONTEXT + 1] for s in starts.tolist()]).astype(np.int64)
    cut = torch.from_numpy(found)
    return cut[:, :-1], cut[:, 1:]


def text_task(build: Callable[[], nn.Module], source: str, tokenizer: str = "bytes") -> Task:
    """Which token comes next."""
    corpus = text(source, tokenizer)
    held_out = [windows(corpus.validation, torch.Generator().manual_seed(1), 256)]
    return Task(build, lambda generator: windows(corpus.train, generator, BATCH), held_out)


@cache
def pretrained() -> dict[str, Tensor]:
    """A ViT that knows the letters of some fonts."""
    task = image_task(Vit)
    torch.manual_seed(0)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    for step in range(4 * STEPS):
        optimizer.param_groups[0]["lr"] = 4e-3 * (1 - step / (4 * STEPS))
        optimizer.zero_grad()
        loss_of(model, task.train(generator)).backward()
        optimizer.step()
    return {name: value.clone() for name, value in model.state_dict().items()}


def finetuned() -> nn.Module:
    """The pretrained model, to go on with other fonts."""
    model = Vit()
    model.load_state_dict(pretrained())
    return model


TASKS: dict[str, Callable[[], Task]] = {
    "CNN with batch norm, letters": lambda: image_task(convolutions),
    "ViT, letters": lambda: image_task(Vit),
    "GPT by bytes, Python source": lambda: text_task(lambda: Gpt(256), "stdlib"),
    "GPT by BPE, Python source": lambda: text_task(lambda: Gpt(1024), "stdlib", "bpe"),
    "LSTM by bytes, Python source": lambda: text_task(Lstm, "stdlib"),
    "finetune of a ViT, other fonts": lambda: image_task(finetuned, "STIXGeneral*.ttf"),
}
