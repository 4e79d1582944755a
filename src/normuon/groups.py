"""A model's param groups: which parameter takes which algorithm, and a table that says why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from normuon.attention_heads import head_sizes, split_into_heads
from normuon.flattened import check_not_flattened
from normuon.matrix_view import MatrixView
from normuon.module_rules import Verdict, judge, output_heads, owners_of
from normuon.options import ALGORITHMS

Override = str | MatrixView | Mapping[str, Any]
"""An algorithm's name, a view (with `normuon`), or a dict of group options."""


def param_groups(
    model: nn.Module,
    *,
    overrides: Mapping[str, Override] | None = None,
    hidden: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    split_heads: bool = False,
    hidden_required: bool = True,
) -> list[dict[str, Any]]:
    """The param groups of a whole model, for `NorMuon`.

    Hidden matrices (linear layers, convolutions, experts) take `normuon`; embeddings, output heads
    (tied ones too), norms, biases, routers and scalars take `adamw` without weight decay. The
    owning module's type decides. A fused parameter such as QKV stays whole, as in the paper, unless
    an override or ``split_heads`` splits it. Frozen parameters are left out.

    Args:
        model: any module; transformers and timm models name their own output heads, elsewhere a
            head goes by the names in `module_rules.py` or by an override.
        overrides: glob patterns on parameter names, the first match winning over everything else.
            A value is ``"normuon"``, ``"muon"`` or ``"adamw"``; a `MatrixView`; or a dict of group
            options such as ``{"algorithm": "adamw", "lr": 3e-3}``.
        hidden: options for every group of hidden matrices, ``{"weight_decay": 0.1}``.
        other: options for every other group; ``{"weight_decay": 0.0}`` is preset.
        split_heads: orthogonalise every attention head's rows of the query, key and value
            projections as a matrix of their own, scale included, fused or not. Heads are found by
            the attention module's ``head_dim`` (or a like name); overrides win.
        hidden_required: False allows a model without a hidden matrix, as a pipeline stage may be
            that holds the embedding alone: its parameters all take `adamw`.

    Returns:
        Param groups with named parameters, views and reasons; `describe_groups` prints them.

    Raises:
        ValueError: a parameter of two or more dims that nothing but its shape could place, one
            that FSDP1 or DeepSpeed ZeRO-3 has flattened, an override that matches nothing, a
            model without a hidden matrix where one is required, or ``split_heads`` without a head
            to split.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4, bias=False), nn.LayerNorm(4))
        >>> for group in param_groups(model):
        ...     print(group["algorithm"], [name for name, _ in group["params"]])
        normuon ['1.weight']
        adamw ['0.weight', '2.weight', '2.bias']
    """
    overrides = dict(overrides or {})
    heads = output_heads(model)
    sizes = head_sizes(model) if split_heads else {}
    groups: dict[str, dict[str, Any]] = {}
    unplaced: list[str] = []
    unused = set(overrides)
    for name, param, owners in owners_of(model):
        label = f"{name} {list(param.shape)}"
        check_not_flattened(label, param)
        pattern = next((p for p in overrides if fnmatchcase(name, p)), None)
        verdict = judge(param, owners, heads)
        options: dict[str, Any] = {}
        if pattern is not None:
            unused.discard(pattern)
            verdict, options = _overridden(pattern, overrides[pattern], verdict)
        elif verdict is not None and id(param) in sizes:
            verdict = split_into_heads(label, param, verdict, sizes[id(param)])
        if verdict is None:
            unplaced.append(f"{label} of {type(owners[0].module).__name__}")
            continue
        preset = dict(hidden or {}) if verdict.view is not None else {"weight_decay": 0.0}
        if verdict.view is None:
            preset.update(other or {})
        _place(groups, name, param, verdict, {**preset, **options})
    _check_complete(groups, unplaced, unused, hidden_required)
    return sorted(groups.values(), key=lambda group: ALGORITHMS.index(group["algorithm"]))


