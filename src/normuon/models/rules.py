"""Decides what each parameter of a model is, by the modules that own it.

Module types decide, the more specific before `nn.Linear`; names only where a type is not enough;
a shape only if it leaves no matrix. Anything else is ambiguous, and an error names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from normuon.models.view import MatrixView
from normuon.options import Algorithm

EMBEDDING_NAME_PARTS = ("embed", "_token", "token_", "pos_emb", "trainable_tokens")
"""A bare parameter whose name holds one of these is an embedding."""

ROUTER_ENDINGS = ("Router", "Gating", "TopKGate", "MoEGate", "MoeGate", "NoisyGate")
"""A class whose name ends so sends tokens to experts, and so does what lies directly in one."""

PATCH_PARTS = ("PatchEmbed", "patch_embed", "patch_embedding", "patchify", "x_embedder")
"""A matrix in a class or module whose name holds one of these reads an image's patches."""

MATRIX_NAMES = ("weight", "weight_ih", "weight_hh", "weight_hr", "in_proj_weight")
"""What a matrix module calls its own matrices; the rest of its parameters are gains and such."""

ADAPTER_ENDINGS = (("A", "B"), ("a", "b"), ("down", "up"))
"""How the names of a low-rank adapter's two factors end, the one that the input meets first."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a parameter is, and why.

    Args:
        algorithm: ``"normuon"`` for a hidden matrix, ``"adamw"`` for anything else.
        reason: a few words for the table that users read.
        view: how the parameter becomes matrices; None for AdamW.
    """

    algorithm: Algorithm
    reason: str
    view: MatrixView | None = None


@dataclass(frozen=True, slots=True)
class Owner:
    """A module that holds a parameter; a tied parameter has several.

    Args:
        module_name: its name in the model.
        module: itself.
        param_name: what it calls the parameter.
        parents: the modules around it, the nearest first.
    """

    module_name: str
    module: nn.Module
    param_name: str
    parents: tuple[nn.Module, ...] = ()

    @property
    def kind(self) -> str:
        """The module's class."""
        return type(self.module).__name__


def owners_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[Owner]]]:
    """Each trainable parameter once, under its first name, with every module that holds it."""
    found: dict[int, tuple[str, nn.Parameter, list[Owner]]] = {}
    parents: dict[str, tuple[nn.Module, ...]] = {"": ()}
    for module_name, module in model.named_modules():
        above = parents[module_name]
        prefix = f"{module_name}." if module_name else ""
        for child_name, _ in module.named_children():
            parents[prefix + child_name] = (module, *above)
        for param_name, param in module.named_parameters(recurse=False):
            entry = found.setdefault(id(param), (prefix + param_name, param, []))
            entry[2].append(Owner(module_name, module, param_name, above))
    yield from (entry for entry in found.values() if entry[1].requires_grad)


def judge(param: Tensor, owners: list[Owner], heads: Mapping[int, str]) -> Verdict | None:
    """What a parameter is; None if only its shape could tell.

    Args:
        param: the parameter.
        owners: the modules that hold it.
        heads: from `output_heads`.
    """
    first = owners[0]
    if param.ndim < 2:
        return Verdict("adamw", f"{'scalar' if param.ndim == 0 else 'vector'}: {_where(first)}")
    for owner in owners:
        if isinstance(owner.module, (nn.Embedding, nn.EmbeddingBag)):
            tied = ", tied to the output head" if id(param) in heads or len(owners) > 1 else ""
            return Verdict("adamw", f"embedding{tied}")
    if id(param) in heads:
        return Verdict("adamw", heads[id(param)])
    if any(part in first.param_name for part in EMBEDDING_NAME_PARTS):
        return Verdict("adamw", f"embedding, by its name: {_where(first)}")
    if param.numel() == max(param.shape):
        # No matrix in any reading: a scale per channel, a gain, a gate with one output.
        return Verdict("adamw", f"vector {list(param.shape)}: {_where(first)}")
    return (
        _judge_parametrized(first)
        or _judge_router(param, first)
        or _judge_patches(first)
        or _judge_by_type(param, first)
        or _judge_by_name(param, first)
    )


def _class_names(module: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(module).__mro__]


def _where(owner: Owner) -> str:
    return f"{owner.kind}.{owner.param_name}"


def _judge_parametrized(owner: Owner) -> Verdict | None:
    """Weight norm, spectral norm and other parametrizations, under torch's old and new names.

    The layer does not multiply by the tensors that they train.
    """
    stem, _, ending = owner.param_name.rpartition("_")
    if isinstance(owner.module, ParametrizationList):
        return Verdict("adamw", f"part of a parametrized weight: {owner.param_name}")
    # The old functions leave the computed weight on the module as a plain tensor.
    if ending in ("orig", "g", "v") and isinstance(vars(owner.module).get(stem), Tensor):
        return Verdict("adamw", f"part of a parametrized weight: {_where(owner)}")
    return None


def _judge_router(param: Tensor, owner: Owner) -> Verdict | None:
    """By the class of the module or its parent, or as many outputs as experts beside it."""
    around = [owner.module, *owner.parents[:1]]
    for module in around:
        if any(name.endswith(ROUTER_ENDINGS) for name in _class_names(module)):
            return Verdict("adamw", f"router: {type(module).__name__} (logits over experts)")
    leaf = owner.module_name.rpartition(".")[2]
    if isinstance(owner.module, nn.Linear) and owner.parents:
        experts = getattr(owner.parents[0], "experts", None)
        listed = len(experts) if isinstance(experts, (nn.ModuleList, nn.Sequential)) else None
        if leaf == "router" or listed == owner.module.out_features:
            return Verdict("adamw", f"router: {leaf} (logits over experts)")
        sizes = {p.shape[0] for p in experts.parameters()} if isinstance(experts, nn.Module) else ()
        if leaf in ("gate", "gating") and owner.module.out_features in sizes:
            return Verdict("adamw", f"router: {leaf} (logits over experts)")
    return None


