"""Converts another optimizer's state to NorMuon's, to switch in the middle of a run.

It takes the state_dicts of torch.optim.AdamW and Muon, the authors' released NorMuon, dion's Muon
and NorMuon, Muon with ``use_muon`` groups, as DeepSpeed's, Megatron-LM's Muon, and
this library's, to change ``momentum_dtype``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normuon.convert_sources import (
    Kind,
    canonical_state,
    check_momentum_is_of_gradients,
    is_megatrons,
    kind_of,
)
from normuon.learning_rate import Origin, suggest_lr
from normuon.models.wrappers import bare_name
from normuon.momentum_forms import MOMENTUM_KEYS, momentum_of
from normuon.state import view_of

Groups = Sequence[Mapping[str, Any]]

MUON_ORIGINS: dict[str, Origin] = {
    "original": "muon_original",
    "spectral_unclamped": "muon_spectral_unclamped",
}
"""What `suggest_lr` calls Muon's scalings, by their ``adjust_lr_fn``."""


@dataclass(frozen=True, slots=True)
class SavedParam:
    """Another optimizer's state of one parameter.

    Args:
        kind: the algorithm that its group ran.
        label: its name, or its place in the state_dict, for messages.
        name: its name, if it has one.
        param: the tensor itself, if the optimizer was given.
        state: its state; empty before its first step.
    """

    kind: Kind
    label: str
    name: str | None
    param: Tensor | None
    state: Mapping[str, Any]


@dataclass(slots=True)
class Report:
    """What was converted, for the user to read."""

    carried: dict[str, int] = field(default_factory=dict)
    started: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    def count(self, what: str) -> None:
        self.carried[what] = self.carried.get(what, 0) + 1

    def __str__(self) -> str:
        facts = [f"{number} x {what}" for what, number in self.carried.items()]
        if self.started:
            facts.append(f"{len(self.started)} start at zero: {', '.join(self.started)}")
        advice = [f"learning rate: {line}" for line in self.advice]
        return "\n".join(f"normuon.convert_state: {line}" for line in facts + advice)


