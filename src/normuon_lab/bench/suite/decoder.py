"""A plain decoder of GPT-2's shape, and a training step of it, in torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from normuon import NorMuon, param_groups
from normuon_lab.bench.suite.options import DecoderSize

INIT_SCALE = 0.02
ARMS = ("AdamW", "NorMuon")
"""The optimizers that are compared on it."""


class Block(nn.Module):
    """Attention and an MLP, each behind a layer norm and beside a residual."""

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """``[B, T, D] -> [B, T, D]``."""
        y_BTD = self.attention_norm(x_BTD)
        q, k, v = (
            project(y_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTD = x_BTD + self.out(attended.transpose(1, 2).flatten(2))
        y_BTD = functional.gelu(self.up(self.mlp_norm(x_BTD)), approximate="tanh")
        return x_BTD + self.down(y_BTD)


class Decoder(nn.Module):
    """Token and position embeddings, blocks, and an output head tied to the token embedding."""

    def __init__(self, size: DecoderSize) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.positions = nn.Embedding(size.sequence_length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for name, param in self.named_parameters():
            if param.ndim == 2:
                into_residual = name.endswith(("out.weight", "down.weight"))
                scale = (2 * size.layers) ** -0.5 if into_residual else 1.0
                nn.init.normal_(param, std=INIT_SCALE * scale)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits ``[B, T, vocabulary]``."""
        places = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT) + self.positions(places)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        logits: Tensor = self.head(self.norm(x_BTD))
        return logits


def make_decoder(size: DecoderSize, *, seed: int, device: torch.device) -> Decoder:
    """A decoder whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return Decoder(size).to(device)


def make_arm(
    name: str, size: DecoderSize, *, lr: float, seed: int, device: torch.device
) -> tuple[Decoder, Optimizer]:
    """A decoder and its optimizer, by a name of `ARMS`: all begin with the same weights.

    Fused AdamW, or NorMuon by default with AdamW for all but matrices; no weight decay.
    """
    model = make_decoder(size, seed=seed, device=device)
    if name == "AdamW":
        return model, torch.optim.AdamW(
            model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
    return model, NorMuon(param_groups(model), lr=lr, weight_decay=0.0)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy of the next token, in nats, under bfloat16 autocast.

    A batch is ``[B, T + 1]`` tokens of any integer dtype.
    """
    tokens = batch.long()
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train_step(model: nn.Module, optimizer: Optimizer, batches: Sequence[Tensor]) -> Tensor:
    """One step on the mean gradient of all batches; returns their mean loss, on the device."""
    total = torch.zeros((), device=batches[0].device)
    for batch in batches:
        loss = loss_of(model, batch) / len(batches)
        loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return total
