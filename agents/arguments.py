"""The documentation of arguments, which stands below each in the source of an algorithm, for `help`."""

from __future__ import annotations

import ast
import inspect
import textwrap
from dataclasses import fields
from itertools import pairwise


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
