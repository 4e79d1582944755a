"""Output heads: the matrices whose output leaves the model.

Four kinds of evidence are tried in this order:

1. the model names its head: transformers' ``get_output_embeddings()``, timm's ``get_classifier()``;
2. in a transformers task model: layers outside its base model whose output no layer there reads;
3. names: `HEAD_NAMES` and similar ones; in a module of such a name, layers that no later one reads;
4. structure: logits over an embedding's vocabulary, and the last matrices of the model if no other
   layer reads their output.

A layer *reads* another if it takes as many features as the other gives. Layers in the items of a
``ModuleList`` are a model's repeated blocks, of which none is the last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from normuon.models.wrappers import bare_name, innermost

HEAD_NAMES = frozenset(
    (
        *("lm_head", "embed_out", "unembed", "unembedding", "output_head", "to_logits", "logits"),
        *("qa_outputs", "output_projection", "output_layer", "final_layer", "conv_out", "fc_out"),
        *("auxlogits", "cls_score", "bbox_pred", "readout"),
    )
)
"""A layer in a module of one of these names may be an output head, wherever the module is."""

HEAD_ENDINGS = ("_head", "_heads", "_classifier", "_logits")
"""So may one in a module whose name ends so, and is not one of attention's heads."""

ATTENTION_STARTS = ("multi", "attn", "attention", "self", "num", "talking")

TOP_LEVEL_HEAD_NAMES = frozenset(("head", "heads", "classifier", "classifiers", "score"))
"""So may one in a direct child of the model with one of these names."""

TOP_LEVEL_LAYER_NAMES = frozenset(("output", "out", "fc", "decoder", "proj_out", "final", "linear"))
"""So is a direct child of the model that is a single layer and has one of these names."""

MODULATIONS = ("modulation", "adaln", "ada_ln")
"""Layers that scale and shift others: their output, cut into parts, stays in the model."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A module that reads features, and gives features if it is a matrix.

    Args:
        name: within the innermost model, without what wrappers put into it.
        module: itself.
        reads: the numbers of features that it may read.
        gives: how many features it gives; None for norms and others that are not a single matrix.
        in_block: whether it lies within an item of a ``ModuleList``.
    """

    name: str
    module: nn.Module
    reads: frozenset[int]
    gives: int | None
    in_block: bool

    @property
    def is_modulation(self) -> bool:
        """Whether its name says that it scales and shifts others."""
        return any(part in self.name.lower() for part in MODULATIONS)

    def is_read_by(self, others: Sequence[Layer]) -> bool:
        """Whether any of some layers takes as many features as this one gives."""
        return any(self.gives in other.reads for other in others if other is not self)


def output_heads(model: nn.Module) -> dict[int, str]:
    """The reason for each parameter that belongs to an output head, by its ``id``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> set(output_heads(model)) == {id(p) for p in model[2].parameters()}
        True
    """
    found: dict[int, str] = {}
    for module in _named_by_the_model(model):
        _add(found, module, "output head")
    layers = layers_of(model)
    for layer in _outside_base_models(model, layers):
        _add(found, layer.module, "output head: outside the base model")
    for layer in _heads_by_name(layers):
        _add(found, layer.module, "output head")
    for layer in _logits_over_a_vocabulary(model, layers):
        _add(found, layer.module, "output head: logits over the vocabulary")
    has_head = any(id(p) in found for layer in layers for p in layer.module.parameters())
    for layer in () if has_head else _last_layers(model, layers):
        _add(found, layer.module, "output head: nothing reads it")
    return found


def last_matrix(model: nn.Module) -> str | None:
    """The name of the module that holds a model's last matrix."""
    last = None
    for name, module in model.named_modules():
        if _gives(module) is not None:
            last = name
    return last


def is_base_model(model: nn.Module) -> bool:
    """Whether this is a transformers model without a head, on which heads are put."""
    _, model = innermost(model)
    return getattr(model, "base_model", None) is model


def _add(found: dict[int, str], module: nn.Module, reason: str) -> None:
    for param in module.parameters():
        found.setdefault(id(param), reason)


def layers_of(model: nn.Module) -> list[Layer]:
    """The layers of the innermost model, in the order in which they are registered."""
    _, model = innermost(model)
    found: list[Layer] = []

    def walk(name: str, module: nn.Module, in_block: bool) -> None:
        gives = _gives(module)
        reads = _reads(module)
        if reads or gives is not None:
            found.append(Layer(bare_name(name), module, reads, gives, in_block))
        for child_name, child in module.named_children():
            is_item = isinstance(module, nn.ModuleList) and bool(list(child.children()))
            walk(f"{name}.{child_name}" if name else child_name, child, in_block or is_item)

    walk("", model, False)
    return found


