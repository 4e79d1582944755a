"""What each parameter of a model is, told by the module that owns it: matrix, embedding, head, ...

Module types decide; names only where a type cannot tell (which Linear is the output head); a shape
never does on its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from normuon.matrix_view import MatrixView
from normuon.options import Algorithm

HEAD_NAMES = ("lm_head", "embed_out", "unembed", "unembedding", "output_head")
"""Modules of these names are output heads, wherever they are."""

TOP_LEVEL_HEAD_NAMES = ("head", "output", "classifier", "score", "fc", "fc_out", "qa_outputs")
"""Modules of these names are output heads when they are a direct child of the model."""

EMBEDDING_NAME_PARTS = ("embed", "_token", "token_", "pos_emb")
"""A bare parameter whose name holds one of these is an embedding."""

WRAPPER_PREFIXES = ("module.", "_orig_mod.", "_fsdp_wrapped_module.")
"""What DDP, torch.compile and FSDP1 put before the names of the model they wrap."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a parameter is, and why.

    Args:
        algorithm: ``"normuon"`` for a hidden matrix, ``"adamw"`` for anything else.
        reason: a few words for the table that users read.
        view: how the parameter is seen as matrices; None for AdamW.
    """

    algorithm: Algorithm
    reason: str
    view: MatrixView | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """A module that holds a parameter; a tied parameter has several."""

    module_name: str
    module: nn.Module
    param_name: str


def owners_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[Owner]]]:
    """Each trainable parameter once, under its first name, with every module that holds it."""
    found: dict[int, tuple[str, nn.Parameter, list[Owner]]] = {}
    for module_name, module in model.named_modules():
        for param_name, param in module.named_parameters(recurse=False):
            name = f"{module_name}.{param_name}" if module_name else param_name
            entry = found.setdefault(id(param), (name, param, []))
            entry[2].append(Owner(module_name, module, param_name))
    yield from (entry for entry in found.values() if entry[1].requires_grad)


def output_heads(model: nn.Module) -> set[int]:
    """``id`` of every parameter of a module that the model itself calls its output head.

    Asks transformers' ``get_output_embeddings()`` and timm's ``get_classifier()`` of every
    submodule, so that wrapped models answer too.
    """
    heads: set[int] = set()
    for module in model.modules():
        for method in ("get_output_embeddings", "get_classifier"):
            ask = getattr(module, method, None)
            if ask is None:
                continue
            try:
                head = ask()
            except (AttributeError, NotImplementedError, TypeError):
                continue  # A base model that has no head says so in one of these ways.
            if isinstance(head, nn.Module):
                heads.update(id(param) for param in head.parameters())
    return heads


def judge(param: Tensor, owners: list[Owner], heads: set[int]) -> Verdict | None:
    """What a parameter is; None when nothing but its shape could tell.

    Args:
        param: the parameter.
        owners: the modules that hold it.
        heads: from `output_heads`.
    """
    if param.ndim < 2:
        return Verdict("adamw", f"{'scalar' if param.ndim == 0 else 'vector'}: {_where(owners[0])}")
    for owner in owners:
        if isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag)):
            tied = ", tied to the output head" if id(param) in heads or len(owners) > 1 else ""
            return Verdict("adamw", f"embedding{tied}")
    if id(param) in heads or any(_is_head_by_name(owner) for owner in owners):
        return Verdict("adamw", "output head")
    verdict = _judge_by_type(param, owners[0]) or _judge_by_name(owners[0])
    if verdict is None and param.numel() == max(param.shape):
        # No matrix in any reading: a temperature per head, or a scale per channel of an image.
        return Verdict("adamw", f"vector {list(param.shape)}: {_where(owners[0])}")
    return verdict


def _where(owner: Owner) -> str:
    return f"{type(owner.module).__name__}.{owner.param_name}"


def _is_head_by_name(owner: Owner) -> bool:
    name = owner.module_name
    for prefix in WRAPPER_PREFIXES:
        name = name.removeprefix(prefix)
    leaf = name.rsplit(".", 1)[-1]
    return isinstance(owner.module, nn.Linear) and (
        leaf in HEAD_NAMES or name in TOP_LEVEL_HEAD_NAMES
    )


def _judge_by_type(param: Tensor, owner: Owner) -> Verdict | None:
    module, kind = owner.module, type(owner.module).__name__
    class_names = [cls.__name__ for cls in type(module).__mro__]
    if owner.param_name.endswith("bias"):
        return Verdict("adamw", f"bias of {kind}")
    if any(name.endswith("Norm") for name in class_names) or isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    ):
        return Verdict("adamw", f"norm: {kind}")
    if isinstance(module, nn.modules.conv._ConvNd):
        return _judge_convolution(module, owner)
    if isinstance(module, (nn.Linear, nn.RNNBase, nn.RNNCellBase)):
        return Verdict("normuon", kind, MatrixView.linear())
    if isinstance(module, nn.Bilinear):
        return Verdict("normuon", f"{kind}, inputs flattened", MatrixView.conv())
    if isinstance(module, nn.MultiheadAttention):
        if owner.param_name in ("bias_k", "bias_v"):
            return Verdict("adamw", f"bias of {kind}")
        return Verdict("normuon", f"{kind}.{owner.param_name}", MatrixView.linear())
    if "Conv1D" in class_names and param.ndim == 2:
        return Verdict("normuon", "Conv1D, stored [in, out]", MatrixView.transposed())
    if any(name.endswith("Router") for name in class_names):
        return Verdict("adamw", f"router: {kind} (logits over experts)")
    if any(name.endswith("Experts") for name in class_names) and param.ndim == 3:
        transposed = bool(getattr(module, "is_transposed", False))
        stored = "[E, in, out]" if transposed else "[E, out, in]"
        return Verdict(
            "normuon", f"experts: {kind}, {stored}", MatrixView.experts(transposed=transposed)
        )
    return None


def _judge_convolution(module: nn.modules.conv._ConvNd, owner: Owner) -> Verdict | None:
    kind, groups = type(module).__name__, module.groups
    if "PatchEmbed" in owner.module_name or "patch_embed" in owner.module_name:
        return Verdict("adamw", f"patch embedding: {kind}")
    if module.transposed:
        # [in, out / groups, *kernel]: with groups, the groups lie along the inputs.
        view = MatrixView(neuron_dim=1)
        return Verdict("normuon", f"{kind}, flattened", view) if groups == 1 else None
    if groups > 1 and groups == module.out_channels:
        return Verdict("adamw", f"depthwise {kind}: one small kernel per neuron, no matrix")
    if groups > 1:
        return Verdict("normuon", f"{kind}, {groups} groups", MatrixView(heads=groups))
    return Verdict("normuon", f"{kind}, flattened", MatrixView.conv())


def _judge_by_name(owner: Owner) -> Verdict | None:
    if any(part in owner.param_name for part in EMBEDDING_NAME_PARTS):
        return Verdict("adamw", f"embedding, by its name: {_where(owner)}")
    if "bias" in owner.param_name:
        return Verdict("adamw", f"bias, by its name: {_where(owner)}")
    return None
