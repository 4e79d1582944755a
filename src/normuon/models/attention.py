"""Finds the parameters that are stacks of attention heads, and the size of a head."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from normuon.models.rules import Verdict

HEAD_SIZE_NAMES = ("head_dim", "attention_head_size", "head_size", "key_value_proj_dim")
"""Attributes by which attention modules (transformers', timm's, torch's) call a head's size."""

SEPARATE_NAMES = (
    *(("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q", "k", "v")),
    *(("wq", "wk", "wv"), ("to_q", "to_k", "to_v"), ("q_lin", "k_lin", "v_lin")),
)
FUSED_NAMES = ("qkv", "qkv_proj", "to_qkv", "Wqkv", "c_attn", "query_key_value")
PROJECTION_NAMES = frozenset(
    (*(n for names in SEPARATE_NAMES for n in names), *FUSED_NAMES, "q_attn")
)
"""Their children whose output neurons are heads, one after another: separate ones, then fused.

Fused ones may follow any order, by heads or by q, k and v, as long as a head's neurons of q, of k
and of v each stay together. Projections of latent attention are not among them: their neurons
belong to several heads at once, or to heads of another size.
"""

OWN_PROJECTIONS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
"""`torch.nn.MultiheadAttention` holds its projections itself."""


def head_sizes(model: nn.Module) -> dict[int, int]:
    """Output neurons per head of every query, key and value projection, by ``id`` of the weight.

    Example:
        >>> attention = nn.MultiheadAttention(embed_dim=12, num_heads=3)
        >>> head_sizes(attention) == {id(attention.in_proj_weight): 4}
        True
    """
    found: dict[int, int] = {}
    for module in model.modules():
        sizes = (getattr(module, name, None) for name in HEAD_SIZE_NAMES)
        size = next((size for size in sizes if isinstance(size, int)), None)
        if size is None:
            continue
        weights = [
            getattr(child, "weight", None)
            for name, child in module.named_children()
            if name in PROJECTION_NAMES
        ]
        if isinstance(module, nn.MultiheadAttention):
            weights += [getattr(module, name) for name in OWN_PROJECTIONS]
        found.update({id(weight): size for weight in weights if _is_trained(weight)})
    return found


def without_head_size(model: nn.Module) -> dict[int, str]:
    """The class of the attention module of every projection whose head size is not known.

    By ``id`` of the weight. Attention is a module with a fused projection, or with separate ones of
    q, k and v, under the names that `head_sizes` looks for.

    Example:
        >>> attention = nn.ModuleDict({"c_attn": nn.Linear(4, 12), "c_proj": nn.Linear(4, 4)})
        >>> without_head_size(attention) == {id(attention["c_attn"].weight): "ModuleDict"}
        True
    """
    known = head_sizes(model)
    found: dict[int, str] = {}
    for module in model.modules():
        children = dict(module.named_children())
        for names in (*((name,) for name in FUSED_NAMES), *SEPARATE_NAMES):
            weights = [getattr(children.get(name), "weight", None) for name in names]
            if all(_is_trained(weight) and id(weight) not in known for weight in weights):
                found.update({id(weight): type(module).__name__ for weight in weights})
    return found


def _is_trained(weight: object) -> bool:
    return isinstance(weight, Tensor) and weight.requires_grad


def split_into_heads(label: str, param: Tensor, verdict: Verdict, head_size: int) -> Verdict:
    """The verdict on a projection, with a view that makes every head a separate matrix.

    Args:
        label: the parameter's name and shape, the start of the message.
        param: the projection's weight.
        verdict: what it is as a whole.
        head_size: output neurons per head.

    Raises:
        ValueError: the number of neurons is not a multiple of the head size.
    """
    view = verdict.view
    if view is None or not view.is_whole:
        return verdict
    num_neurons = param.shape[view.neuron_dim]
    if num_neurons % head_size:
        raise ValueError(
            f"{label}: split_heads=True, but its {num_neurons} neurons are not a multiple of its "
            f"module's head size, {head_size}; split it with "
            "overrides={'name or pattern': normuon.MatrixView(heads=...)}"
        )
    heads = num_neurons // head_size
    return replace(
        verdict, view=replace(view, heads=heads), reason=f"{verdict.reason}, {heads} heads"
    )
