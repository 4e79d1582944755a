"""Finds which neurons of an attention module's projections make which head's queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from normuon.models.wrappers import bare_name

SCALABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

HARMLESS = frozenset(
    (
        *("v_proj", "o_proj", "out_proj", "dense", "c_proj"),
        *("rotary_emb", "rotary_pos_emb", "attn_dropout", "resid_dropout", "attention_dropout"),
    )
)
"""Children that leave the size of queries and keys alone."""

BY_CLASS = {
    "GPTNeoXAttention": "query_key_value",
    "GPT2Attention": "c_attn",
    "Phi3Attention": "qkv_proj",
}
"""Classes whose one projection makes queries, keys and values, with its name."""

KNOWN = (
    "QK-clip knows q_proj and k_proj, DeepSeek's latent attention (kv_b_proj), "
    "and the fused projections of GPT-NeoX, GPT-2 and Phi-3"
)


@dataclass(frozen=True, slots=True)
class Projection:
    """A layer that makes queries or keys.

    Args:
        child: its name in the attention module.
        factor_of_neuron: for each output neuron, a place in the list of factors
            ``[1, queries' of head 0 to H - 1, keys' of head 0 to G - 1, rotary queries' of head 0
            to H - 1]``.
    """

    child: str
    factor_of_neuron: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """An attention module and how its heads lie in its projections.

    Args:
        name: in the model.
        module: itself.
        num_heads: query heads of the whole model, H.
        num_key_heads: G, a divisor of H.
        projections: see `Projection`.
        query_child: the layer whose neurons are the queries, head after head.
        neurons_per_head: of that layer; None where tensor parallelism cannot cut it by heads.
    """

    name: str
    module: nn.Module
    num_heads: int
    num_key_heads: int
    projections: tuple[Projection, ...]
    query_child: str
    neurons_per_head: int | None

    def parameters(self) -> Iterator[tuple[str, Projection, Tensor, int]]:
        """Name, projection, parameter and neuron dim of everything that makes queries and keys."""
        for projection in self.projections:
            layer: Any = self.module.get_submodule(projection.child)
            name = f"{self.name}.{projection.child}"
            yield f"{name}.weight", projection, layer.weight, 1 if _is_conv1d(layer) else 0
            if layer.bias is not None:
                yield f"{name}.bias", projection, layer.bias, 0


def attentions_of(model: nn.Module, only: str | None) -> list[Attention]:
    """Every attention module of a transformers model, in the order of its modules.

    Args:
        model: the model.
        only: a pattern (`fnmatch`) of module names; None for all.

    Raises:
        ValueError: there is none, or one cannot be clipped exactly; says which and why.
    """
    found: list[Attention] = []
    owners: dict[int, str] = {}
    for full_name, module in model.named_modules():
        name = bare_name(full_name)
        if only is not None and not fnmatchcase(name, only):
            continue
        attention = _attention(name, module)
        if attention is None:
            continue
        for label, _, param, _ in attention.parameters():
            owner = owners.setdefault(id(param), label)
            if owner != label:
                raise ValueError(
                    f"{label} is also {owner}: one weight in two attentions cannot be scaled for "
                    "each of them; leave them out with only='pattern of module names'"
                )
        found.append(attention)
    if not found:
        among = "" if only is None else f" among {only!r}"
        raise ValueError(f"QKClip finds no attention{among} in {type(model).__name__}: {KNOWN}")
    return found


def _attention(name: str, module: nn.Module) -> Attention | None:
    children = dict(module.named_children())
    fused = next((BY_CLASS[c.__name__] for c in type(module).__mro__ if c.__name__ in BY_CLASS), "")
    if fused in children:
        makers: Sequence[str] = (fused,)
        harmless = HARMLESS
    elif "kv_b_proj" in children and hasattr(module, "qk_nope_head_dim"):
        makers = ("q_b_proj" if "q_b_proj" in children else "q_proj", "kv_b_proj")
        harmless = HARMLESS | {"q_a_proj", "q_a_layernorm", "kv_a_proj_with_mqa", "kv_a_layernorm"}
    elif {"q_proj", "k_proj"} <= children.keys():
        makers = ("q_proj", "k_proj")
        harmless = HARMLESS
    elif type(module).__name__.endswith("Attention") and any(
        _is_layer(child) for child in children.values()
    ):
        raise ValueError(
            f"{name}: {type(module).__name__} has {sorted(children)}, and {KNOWN}; leave it out "
            "with only='pattern of module names'"
        )
    else:
        return None
    _check(name, module, {k: v for k, v in children.items() if k not in harmless}, makers)
    return _by_layout(name, module, children, makers)


def _check(
    name: str, module: nn.Module, children: Mapping[str, nn.Module], makers: Sequence[str]
) -> None:
    for child_name, child in children.items():
        if child_name in makers:
            _check_layer(f"{name}.{child_name}", child)
        elif "norm" in (child_name + type(child).__name__).lower():
            raise ValueError(
                f"{name}.{child_name} ({type(child).__name__}) normalises queries or keys, so the "
                "size of their weights does not reach the logits: this attention needs no QK-clip"
            )
        elif not isinstance(child, (nn.Dropout, nn.Identity)):
            raise ValueError(
                f"{name}.{child_name}: QK-clip does not know what a {type(child).__name__} does to "
                "queries and keys; leave it out with only='pattern of module names'"
            )
    config = getattr(module, "config", None)
    for option in ("clip_qkv", "attn_logit_softcapping"):
        if getattr(config, option, None) is not None:
            raise ValueError(
                f"{name}: config.{option}={getattr(config, option)} bounds the logits already, so "
                "they do not scale with the weights: this attention needs no QK-clip"
            )


def _check_layer(label: str, layer: nn.Module) -> None:
    if not _is_layer(layer):
        raise ValueError(
            f"{label}: QK-clip scales Linear and Conv1D layers, not a {type(layer).__name__}; "
            "merge adapters first, or leave it out with only='pattern of module names'"
        )
    for kind in ("weight", "bias"):
        param = getattr(layer, kind, None)
        if param is not None and param.dtype not in SCALABLE:
            raise ValueError(f"{label}.{kind} is {param.dtype}, which cannot be scaled exactly")
        if param is not None and not param.requires_grad:
            raise ValueError(
                f"{label}.{kind} is frozen and QK-clip would change it; leave it out with "
                "only='pattern of module names'"
            )


def _is_conv1d(layer: nn.Module) -> bool:
    return any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)


def _is_layer(layer: nn.Module) -> bool:
    return (isinstance(layer, nn.Linear) or _is_conv1d(layer)) and not list(layer.children())


def _num_neurons(layer: Any) -> int:
    """Of the whole model: a DTensor's shape is global."""
    return int(layer.weight.shape[1 if _is_conv1d(layer) else 0])