def convert_state(
    *sources: Optimizer | Mapping[str, Any],
    to: Optimizer | Iterable[Mapping[str, Any]],
    params: Iterable[Tensor] | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """A state_dict for NorMuon from the state of the optimizers that trained the model so far.

    First moments are carried over: AdamW's ``exp_avg``, Muon's ``momentum_buffer`` and NorMuon's
    are all ``b x + (1 - b) g``; dion's sums are converted to that. Parameters that AdamW still
    trains keep its whole state. Second moments per neuron are taken from the authors' NorMuon and
    dion's. From other optimizers they start at zero, as in a new run, because their scale cancels.
    The learning rate is not converted; advice about it is printed.

    Args:
        sources: optimizers, or their state_dicts: one AdamW, or Muon and the AdamW beside it,
            or a NorMuon of this library with another ``momentum_dtype``.
            ZeRO's state is an error, because it has flat parts of parameters.
        to: the groups that NorMuon will train, from `param_groups`, or the NorMuon itself. Pass the
            optimizer if its constructor sets ``neuron_axis``.
        params: only for state_dicts without parameter names, from an optimizer built from
            ``model.parameters()``: the parameters in the order of the old optimizer's groups, one
            source after another.
        quiet: print nothing.

    Returns:
        A state_dict for ``NorMuon(groups).load_state_dict``. Its groups have no options: the new
        optimizer's are used.

    Raises:
        ValueError: an unknown optimizer, a parameter that cannot be matched, or a wrong shape;
            names it.

    Example:
        >>> import torch, normuon
        >>> model = torch.nn.Linear(4, 8)
        >>> adamw = torch.optim.AdamW(model.parameters(), lr=3e-4)
        >>> model(torch.ones(2, 4)).sum().backward()
        >>> adamw.step()
        >>> optimizer = normuon.NorMuon(normuon.param_groups(model), lr=3e-4)
        >>> optimizer.load_state_dict(normuon.convert_state(adamw, to=optimizer))
        normuon.convert_state: 1 x AdamW's first moment carried over
        normuon.convert_state: 1 x AdamW's state kept
        normuon.convert_state: learning rate: keep AdamW's 0.0003: both steps' RMS is about 0.2 lr
    """
    sources = tuple(_without_wrapper(source) for source in sources)
    groups = list(to.param_groups if isinstance(to, Optimizer) else to)
    saved_groups = [_groups_of(source) for source in sources]
    saved = [
        entry
        for source, found in zip(sources, saved_groups, strict=True)
        for entry in _saved_params(source, found)
    ]
    if not any(entry.state for entry in saved):
        raise ValueError("no parameter of the given optimizers has any state to convert")
    matched = _matched(saved, groups, None if params is None else list(params))
    report = Report()
    state: dict[int, dict[str, Tensor]] = {}
    new_groups: list[dict[str, Any]] = []
    index = 0
    for group in groups:
        members = list(_members(group))
        new_groups.append({"params": list(range(index, index + len(members)))})
        for name, param in members:
            entry = matched.get(id(param))
            converted = {} if entry is None else _converted(entry, name, param, group, report)
            if converted:
                state[index] = converted
            else:
                report.started.append(name or f"parameter {index}")
            index += 1
    if not quiet:
        # A learning rate that is a tensor is read here, for people, and nowhere else.
        report.advice = _advice([group for found in saved_groups for group in found], groups)
        print(report)
    return {"state": state, "param_groups": new_groups}


def _without_wrapper(source: Optimizer | Mapping[str, Any]) -> Optimizer | Mapping[str, Any]:
    """The optimizer's own state_dict in that of Megatron-LM's mixed precision around it."""
    is_wrapped = isinstance(source, Mapping) and "fp32_from_fp16_params" in source
    return source["optimizer"] if is_wrapped else source  # type: ignore[index]


def _groups_of(source: Optimizer | Mapping[str, Any]) -> Groups:
    if isinstance(source, Optimizer):
        check_momentum_is_of_gradients(source)
        return source.param_groups
    if isinstance(source, Mapping) and {"state", "param_groups"} <= source.keys():
        groups: Groups = source["param_groups"]
        return groups
    found = sorted(map(str, source)) if isinstance(source, Mapping) else type(source).__name__
    raise ValueError(
        "convert_state takes optimizers and their state_dicts ('state', 'param_groups'); "
        f"got {found}"
    )


def _saved_params(source: Optimizer | Mapping[str, Any], groups: Groups) -> Iterator[SavedParam]:
    states = source.state if isinstance(source, Optimizer) else source["state"]
    for number, group in enumerate(groups):
        kind = kind_of(group)
        names = group.get("param_names")
        for index, key in enumerate(group["params"]):
            name = names[index] if names else key if isinstance(key, str) else None
            label = name or f"param_groups[{number}]['params'][{index}]"
            state = canonical_state(kind, group, states.get(key, {}), label)
            param = key if isinstance(key, Tensor) else None
            yield SavedParam(kind, label, name, param, state)


def _members(group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """A group's parameters with their names, or empty strings."""
    names = group.get("param_names")
    for index, entry in enumerate(group["params"]):
        yield entry if isinstance(entry, tuple) else (names[index] if names else "", entry)


def _params_by_name(groups: Groups) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for group in groups:
        for name, param in _members(group):
            if name:
                found.setdefault(bare_name(name), []).append(param)
    return found


def _matched(
    saved: Sequence[SavedParam], groups: Groups, params: list[Tensor] | None
) -> dict[int, SavedParam]:
    """Saved parameters by the ``id`` of the tensors in the new groups."""
    if params is not None and len(params) != len(saved):
        raise ValueError(
            f"number of parameters: {len(params)} in params=, {len(saved)} in the old optimizers"
        )
    by_name = _params_by_name(groups)
    num_saved = Counter(bare_name(entry.name) for entry in saved if entry.name)
    trained = {id(param) for group in groups for _, param in _members(group)}
    matched: dict[int, SavedParam] = {}
    num_met: Counter[str] = Counter()
    for index, entry in enumerate(saved):
        param: Tensor | None
        if params is not None:
            param = params[index]
        elif entry.param is not None:
            param = entry.param
        elif entry.name is not None:
            name = bare_name(entry.name)
            alike = by_name.get(name, [])
            if alike and len(alike) + num_met[name] != num_saved[name]:
                raise ValueError(
                    f"{entry.label}: {num_saved[name]} parameters of the old optimizers and "
                    f"{len(alike) + num_met[name]} of to= have this name; give the old optimizer "
                    "itself, or its parameters in order with params="
                )
            # Equal names, of several models, match in order.
            param = alike.pop(0) if alike else None
            num_met[name] += 1
        else:
            raise ValueError(
                f"{entry.label}: this state_dict has no parameter names; give the old optimizer "
                "itself, or its parameters in order with params=list(model.parameters())"
            )
        if param is None or id(param) not in trained:
            if entry.state:
                raise ValueError(f"{entry.label}: this parameter is not in any group of to=")
            continue
        matched[id(param)] = entry
    return matched


def _converted(
    entry: SavedParam, name: str, param: Tensor, group: Mapping[str, Any], report: Report
) -> dict[str, Tensor]:
    """The new state of one parameter; empty if it starts at zero."""
    if not entry.state:
        return {}
    if entry.kind == "this library":
        return _own_converted(entry, name, param, group, report)
    moment = entry.state["exp_avg" if entry.kind == "AdamW" else "momentum_buffer"]
    if moment.shape != param.shape:
        raise ValueError(
            f"{name or entry.label} {list(param.shape)}: its first moment has shape "
            f"{list(moment.shape)}; check the order of params="
        )
    algorithm = group.get("algorithm", "normuon")
    if algorithm == "adamw":
        if entry.kind != "AdamW":
            return {}  # A first moment without a second would make AdamW's first steps huge.
        report.count("AdamW's state kept")
        kept = {key: entry.state[key] for key in ("exp_avg", "exp_avg_sq")}
        step = entry.state["step"]
        return {**kept, "step": torch.as_tensor(step, dtype=torch.float32, device=moment.device)}
    report.count(f"{entry.kind}'s first moment carried over")
    if algorithm == "muon":
        return {"momentum_buffer": moment}
    v = _second_moments(entry, param, group, report)
    return {"momentum_buffer": moment, "second_momentum_buffer": v}


def _own_converted(
    entry: SavedParam, name: str, param: Tensor, group: Mapping[str, Any], report: Report
) -> dict[str, Tensor]:
    """From this library's own state: loading brings a momentum to the form that the group keeps."""
    saved = entry.state
    kept = {"weight_residual"} if group.get("kahan_sum") else set()
    counts, is_adamw = saved.get("skipped_steps"), group.get("algorithm", "normuon") == "adamw"
    num_matrices = 1 if is_adamw else sum(p.batch for p in view_of(group).parts(param.shape))
    if group.get("skip_nonfinite") and counts is not None and counts.numel() == num_matrices:
        kept.add("skipped_steps")
    if is_adamw:
        if "exp_avg" not in saved:
            return {}  # A first moment without a second would make AdamW's first steps huge.
        report.count("AdamW's state kept whole")
        kept |= {"exp_avg", "exp_avg_sq", "step"}
        return {key: saved[key] for key in kept & saved.keys()}
    found = {key: saved[key] for key in (kept | set(MOMENTUM_KEYS)) & saved.keys()}
    if "exp_avg" in saved:
        found["momentum_buffer"] = saved["exp_avg"]
    moment = momentum_of(found)
    if moment.shape != param.shape:
        raise ValueError(
            f"{name or entry.label} {list(param.shape)}: its first moment has shape "
            f"{list(moment.shape)}; check the order of params="
        )
    report.count("NorMuon's momentum carried over")
    if group.get("algorithm", "normuon") == "normuon":
        axis = group.get("neuron_axis", "row")
        shape = view_of(group).second_moment_shape(param.shape, neuron_axis=axis)
        second = saved.get("second_momentum_buffer")
        if second is not None and second.shape == shape:
            report.count("NorMuon's second moments carried over")
            found["second_momentum_buffer"] = second
        else:
            dtype = torch.promote_types(param.dtype, torch.float32)
            found["second_momentum_buffer"] = torch.zeros(shape, dtype=dtype, device=param.device)
    return found


def _second_moments(
    entry: SavedParam, param: Tensor, group: Mapping[str, Any], report: Report
) -> Tensor:
    """The authors' second moments if they mean the same as ours, else zeros."""
    view = view_of(group)
    shape = view.second_moment_shape(param.shape, neuron_axis=group.get("neuron_axis", "row"))
    saved = entry.state.get("second_momentum_buffer")
    # Theirs is [*batch, m, 1]: one entry for each row of a whole matrix as it is stored.
    as_stored = view.is_whole and view.neuron_dim == view.batch_dims
    if as_stored and isinstance(saved, Tensor) and saved.shape == (*shape, 1):
        report.count("NorMuon's second moments carried over")
        return saved[..., 0]
    # Megatron-LM's of a wide matrix are [1, n]: one entry for each column, as neuron_axis="short".
    if as_stored and isinstance(saved, Tensor) and param.ndim == 2 and saved.shape == (1, *shape):
        report.count("NorMuon's second moments carried over")
        return saved[0]
    dtype = torch.promote_types(param.dtype, torch.float32)
    return torch.zeros(shape, dtype=dtype, device=param.device)


def _advice(saved_groups: Groups, groups: Groups) -> list[str]:
    """Advice on each learning rate of the old optimizers, each line once."""
    kinds = [kind_of(group) for group in saved_groups]
    lines = []
    for kind, group in zip(kinds, saved_groups, strict=True):
        lr = float(group.get("initial_lr", group["lr"]))
        if lr <= 0 or kind == "this library":
            continue
        if kind == "AdamW" and set(kinds) != {"AdamW"}:
            lines.append(f"keep AdamW's {lr:g} for its parameters with other={{'lr': {lr:g}}}")
        elif is_megatrons(group):
            lines.append(
                f"Megatron's {lr:g} with scale_mode='spectral' is {lr / 0.2:g} times its "
                "extra_scale_factor here; with 'shape_scaling' keep it times extra_scale_factor, "
                "with adjust_lr_fn='original'"
            )
        elif kind != "AdamW" and group.get("adjust_lr") == "spectral_norm":
            lines.append(
                f"keep dion's {lr:g} of adjust_lr='spectral_norm' with "
                "adjust_lr_fn='spectral_unclamped'"
            )
        elif (
            kind == "AdamW"
            or group.get("adjust_lr_fn") == "match_rms_adamw"
            or group.get("adjust_lr") == "rms_norm"
        ):
            lines.append(f"keep {kind}'s {lr:g}: both steps' RMS is about 0.2 lr")
        else:
            scaling = group.get("adjust_lr_fn") or "original"
            origin = MUON_ORIGINS.get(scaling)
            if origin is None:
                lines.append(
                    f"{kind}'s {lr:g} with adjust_lr_fn={scaling!r} cannot be converted: tune it"
                )
                continue
            equal = suggest_lr(lr, coming_from=origin, to=groups)
            lines.append(
                f"keep {kind}'s {lr:g} with adjust_lr_fn={scaling!r}; with the default scaling "
                f"take {equal:.2g}, and weight decay times {lr / equal:.2g}"
            )
    return list(dict.fromkeys(lines))
