"""A model's param groups: which parameter takes which algorithm, and a table of reasons."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from normuon.models.attention import head_sizes, split_into_heads, without_head_size
from normuon.models.heads import is_base_model, last_matrix, output_heads
from normuon.models.rules import Owner, Verdict, judge, owners_of
from normuon.models.view import MatrixView
from normuon.models.wrappers import bare_name, check_not_flattened
from normuon.options import ALGORITHMS, check_options_dict
from normuon.params import check_matrix_param

Override = str | MatrixView | Mapping[str, Any]
"""An algorithm's name, a view (with `normuon`), or a dict of group options."""

Pattern = str | type[nn.Module]
"""A glob pattern on parameter names, or a class of modules."""


def param_groups(
    model: nn.Module,
    *,
    overrides: Mapping[Pattern, Override] | None = None,
    hidden: Mapping[str, Any] | None = None,
    other: Mapping[str, Any] | None = None,
    split_heads: bool = False,
    hidden_required: bool = True,
) -> list[dict[str, Any]]:
    """The param groups of a whole model, for `NorMuon`.

    Hidden matrices (linear layers, convolutions, experts) take `normuon`. Embeddings, output heads
    (also tied ones), norms, biases, routers and scalars take `adamw` without weight decay. The
    type of the owning module decides. A fused parameter such as QKV stays whole, as in the paper,
    unless an override or ``split_heads`` splits it. Frozen parameters are left out.

    If no output head is found, a warning names the model's last matrix and the override to use.

    Args:
        model: any module, wrapped or not.
        overrides: keys are glob patterns on parameter names (with or without wrappers' prefixes) or
            module classes; the first match wins over everything else. Values are ``"normuon"``,
            ``"muon"`` or ``"adamw"``; a `MatrixView`; or a dict of group options such as
            ``{"algorithm": "adamw", "lr": 3e-3}``.
        hidden: options for every group of hidden matrices, ``{"weight_decay": 0.1}``.
        other: options for every other group; the default is ``{"weight_decay": 0.0}``.
        split_heads: orthogonalise and scale every attention head of the query, key and value
            projections separately, fused or not. Heads are found by the attention module's
            ``head_dim`` (or a similar name); overrides win. A warning names attention modules
            without one; a model without attention is not changed.
        hidden_required: False allows a model without a hidden matrix, such as a pipeline stage with
            only the embedding; all its parameters take `adamw`.

    Returns:
        Param groups with named parameters, views and reasons; `describe_groups` prints them.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a parameter of two or more dims is ambiguous, not initialised, or flattened by
            FSDP1 or DeepSpeed ZeRO-3; an override matches nothing; or the model has no hidden
            matrix although one is required.

    Example:
        >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 9))
        >>> for group in param_groups(model):
        ...     print(group["algorithm"], [name for name, _ in group["params"]])
        normuon ['1.weight']
        adamw ['0.weight', '1.bias', '3.weight', '3.bias']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"param_groups needs a torch.nn.Module, but got a {type(model).__name__}: pass the "
            "model itself, because its modules decide what each parameter is"
        )
    overrides = dict(overrides or {})
    _check_overrides(overrides)
    for what, options in (("hidden", hidden), ("other", other)):
        check_options_dict(what, options or {})
    heads = output_heads(model)
    sizes = head_sizes(model) if split_heads else {}
    groups: dict[str, dict[str, Any]] = {}
    unplaced: list[tuple[str, Tensor, Owner]] = []
    used: set[Pattern] = set()
    overridden: set[str] = set()
    for name, param, owners in owners_of(model):
        _check_initialised(name, param)
        label = f"{name} {list(param.shape)}"
        check_not_flattened(label, param)
        pattern = next((p for p in overrides if _matches(p, name, owners)), None)
        verdict = judge(param, owners, heads)
        options = {}
        if pattern is not None:
            used.add(pattern)
            overridden.add(name)
            verdict, options = _overridden(pattern, overrides[pattern], param, verdict)
        elif verdict is not None and id(param) in sizes:
            verdict = split_into_heads(label, param, verdict, sizes[id(param)])
        if verdict is None:
            unplaced.append((name, param, owners[0]))
            continue
        if verdict.view is not None:
            check_matrix_param(label, param, {"algorithm": verdict.algorithm, "view": verdict.view})
        preset = dict(hidden or {}) if verdict.view is not None else {"weight_decay": 0.0}
        if verdict.view is None:
            preset.update(other or {})
        _place(groups, name, param, verdict, {**preset, **options})
    _check_complete(groups, unplaced, [p for p in overrides if p not in used], hidden_required)
    if hidden_required and not heads and not is_base_model(model):
        _warn_without_head(model, groups, overridden)
    if split_heads:
        _warn_unsplit(model, groups, overridden)
    return sorted(groups.values(), key=lambda group: ALGORITHMS.index(group["algorithm"]))


def _check_overrides(overrides: Mapping[Pattern, Override]) -> None:
    for pattern, override in overrides.items():
        shown = pattern if isinstance(pattern, str) else getattr(pattern, "__name__", pattern)
        if not isinstance(pattern, str) and not (
            isinstance(pattern, type) and issubclass(pattern, nn.Module)
        ):
            raise ValueError(f"overrides[{shown!r}]: the key must be a name, a pattern or a class")
        if not isinstance(override, (str, MatrixView, Mapping)):
            raise ValueError(
                f"overrides[{shown!r}]={override!r} must be one of {ALGORITHMS}, a "
                "normuon.MatrixView, or a dict of group options"
            )
        if isinstance(override, Mapping):
            check_options_dict(f"overrides[{shown!r}]", override)
        algorithm = override.get("algorithm") if isinstance(override, Mapping) else override
        if isinstance(algorithm, str) and algorithm not in ALGORITHMS:
            raise ValueError(f"overrides[{shown!r}]: {algorithm!r} is not one of {ALGORITHMS}")


def _check_initialised(name: str, param: Tensor) -> None:
    if is_lazy(param):
        raise ValueError(
            f"{name}: this parameter of a lazy module is not initialised; run one batch through "
            "the model before param_groups"
        )


def _matches(pattern: Pattern, name: str, owners: Iterable[Owner]) -> bool:
    if not isinstance(pattern, str):
        return any(isinstance(owner.module, pattern) for owner in owners)
    return fnmatchcase(name, pattern) or fnmatchcase(bare_name(name), pattern)


def _overridden(
    pattern: Pattern, override: Override, param: Tensor, verdict: Verdict | None
) -> tuple[Verdict, dict[str, Any]]:
    if isinstance(override, MatrixView):
        override = {"algorithm": "normuon", "view": override}
    elif isinstance(override, str):
        override = {"algorithm": override}
    shown = pattern if isinstance(pattern, str) else pattern.__name__
    options = dict(override)
    default = verdict.algorithm if verdict else "normuon"
    algorithm = options.pop("algorithm", default)
    view = options.pop("view", None)
    if not isinstance(pattern, str) and param.ndim < 2 and algorithm != "adamw":
        # A class stands for its matrices: its biases and gains stay what they are.
        algorithm, view = "adamw", None
    if algorithm != "adamw" and view is None:
        view = (verdict.view if verdict else None) or MatrixView.linear()
    return Verdict(algorithm, f"override {shown!r}", view), options


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
    unplaced: list[tuple[str, Tensor, Owner]],
    unused: list[Pattern],
    hidden_required: bool,
) -> None:
    if unused:
        shown = sorted(p if isinstance(p, str) else p.__name__ for p in unused)
        raise ValueError(f"overrides match no trainable parameter: {shown}")
    if unplaced:
        kinds: dict[str, list[str]] = {}
        for name, param, owner in unplaced:
            kinds.setdefault(f"{owner.kind}.{owner.param_name}", []).append(
                f"{name} {list(param.shape)}"
            )
        listed = "; ".join(
            f"{labels[0]} of {kind}" + (f" and {len(labels) - 1} more" if labels[1:] else "")
            for kind, labels in kinds.items()
        )
        owner = unplaced[0][2]
        raise ValueError(
            f"these parameters may or may not be hidden matrices: {listed}. Choose by class or by "
            f"name, overrides={{{owner.kind}: ...}} or {{'*{owner.param_name}': ...}}: 'normuon' "
            "for matrices [out, in], a normuon.MatrixView for matrices of another layout, 'adamw' "
            "for the rest"
        )
    if hidden_required and all(group["algorithm"] == "adamw" for group in groups.values()):
        raise ValueError(
            "this model has no hidden matrix, so all parameters would take AdamW; use "
            "torch.optim.AdamW, choose matrices with overrides={'name or pattern': 'normuon'}, "
            "or pass hidden_required=False for a pipeline stage without any"
        )


def _warn_without_head(
    model: nn.Module, groups: Mapping[str, Mapping[str, Any]], overridden: set[str]
) -> None:
    last = last_matrix(model)
    name = f"{last}.weight" if last else "weight"
    placed = {n: p for g in groups.values() if g["algorithm"] != "adamw" for n, p in g["params"]}
    if name not in placed or overridden:
        return
    warnings.warn(
        f"no output head was found in this {type(model).__name__}: its last matrix, {name} "
        f"{list(placed[name].shape)}, takes NorMuon. If it is the output layer, pass "
        f"overrides={{'{name}': 'adamw'}}; if it is hidden, overrides={{'{name}': 'normuon'}}",
        stacklevel=3,
    )


def _warn_unsplit(
    model: nn.Module, groups: Mapping[str, Mapping[str, Any]], overridden: set[str]
) -> None:
    unknown = without_head_size(model)
    whole: dict[str, list[str]] = {}
    for group in groups.values():
        for name, param in group["params"] if group["algorithm"] != "adamw" else ():
            if id(param) in unknown and name not in overridden:
                whole.setdefault(unknown[id(param)], []).append(f"{name} {list(param.shape)}")
    for kind, labels in whole.items():
        more = f" and {len(labels) - 1} more" if labels[1:] else ""
        warnings.warn(
            f"split_heads=True leaves {labels[0]}{more} whole: {kind} has no head_dim. Set it to "
            "the size of a head before param_groups, or say how it splits with "
            "overrides={'name or pattern': normuon.MatrixView(heads=...)}",
            stacklevel=3,
        )


def describe_groups(groups: Iterable[Mapping[str, Any]], *, collapse: bool = False) -> str:
    """A table of every parameter: its shape, algorithm, matrices, neuron dim and the reason.

    Args:
        groups: from `param_groups`, or an optimizer's ``param_groups``.
        collapse: one line for equal layers (``layers.*.up.weight``, with their number), and the
            total of each algorithm at the end.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3))
        >>> print(describe_groups(param_groups(model)))
        parameter  shape   algorithm  matrices   neuron dim  reason
        0.weight   [8, 4]  normuon    1 of 8x4   0           Linear
        0.bias     [8]     adamw      -          -           vector: Linear.bias
        1.weight   [8]     adamw      -          -           vector: LayerNorm.weight
        1.bias     [8]     adamw      -          -           vector: LayerNorm.bias
        2.weight   [3, 8]  adamw      -          -           output head: nothing reads it
        2.bias     [3]     adamw      -          -           vector: Linear.bias
    """
    rows: list[tuple[str, ...]] = []
    totals: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        reasons = group.get("reasons") or [""] * len(group["params"])
        names = group.get("param_names")
        algorithm = group.get("algorithm", "normuon")
        total = totals.setdefault(algorithm, [0, 0])
        for index, (entry, reason) in enumerate(zip(group["params"], reasons, strict=True)):
            if isinstance(entry, tuple):
                name, param = entry
            else:
                name = names[index] if names else f"param_groups[{number}]['params'][{index}]"
                param = entry
            matrices, neuron = "-", "-"
            if algorithm != "adamw":
                view = group.get("view") or MatrixView.linear()
                matrices = ", ".join(f"{b} of {m}x{n}" for b, m, n in view.shapes(param.shape))
                neuron = str(view.neuron_dim)
            total[0] += 1
            total[1] += param.numel()
            rows.append((name, str(list(param.shape)), algorithm, matrices, neuron, reason))
    if not collapse:
        return _table(rows)
    ends = [
        f"{algorithm}: {number} parameter{'' if number == 1 else 's'}, {elements:,} elements"
        for algorithm, (number, elements) in totals.items()
    ]
    return "\n".join([_table(_collapsed(rows)), "", *ends])


def _collapsed(rows: Iterable[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One row for rows that differ only in the numbers in their names."""
    counts: dict[tuple[str, ...], list[str]] = {}
    for name, *rest in rows:
        pattern = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name)
        counts.setdefault((pattern, *rest), []).append(name)
    return [
        (f"{pattern} ({len(names)})" if len(names) > 1 else names[0], *rest)
        for (pattern, *rest), names in counts.items()
    ]


def _table(rows: Iterable[tuple[str, ...]]) -> str:
    lines = [("parameter", "shape", "algorithm", "matrices", "neuron dim", "reason"), *rows]
    widths = [max(len(row[column]) for row in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in lines
    )
