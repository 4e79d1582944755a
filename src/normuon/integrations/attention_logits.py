"""The largest attention logit of every head under the mask in use, block by block of queries."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK_ELEMENTS = 1 << 24
"""Logits that are computed at a time: 64 MiB of them."""


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees. None and False forbid nothing.

    Args:
        full: bool ``[B or 1, H or 1, T, S]``.
        causal: keys after the query are hidden.
        window: so are keys this many places or more before it.
        real: bool ``[B, T]``: False for padding, as a query and as a key.
        document: int ``[B or 1, T]``: only keys of the query's own document are seen.
    """

    full: Tensor | None = None
    causal: bool = False
    window: int | None = None
    real: Tensor | None = None
    document: Tensor | None = None

    def key_range(self, start: int, stop: int, num_keys: int) -> tuple[int, int]:
        """The keys that queries ``start`` to ``stop`` may see at all."""
        first = 0 if self.window is None else max(0, start - self.window + 1)
        return first, min(stop, num_keys) if self.causal else num_keys

    def allowed(self, start: int, stop: int, first: int, last: int, like: Tensor) -> Tensor | None:
        """Bool, broadcastable to ``[B, H, stop - start, last - first]``; None if all is allowed."""
        queries = torch.arange(start, stop, device=like.device)[:, None]
        keys = torch.arange(first, last, device=like.device)[None, :]
        conditions = []
        if self.full is not None:
            conditions.append(self.full[..., start:stop, first:last])
            if self.full.shape[-2] == self.full.shape[-1]:
                # A token that may not see itself is padding; what it would see counts for nothing.
                itself = self.full.diagonal(dim1=-2, dim2=-1)[..., start:stop]
                conditions.append(itself[..., None])
        if self.causal:
            conditions.append(keys <= queries)
        if self.window is not None:
            conditions.append(queries - keys < self.window)
        if self.real is not None:
            conditions.append(self.real[:, None, start:stop, None])
            conditions.append(self.real[:, None, None, first:last])
        if self.document is not None:
            of_queries = self.document[:, None, start:stop, None]
            conditions.append(of_queries == self.document[:, None, None, first:last])
        result: Tensor | None = None
        for condition in conditions:
            result = condition if result is None else result & condition
        return result


def max_logits(query: Tensor, key: Tensor, *, scaling: float, mask: Mask) -> Tensor:
    """``max_{b, i, j} scaling <q_i, k_j>`` of every head, over the pairs that the mask allows.

    Products are in float32, or in float64 for float64 queries. The memory is that of one block of
    logits, for any length.

    Args:
        query: ``[B, H, T, d]``, as it enters the softmax's product: after rotary embeddings.
        key: ``[B, G, S, d]``; query head h reads key head ``h // (H / G)``.
        scaling: positive.
        mask: which pairs count.

    Returns:
        ``[H]``, float32 or float64; -inf for a head without any pair.

    Example:
        >>> q = torch.tensor([[[[1.0], [2.0]]]])
        >>> k = torch.tensor([[[[1.0], [5.0]]]])
        >>> max_logits(q, k, scaling=1.0, mask=Mask(causal=True))
        tensor([10.])
        >>> max_logits(q.flip(2), k, scaling=1.0, mask=Mask(causal=True))
        tensor([5.])
    """
    batch, num_heads, num_queries, size = query.shape
    num_groups, num_keys = key.shape[1], key.shape[2]
    shared = num_heads // num_groups
    dtype = torch.promote_types(query.dtype, torch.float32)
    best = torch.full((num_heads,), -torch.inf, dtype=dtype, device=query.device)
    rows = max(1, BLOCK_ELEMENTS // max(1, batch * num_heads * num_keys))
    device_type = query.device.type
    has_autocast = torch.amp.is_autocast_available(device_type)
    full_precision = torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()
    with torch.no_grad(), full_precision:
        query, key = query.detach(), key.detach()
        for start in range(0, num_queries, rows):
            stop = min(start + rows, num_queries)
            first, last = mask.key_range(start, stop, num_keys)
            q = query[:, :, start:stop].to(dtype)
            q = q.reshape(batch, num_groups, shared * (stop - start), size)
            logits = q @ key[:, :, first:last].to(dtype).transpose(-1, -2)
            logits = logits.view(batch, num_heads, stop - start, last - first)
            allowed = mask.allowed(start, stop, first, last, query)
            if allowed is not None:
                logits = logits.masked_fill(~allowed, -torch.inf)
            best = torch.maximum(best, logits.amax(dim=(0, 2, 3)))
    return best * scaling


def mask_in_use(
    label: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Any,
    options: Mapping[str, Any],
    implementation: str,
) -> Mask:
    """The mask that an attention function of transformers builds from its arguments.

    Args:
        label: the attention module's name, the start of messages.
        module: the attention module.
        query: ``[B, H, T, d]``.
        key: ``[B, G, S, d]``.
        attention_mask: None, ``[B, S]``, or ``[B, 1 or H, T, S]``, bool or additive.
        options: the function's keyword arguments.
        implementation: its name in transformers.

    Raises:
        ValueError: a mask of a kind that this module cannot read.
    """
    causal = options.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"{label}: QK-clip cannot read a {type(attention_mask).__name__}; load the model with "
            "attn_implementation='sdpa' or a flash_attention, or 'eager'"
        )
    if attention_mask is not None and attention_mask.ndim == 4:
        mask = attention_mask[..., :num_keys]
        if mask.dtype != torch.bool:
            mask = mask > torch.finfo(mask.dtype).min / 2
        return Mask(full=mask)
    if num_queries != num_keys and causal and num_queries > 1:
        raise ValueError(
            f"{label}: {num_queries} queries meet {num_keys} keys without a mask; train without a "
            "cache (use_cache=False)"
        )
    return Mask(
        causal=causal and num_queries > 1,
        window=options.get("sliding_window"),
        real=None if attention_mask is None else attention_mask.bool(),
        document=_documents(query, options, implementation) if attention_mask is None else None,
    )


def _documents(query: Tensor, options: Mapping[str, Any], implementation: str) -> Tensor | None:
    """The number of each token's document, where flash attention packs several into one row."""
    ends, positions = options.get("cu_seq_lens_q"), options.get("position_ids")
    if ends is not None:
        places = torch.arange(query.shape[2], device=query.device)
        return torch.bucketize(places, ends[1:].to(places.dtype), right=True)[None]
    if positions is not None and "flash" in implementation and query.shape[0] == 1:
        starts: Tensor = positions.view(1, -1) == 0
        return starts.cumsum(-1)
    return None
