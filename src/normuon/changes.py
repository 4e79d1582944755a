"""Notices what was changed in an optimizer's groups and state since its last step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from normuon.options import GROUP_OPTIONS, OPTIONS, check_changed_options
from normuon.state import check_vectors_fit
from normuon.step.pieces import State


class Changes:
    """What groups and state were like at the last step.

    Users, schedulers and frameworks may write to an optimizer's groups and state between steps.
    Nothing is noticed while torch.compile traces a step: a step that leaves a trace is retraced.
    """

    def __init__(self) -> None:
        self._held: list[object] | None = None
        self._options: dict[int, list[object]] = {}
        self.forget_layouts()

    def forget_layouts(self) -> None:
        """All that was made from groups and state has been dropped."""
        self._states: dict[int, list[State]] = {}
        self._structures: dict[int, object] = {}

    def have_new_params(self, groups: Sequence[Mapping[str, Any]]) -> bool:
        """Whether a group is another dict, or has other parameters, than at the last call."""
        if torch.compiler.is_compiling():
            return False
        before = self._held
        self._held = [held for group in groups for held in (group, *group["params"])]
        return before is not None and not _are_same(before, self._held)

    def have_new_states(self, number: int, states: Sequence[State]) -> bool:
        """Whether the state of one of a group's parameters is another dict than before."""
        if torch.compiler.is_compiling():
            return False
        before = self._states.get(number)
        self._states[number] = list(states)
        return before is not None and not _are_same(before, states)

    def check_structure(
        self, number: int, group: Mapping[str, Any], states: Mapping[Tensor, State]
    ) -> None:
        """Checks what state depends on, where it has changed; see `check_vectors_fit`."""
        structure = (group["algorithm"], group["neuron_axis"], group.get("view"))
        if self._structures.get(number) != structure:
            check_vectors_fit(group, states)
            if not torch.compiler.is_compiling():
                self._structures[number] = structure

    def check_options(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Checks the options that were changed since the last call.

        Raises:
            ValueError: names the group, the option, its value and what is allowed.
        """
        if torch.compiler.is_compiling():
            return
        for number, group in enumerate(groups):
            values = [group.get(name) for name in (*OPTIONS, *GROUP_OPTIONS)]
            before = self._options.get(number)
            if before is not None and _are_same(before, values):
                continue
            names = [*OPTIONS, *GROUP_OPTIONS]
            if before is not None:
                names = [
                    name
                    for name, old, new in zip(names, before, values, strict=True)
                    if old is not new
                ]
            check_changed_options(f"param_groups[{number}]", group, names)
            self._options[number] = values


def _are_same(first: Sequence[object], second: Sequence[object]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))