def _gives(module: nn.Module) -> int | None:
    """Output features of a single matrix."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups == 1:
        return module.out_channels
    features = getattr(module, "nf", None)
    is_conv1d = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return features if is_conv1d and isinstance(features, int) else None


def _reads(module: nn.Module) -> frozenset[int]:
    """How many features a module may take: for an unknown class, any size of its parameters."""
    if isinstance(module, nn.Linear):
        return frozenset((module.in_features,))
    if isinstance(module, nn.modules.conv._ConvNd):
        return frozenset((module.in_channels,))
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return frozenset()
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return frozenset((module.input_size,))
    sizes = (size for param in module.parameters(recurse=False) for size in param.shape)
    return frozenset(sizes)


def _named_by_the_model(model: nn.Module) -> Iterator[nn.Module]:
    """What transformers' and timm's models, wrapped or not, call their output layer.

    And what torch's adaptive softmax gives logits by: its head, and the last layer of each cluster.
    """
    for module in model.modules():
        if isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
            yield from (module.head, *(list(cluster.children())[-1] for cluster in module.tail))
        for method in ("get_output_embeddings", "get_classifier"):
            ask = getattr(module, method, None)
            if ask is None:
                continue
            try:
                heads = ask()
            except (AttributeError, NotImplementedError, TypeError):
                continue  # A base model that has no head says so in one of these ways.
            for head in heads if isinstance(heads, (tuple, list)) else (heads,):
                if isinstance(head, nn.Module):
                    yield head


def _outside_base_models(model: nn.Module, layers: Sequence[Layer]) -> Iterator[Layer]:
    """Of outermost task models only: a base model may contain others with their heads."""
    for module in model.modules():
        base = getattr(module, "base_model", None)
        if not isinstance(getattr(module, "base_model_prefix", None), str):
            continue
        if not isinstance(base, nn.Module) or base is module:
            return
        inside = {id(m) for m in base.modules()}
        of_module = {id(m) for m in module.modules()} - inside
        yield from _unread_later([layer for layer in layers if id(layer.module) in of_module])
        return


def _unread_later(layers: Sequence[Layer]) -> Iterator[Layer]:
    """Matrices whose output none of the layers after them reads."""
    for place, layer in enumerate(layers):
        if layer.gives is None or layer.is_modulation:
            continue
        if not layer.is_read_by(layers[place + 1 :]):
            yield layer


def _heads_by_name(layers: Sequence[Layer]) -> Iterator[Layer]:
    """In each module with a head's name, the layers that no later one in it reads."""
    modules: dict[str, list[Layer]] = {}
    for layer in layers:
        name = _head_module(layer)
        if name is not None:
            modules.setdefault(name, []).append(layer)
    for of_module in modules.values():
        yield from _unread_later(of_module)


def _head_module(layer: Layer) -> str | None:
    """The name of the outermost module with a head's name: the layer's own or one around it."""
    segments = layer.name.split(".")
    for depth, segment in enumerate(segments):
        lower = segment.lower()
        is_layer = depth == len(segments) - 1
        of_attention = lower.startswith(ATTENTION_STARTS)
        if lower in HEAD_NAMES:
            return ".".join(segments[: depth + 1])
        if layer.in_block:
            continue
        if (
            (lower.endswith(HEAD_ENDINGS) and not of_attention)
            or lower == "head"
            or (depth == 0 and lower in TOP_LEVEL_HEAD_NAMES)
            or (depth == 0 and is_layer and lower in TOP_LEVEL_LAYER_NAMES)
        ):
            return ".".join(segments[: depth + 1])
    return None


def _logits_over_a_vocabulary(model: nn.Module, layers: Sequence[Layer]) -> Iterator[Layer]:
    vocabularies = {
        (module.embedding_dim, module.num_embeddings)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    }
    for layer in layers:
        if layer.in_block or layer.gives is None or layer.is_read_by(layers):
            continue
        if any((size, layer.gives) in vocabularies for size in layer.reads):
            yield layer


def _last_layers(model: nn.Module, layers: Sequence[Layer]) -> Iterator[Layer]:
    """The matrices at the end that no other layer reads; one matrix at least stays hidden."""
    matrices = [layer for layer in layers if layer.gives is not None]
    readers = list(layers)
    if matrices and not any(
        isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in model.modules()
    ):
        readers.remove(matrices[0])  # It reads what comes into the model.
    for layer in reversed(matrices[1:]):
        if layer.in_block or layer.is_modulation or layer.is_read_by(readers):
            return
        yield layer
