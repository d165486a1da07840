"""Guides, which start or finish the text of an episode."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches

from textgym.checks import check_place
from textgym.guides.base import Author, CallableGuide, Completion, Guide, GuideRequest, ScoringGuide
from textgym.guides.recorded import RecordedGuide
from textgym.guides.references import ReferenceGuide

__all__ = [
    "Author",
    "CallableGuide",
    "Completion",
    "Guide",
    "GuideRequest",
    "RecordedGuide",
    "ScoringGuide",
    "load_guide",
]


def load_guide(guide: Guide | Callable | str | os.PathLike | None) -> Guide | None:
    """Return the environment's argument `guide` as a guide.

    Args:
        guide: None; "references" for the dataset's own reference texts; a path that ends in ".jsonl" is a file of
            recorded completions; any other string is the hub id or path of a language model; a `Guide`; or a function
            on a list of `GuideRequest`.

    Raises:
        ValueError: `guide` is none of these, or a path at which there is nothing.
    """
    if guide is None or isinstance(guide, Guide):
        return guide
    if guide == "references":
        return ReferenceGuide()
    named = isinstance(guide, str) and "/" not in guide and not os.path.exists(guide)
    if named and get_close_matches(str(guide), ["references", "scripted"], cutoff=0.8):
        raise ValueError(
            "guide must be 'references', 'scripted' (where the environment has such a guide), or the hub id or path "
            f"of a language model, got {guide!r}"
        )
    if isinstance(guide, str | os.PathLike):
        if os.fspath(guide).endswith(".jsonl"):
            return RecordedGuide(guide)
        check_place("guide", guide, "a language model")
        from textgym.guides.local import LocalGuide  # imports transformers, which guides behind a server do without

        return LocalGuide(guide)
    if callable(guide):
        return CallableGuide(guide)
    raise ValueError(
        "guide must be None, 'references', the hub id or path of a language model, a Guide "
        f"or a function on a list of GuideRequest, got {type(guide).__name__}: {guide!r}"
    )
