"""The model that a checkpoint is of, built from what the checkpoint says of it."""

from __future__ import annotations

import torch
from torch import nn

from normuon_lab.errors import InputError
from normuon_lab.train.pretrain.checkpoint import CheckpointDescription


def model_of(description: CheckpointDescription, *, device: str = "cpu") -> nn.Module:
    """A model of the checkpoint's shapes, in float32, whose weights mean nothing yet.

    Args:
        description: of the checkpoint.
        device: where to; "meta" takes no memory.

    Raises:
        InputError: this version of transformers cannot build it.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(description.model_config)
    try:
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[:1]
        raise InputError(
            f"this version of transformers cannot build the checkpoint's model: {''.join(reason)}"
        ) from error