def _overridden(
    pattern: str, override: Override, verdict: Verdict | None
) -> tuple[Verdict, dict[str, Any]]:
    if isinstance(override, MatrixView):
        override = {"algorithm": "normuon", "view": override}
    elif isinstance(override, str):
        override = {"algorithm": override}
    options = dict(override)
    default = verdict.algorithm if verdict else "normuon"
    algorithm = options.pop("algorithm", default)
    if algorithm not in ALGORITHMS:
        raise ValueError(f"overrides[{pattern!r}]: {algorithm!r} is not one of {ALGORITHMS}")
    view = options.pop("view", None)
    if algorithm != "adamw" and view is None:
        view = (verdict.view if verdict else None) or MatrixView.linear()
    return Verdict(algorithm, f"override {pattern!r}", view), options


def _place(
    groups: dict[str, dict[str, Any]],
    name: str,
    param: Tensor,
    verdict: Verdict,
    options: dict[str, Any],
) -> None:
    """Appends a parameter to the group of its algorithm, view and options."""
    key = repr((verdict.algorithm, verdict.view, sorted(options.items())))
    group = groups.get(key)
    if group is None:
        group = {"params": [], "algorithm": verdict.algorithm, **options, "reasons": []}
        if verdict.view is not None:
            group["view"] = verdict.view
        groups[key] = group
    group["params"].append((name, param))
    group["reasons"].append(verdict.reason)


def _check_complete(
    groups: Mapping[str, Mapping[str, Any]],
    unplaced: list[str],
    unused: set[str],
    hidden_required: bool,
) -> None:
    if unused:
        raise ValueError(f"overrides match no trainable parameter: {sorted(unused)}")
    if unplaced:
        raise ValueError(
            "only their shape could say what these parameters are: "
            + "; ".join(unplaced)
            + ". Say it with overrides={'name or pattern': 'adamw'} or a normuon.MatrixView"
        )
    if hidden_required and all(group["algorithm"] == "adamw" for group in groups.values()):
        raise ValueError(
            "no parameter of this model is a hidden matrix, so NorMuon would be AdamW throughout; "
            "use torch.optim.AdamW, say which are with overrides=, or pass hidden_required=False "
            "for a pipeline stage that has none"
        )


def describe_groups(groups: Iterable[Mapping[str, Any]]) -> str:
    """A table of every parameter: its shape, algorithm, matrices, neuron dim and the reason.

    Args:
        groups: from `param_groups`, or an optimizer's ``param_groups``.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
        >>> print(describe_groups(param_groups(model)))
        parameter  shape   algorithm  matrices   neuron dim  reason
        0.weight   [8, 4]  normuon    1 of 8x4   0           Linear
        0.bias     [8]     adamw      -          -           vector: Linear.bias
        1.weight   [8]     adamw      -          -           vector: LayerNorm.weight
        1.bias     [8]     adamw      -          -           vector: LayerNorm.bias
    """
    rows = [("parameter", "shape", "algorithm", "matrices", "neuron dim", "reason")]
    for number, group in enumerate(groups):
        reasons = group.get("reasons") or [""] * len(group["params"])
        names = group.get("param_names")
        for index, (entry, reason) in enumerate(zip(group["params"], reasons, strict=True)):
            if isinstance(entry, tuple):
                name, param = entry
            else:
                name = names[index] if names else f"param_groups[{number}]['params'][{index}]"
                param = entry
            algorithm = group.get("algorithm", "normuon")
            matrices, neuron = "-", "-"
            if algorithm != "adamw":
                view = group.get("view") or MatrixView.linear()
                matrices = ", ".join(f"{b} of {m}x{n}" for b, m, n in view.shapes(param.shape))
                neuron = str(view.neuron_dim)
            rows.append((name, str(list(param.shape)), algorithm, matrices, neuron, reason))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
