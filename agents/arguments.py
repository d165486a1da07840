"""Arguments of algorithms: their documentation, for `help`, and those that are objects with a name."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, TypeVar

from textgym.checks import check_arguments, check_one_of

Named = TypeVar("Named")


def by_name(argument: str, value: Any, base: type[Named]) -> Named:
    """An object of a subclass of a dataclass, with its settings and without its state.

    Args:
        argument: What the object is an argument for, in errors.
        value: Such an object, its ``name``, or a mapping of its name and settings.
        base: The dataclass, whose direct subclasses have the names.

    Raises:
        TypeError: A setting that it does not have.
        ValueError: There is none of this name, or a setting is wrong.
    """
    if isinstance(value, base):
        return replace(value)  # type: ignore[type-var]
    settings = dict(value) if isinstance(value, Mapping) else {"name": value}
    kinds = {getattr(kind, "name", None): kind for kind in base.__subclasses__()}
    kind = kinds[check_one_of(argument, settings.pop("name", None), tuple(kinds))]
    check_arguments(kind.__name__, settings, [part.name for part in fields(kind) if part.init])  # type: ignore[arg-type]
    return kind(**settings)


def document_arguments(cls: type) -> None:
    """Add a section "Args" to the docstring of a dataclass that has none: its fields, and those of its bases.

    Args:
        cls: A dataclass with a string below each field. Without its source (an interactive session) nothing is added
            for its own fields.
    """
    texts = getattr(cls, "_argument_texts", {}) | _strings_below_fields(cls)
    cls._argument_texts = texts  # type: ignore[attr-defined]
    doc = inspect.cleandoc(cls.__doc__ or "")
    documented = [part.name for part in fields(cls) if part.name in texts]  # type: ignore[arg-type]
    if documented and "\nArgs:\n" not in doc:
        lines = [textwrap.indent(f"{name}: {texts[name]}", "    ").replace("\n", "\n    ") for name in documented]
        cls.__doc__ = "\n".join([doc, "", "Args:", *lines, ""])


def _strings_below_fields(cls: type) -> dict[str, str]:
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    except (OSError, TypeError, SyntaxError):
        return {}
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in pairwise(definition.body)  # type: ignore[attr-defined]
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