def _by_layout(
    name: str, module: nn.Module, children: Mapping[str, nn.Module], makers: Sequence[str]
) -> Attention:
    """Where the heads are."""
    config = getattr(module, "config", None)
    total = [_num_neurons(children[maker]) for maker in makers]
    heads = getattr(config, "num_attention_heads", None)
    per_head: int | None
    if makers[-1] == "kv_b_proj":
        nope, rope = (
            _size(name, module, "qk_nope_head_dim"),
            _size(name, module, "qk_rope_head_dim"),
        )
        per_head = nope + rope
        num_heads = num_key_heads = total[0] // per_head
        values = total[1] // num_heads - nope
        q, k, r = _places(num_heads, num_heads)
        layouts = [
            [place for h in range(num_heads) for place in [q[h]] * nope + [r[h]] * rope],
            [place for h in range(num_heads) for place in [k[h]] * nope + [0] * values],
        ]
    elif makers[0] == "query_key_value":
        size = _size(name, module, "head_size")
        per_head, num_heads = 3 * size, total[0] // (3 * size)
        num_key_heads = num_heads
        q, k, _ = _places(num_heads, num_heads)
        layouts = [
            [p for h in range(num_heads) for p in [q[h]] * size + [k[h]] * size + [0] * size]
        ]
    else:
        size = _size(name, module, "head_dim")
        if len(makers) == 2:
            per_head, num_heads, num_key_heads = size, total[0] // size, total[1] // size
        else:
            per_head, num_heads = None, heads if isinstance(heads, int) else 0
            num_key_heads = (total[0] // size - num_heads) // 2
        q, k, _ = _places(num_heads, num_key_heads)
        of_queries = [place for place in q for _ in range(size)]
        of_keys = [place for place in k for _ in range(size)]
        of_values = [0] * (num_key_heads * size)
        layouts = [of_queries, of_keys] if len(makers) == 2 else [of_queries + of_keys + of_values]
    if isinstance(heads, int) and heads != num_heads:
        raise ValueError(
            f"{name}.{makers[0]}.weight makes {num_heads} heads and the model has {heads}: where "
            "ranks share the heads, their weights have to be DTensors (parallelize_module)"
        )
    if [len(layout) for layout in layouts] != total or num_heads % max(1, num_key_heads):
        raise ValueError(
            f"{name}: its projections have {total} neurons, which do not split into {num_heads} "
            f"query and {num_key_heads} key heads"
        )
    projections = tuple(
        Projection(maker, tuple(layout)) for maker, layout in zip(makers, layouts, strict=True)
    )
    return Attention(name, module, num_heads, num_key_heads, projections, makers[0], per_head)


def _places(num_heads: int, num_key_heads: int) -> tuple[range, range, range]:
    """Places of the factors of queries, keys and rotary queries; place 0 is the factor 1."""
    keys = 1 + num_heads
    rotary = keys + num_key_heads
    return range(1, keys), range(keys, rotary), range(rotary, rotary + num_heads)


def _size(name: str, module: nn.Module, attribute: str) -> int:
    size = getattr(module, attribute, None)
    if not isinstance(size, int):
        raise ValueError(f"{name}: {type(module).__name__} has no attribute {attribute}")
    return size
