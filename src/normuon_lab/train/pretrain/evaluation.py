"""The validation loss, the same on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from normuon_lab.train.ranks import Ranks


@torch.no_grad()
def validation_loss(
    model: nn.Module,
    batches: Iterable[Tensor],
    ranks: Ranks,
    *,
    loss: Callable[[nn.Module, Tensor], Tensor],
    sequence_length: int,
) -> float:
    """Mean loss per token over the batches of all ranks.

    Args:
        model: put into evaluation mode, and back.
        batches: this rank's, int64 `[<= batch, sequence + 1]`. Ranks may have different numbers.
        ranks: with whom to evaluate.
        loss: from the model and a batch to its mean loss.
        sequence_length: of the batches.
    """
    was_training = model.training
    model.eval()
    # Loss times sequences, and sequences.
    totals = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    # A sharded model is called by all ranks or by none: one without a batch calls it for nothing.
    nothing = torch.zeros(1, sequence_length + 1, dtype=torch.int64)
    waiting = iter(batches)
    while ranks.any((batch := next(waiting, None)) is not None):
        tokens = (nothing if batch is None else batch).to(ranks.device, non_blocking=True)
        mean = loss(model, tokens).double()
        if batch is not None:
            totals += torch.stack([mean * len(batch), mean.new_tensor(len(batch))])
    ranks.sum_over_data_(totals)
    model.train(was_training)
    return float(totals[0] / totals[1])
