"""Texts for terminals, notebooks and Markdown: episodes in colours, and what came from outside without effect."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Self

from textgym.guides.base import Author

COLOURS = {Author.POLICY: 32, Author.GUIDE: 35, Author.REFERENCE: 34, Author.USER: 33}


def coloured(prompt: str, stretches: Sequence[tuple[int, str]]) -> str:
    """Show a text with ANSI colours; its own control characters have no effect.

    Args:
        prompt: The prompt.
        stretches: The text after it, as pairs (author, text) (see `textgym.tokenization.decode_by_author`).
    """
    parts = [(2, prompt), *((COLOURS[Author(author)], text) for author, text in stretches)]
    return "".join(f"\x1b[{code}m{visible(text)}\x1b[0m" for code, text in parts)


# The same colours, readable on light and on dark pages.
_CSS = {Author.POLICY: "#1a8f4a", Author.GUIDE: "#b0459c", Author.REFERENCE: "#3f78d8", Author.USER: "#a87a00"}


class Html(str):
    """A string of HTML, which notebooks show as such."""

    __slots__ = ()

    @classmethod
    def of(cls, prompt: str, stretches: Sequence[tuple[int, str]]) -> Self:
        """An episode: the prompt grey, and each author's text in a colour, with the author's name as its title.

        Args:
            prompt: As for `coloured`.
            stretches: As for `coloured`.
        """
        parts = [("prompt", "#888", prompt)]
        parts += [(Author(author).name.lower(), _CSS[Author(author)], text) for author, text in stretches]
        spans = (
            f'<span title="{title}" style="color:{colour}">{escape(visible(text))}</span>'
            for title, colour, text in parts
        )
        return cls(f'<div style="white-space:pre-wrap">{"".join(spans)}</div>')

    def _repr_html_(self) -> str:
        return str(self)


# Control characters but tab and newline, halves of characters, and what turns the direction of writing.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")
# What begins code, HTML, a cell of a table, the address of a link, or an address that becomes a link by itself.
_MARKDOWN = re.compile(r"[\\`<|]|(?<=\])\(|(?<=:)//")


def visible(text: str) -> str:
    """Show the control characters of a text as escapes, so that a terminal does not obey them."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def inert(text: str) -> str:
    """Return Markdown that shows a text in one line, and makes no link, image, HTML or cell of it."""
    return _MARKDOWN.sub(r"\\\g<0>", visible(text).replace("\n", " "))
