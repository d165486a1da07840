"""Episodes for terminals: the prompt dim, and each author's tokens in their own colour."""

from __future__ import annotations

from collections.abc import Sequence

from textgym.guides.base import Author

COLOURS = {Author.POLICY: 32, Author.GUIDE: 35, Author.REFERENCE: 34, Author.USER: 33}


def coloured(prompt: str, stretches: Sequence[tuple[int, str]]) -> str:
    """Show a text with ANSI colours.

    Args:
        prompt: The prompt.
        stretches: The text after it, as pairs (author, text) (see `textgym.tokenization.decode_by_author`).
    """
    parts = [(2, prompt), *((COLOURS[Author(author)], text) for author, text in stretches)]
    return "".join(f"\x1b[{code}m{text}\x1b[0m" for code, text in parts)
