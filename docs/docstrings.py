"""Lets mkdocstrings show the reference pages of environments, whose docstrings have Gymnasium's sections."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from typing import Any

import griffe

SECTION = re.compile(r"^([A-Z][A-Za-z ]+)\n((?:    .*\n|\n)+)", re.MULTILINE)
# What begins the entry of an argument: "``split``:" or "``min_new_tokens``, ``banned_tokens``:".
ENTRY = re.compile(r"^(?=``\w+``(?:, ``\w+``)*:)", re.MULTILINE)


class GymnasiumSections(griffe.Extension):
    """Makes headings of sections, and reads the docstring at run time: those of puzzles are completed there."""

    def on_class(self, *, cls: griffe.Class, loader: griffe.GriffeLoader, **arguments: Any) -> None:
        """Replace the docstring of an environment of a task."""
        if not (cls.module.path.startswith("textgym.tasks.") and cls.name.endswith("Env") and cls.docstring):
            return
        text = inspect.getdoc(getattr(import_module(cls.module.path), cls.name)) + "\n"
        cls.docstring.value = SECTION.sub(
            lambda found: f"## {found[1]}\n\n{ENTRY.sub('- ', inspect.cleandoc(found[2]))}\n\n", text
        )
