"""Signatures of the reference with values where the source names constants.

A griffe extension, which mkdocstrings loads when it builds the site.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from griffe import (
    Alias,
    AliasResolutionError,
    Attribute,
    Class,
    Expr,
    ExprName,
    ExprSubscript,
    ExprTuple,
    Extension,
    Function,
    Module,
    Object,
    ParameterKind,
)

VARIADIC = (ParameterKind.var_positional, ParameterKind.var_keyword)


class Signatures(Extension):
    """Writes out what a reader of a signature cannot look up there.

    These are the package's constants in defaults and its ``Literal`` aliases in annotations.
    ``Example:`` in a docstring opens a section too; griffe knows ``Examples:`` only.
    """

    def on_package(self, *, pkg: Module, **kwargs: Any) -> None:
        """Comes when the whole package is read, so that every name can be looked up."""
        for member in _members(pkg):
            if member.docstring is not None:
                text = member.docstring.value
                member.docstring.value = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
            if isinstance(member, Function):
                for parameter in member.parameters:
                    is_variadic = parameter.kind in VARIADIC  # griffe gives these () and {}.
                    parameter.default = (
                        None if is_variadic else _written_out(parameter.default, pkg)
                    )
                    parameter.annotation = _written_out(parameter.annotation, pkg)


def _members(parent: Module | Class) -> Iterator[Object]:
    for member in parent.members.values():
        if isinstance(member, Object):
            yield member
        if isinstance(member, (Module, Class)):
            yield from _members(member)


def _written_out(expression: Any, pkg: Module) -> Any:
    """An expression, with every constant and ``Literal`` alias replaced by its value."""
    if isinstance(expression, ExprName):
        value = _value_of(expression, pkg)
        return expression if value is None else _written_out(value, pkg)
    if isinstance(expression, list):
        return [_written_out(item, pkg) for item in expression]
    if not isinstance(expression, Expr):
        return expression
    changed = {
        one.name: _written_out(getattr(expression, one.name), pkg)
        for one in dataclasses.fields(expression)
        if one.init and one.name != "parent"
    }
    inside = changed.get("slice")
    if _is_literal(expression) and isinstance(inside, ExprTuple):
        inside.elements = [choice for item in inside.elements for choice in _choices(item)]
    return dataclasses.replace(expression, **changed)


def _value_of(name: ExprName, pkg: Module) -> Expr | None:
    """The value of a constant in capitals or a ``Literal`` alias; None for anything else."""
    prefix, _, rest = name.canonical_path.partition(".")
    try:
        found = pkg[rest] if prefix == pkg.name and rest else None
        target = found.final_target if isinstance(found, Alias) else found
    except (KeyError, AliasResolutionError):
        return None
    if not isinstance(target, Attribute) or not isinstance(target.value, Expr):
        return None
    return target.value if target.name.isupper() or _is_literal(target.value) else None


def _is_literal(expression: Any) -> bool:
    return isinstance(expression, ExprSubscript) and expression.canonical_name == "Literal"


def _choices(item: Any) -> list[Any]:
    """The choices of a ``Literal`` within another one; anything else as it is."""
    if not _is_literal(item):
        return [item]
    return list(item.slice.elements) if isinstance(item.slice, ExprTuple) else [item.slice]