def _judge_patches(owner: Owner) -> Verdict | None:
    if not isinstance(owner.module, (nn.Linear, nn.modules.conv._ConvNd)):
        return None
    classes = [type(module).__name__ for module in (owner.module, *owner.parents[:2])]
    if any(part in text for part in PATCH_PARTS for text in (*classes, owner.module_name)):
        return Verdict("adamw", f"patch embedding: {owner.kind}")
    return None


def _judge_by_type(param: Tensor, owner: Owner) -> Verdict | None:
    module, kind = owner.module, owner.kind
    class_names = _class_names(module)
    if owner.param_name.endswith("bias"):
        return Verdict("adamw", f"bias of {kind}")
    if any(name.endswith("Norm") for name in class_names) or isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
    ):
        return Verdict("adamw", f"norm: {kind}")
    if any(name.endswith("Experts") for name in class_names) and param.ndim == 3:
        return _judge_experts(module, kind)
    if isinstance(module, nn.MultiheadAttention):
        if owner.param_name in ("bias_k", "bias_v"):
            return Verdict("adamw", f"bias of {kind}")
        return Verdict("normuon", f"{kind}.{owner.param_name}", MatrixView.linear())
    matrix_types = (nn.Linear, nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.modules.conv._ConvNd)
    is_conv1d = "Conv1D" in class_names and param.ndim == 2
    if not isinstance(module, matrix_types) and not is_conv1d:
        return None
    if not owner.param_name.startswith(MATRIX_NAMES):
        return None  # Something that a subclass added.
    if is_conv1d:
        return Verdict("normuon", "Conv1D, stored [in, out]", MatrixView.transposed())
    if isinstance(module, nn.modules.conv._ConvNd):
        return _judge_convolution(module, owner)
    if isinstance(module, nn.Bilinear):
        return Verdict("normuon", f"{kind}, inputs flattened", MatrixView.conv())
    return Verdict("normuon", kind, MatrixView.linear())


def _judge_experts(module: nn.Module, kind: str) -> Verdict:
    transposed = bool(getattr(module, "is_transposed", False))
    stored = "[E, in, out]" if transposed else "[E, out, in]"
    view = MatrixView.experts(transposed=transposed)
    return Verdict("normuon", f"experts: {kind}, {stored}", view)


def _judge_convolution(module: nn.modules.conv._ConvNd, owner: Owner) -> Verdict | None:
    kind, groups = type(module).__name__, module.groups
    if module.transposed:
        # [in, out / groups, *kernel]: with groups, the groups lie along the inputs.
        view = MatrixView(neuron_dim=1)
        return Verdict("normuon", f"{kind}, flattened", view) if groups == 1 else None
    if groups > 1 and groups == module.out_channels:
        return Verdict("adamw", f"depthwise {kind}: one small kernel per neuron, not a matrix")
    if groups > 1:
        return Verdict("normuon", f"{kind}, {groups} groups", MatrixView(heads=groups))
    return Verdict("normuon", f"{kind}, flattened", MatrixView.conv())


def _judge_by_name(param: Tensor, owner: Owner) -> Verdict | None:
    name = owner.param_name
    if name.startswith("lora_") and "embedding" not in owner.module_name and param.ndim == 2:
        return _judge_adapter(owner)
    if any(part in f"{owner.module_name}.{name}" for part in ("lora_embedding", "lora_magnitude")):
        return Verdict("adamw", f"adapter of an embedding: {owner.module_name}")
    if "bias" in name:
        return Verdict("adamw", f"bias, by its name: {_where(owner)}")
    if name.startswith(("A_log", "dt_", "ia3_")):
        return Verdict("adamw", f"scales of a state space or adapter: {_where(owner)}")
    if "trainable_tokens" in owner.module_name or "ia3_" in owner.module_name:
        return Verdict("adamw", f"adapter: {owner.module_name}")
    if any(cls.startswith("XLNetRelative") for cls in _class_names(owner.module)):
        return Verdict("adamw", f"attention of three dims: {_where(owner)}")
    return None


def _judge_adapter(owner: Owner) -> Verdict | None:
    """A bare factor of a low-rank adapter, stored as the shapes of the two factors allow.

    ``[r, in]`` and ``[out, r]`` are multiplied as B A, ``[in, r]`` and ``[r, out]`` as A B. Where
    both products exist, the rank is the smaller of the sizes that they sum over. None where neither
    exists or these sizes are equal, or without a partner.
    """
    stem, _, ending = owner.param_name.rpartition("_")
    endings = next((pair for pair in ADAPTER_ENDINGS if ending in pair), ())
    factors = [getattr(owner.module, f"{stem}_{one}", None) for one in endings]
    shapes = [one.shape for one in factors if isinstance(one, Tensor) and one.ndim == 2]
    if len(shapes) < 2:
        return None
    down, up = shapes
    as_linear, as_transposed = up[1] == down[0], down[1] == up[0]
    if (not as_linear and not as_transposed) or down[0] == down[1] == up[0] == up[1]:
        return None
    reason = f"low-rank adapter: {_where(owner)}"
    if as_linear and (not as_transposed or down[0] < down[1]):
        return Verdict("normuon", reason, MatrixView.linear())
    return Verdict("normuon", f"{reason}, stored [in, out]", MatrixView.transposed())
