"""The key of a server, which no text shows."""

from __future__ import annotations

import html
import logging
import os
import re
from base64 import b64encode
from itertools import groupby
from operator import itemgetter
from urllib.parse import unquote

# So many characters of a key are in no text by chance. Shorter keys are placeholders, such as "none".
_PIECE = 8
_SHOWN = 200
_ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})")


def read_key(variable: str | None) -> str | None:
    """Return the key in an environment variable, without white space around it; None for none.

    Raises:
        ValueError: It holds characters that no key has, which are not shown.
    """
    key = (os.environ.get(variable) or "").strip() if variable is not None else ""
    if not (key.isascii() and key.isprintable()):
        raise ValueError(
            f"api_key_env: the environment variable {variable} must hold printable ASCII characters, got others (which "
            "are not shown)"
        )
    return key or None


class Redactor:
    """Puts ``***`` in the place of a key in texts.

    It finds pieces of the key of eight characters or more, in capitals or not, forwards or backwards, in hexadecimal or
    base64 digits.

    Args:
        key: The key, or None for none.
    """

    def __init__(self, key: str | None) -> None:
        raw = (key or "").encode()
        forms = [raw, raw[::-1], raw.hex().encode(), *(b64encode(bytes(shift) + raw) for shift in range(3))]
        pieces = {form[i : i + _PIECE].lower() for form in forms for i in range(len(form) - _PIECE + 1)}
        self._pieces = frozenset(pieces) if len(raw) >= _PIECE else frozenset()

    def __call__(self, text: str) -> str:
        """Return a text without the key."""
        # As bytes, whose `lower` changes no length. Pieces are ASCII, so that no character is cut.
        whole = text.encode("utf-8", "surrogatepass")
        lowered = whole.lower()
        if not any(piece in lowered for piece in self._pieces):
            return text
        hidden = bytearray(len(whole))
        for i in range(len(whole) - _PIECE + 1):
            if lowered[i : i + _PIECE] in self._pieces:
                hidden[i : i + _PIECE] = b"\1" * _PIECE
        runs = groupby(zip(hidden, whole, strict=True), key=itemgetter(0))
        shown = b"".join(b"***" if secret else bytes(byte for _, byte in run) for secret, run in runs)
        return shown.decode("utf-8", "surrogatepass")

    def quote(self, text: str) -> str:
        """Return the first 200 characters of a text without the key, quoted so that all are printable."""
        # Cut roughly first: a hostile text can be long. Escapes, as of JSON, HTML and URLs, could hide the key.
        text = _ESCAPED.sub(lambda escape: chr(int(escape[1] or escape[2], 16)), text[: 20 * _SHOWN])
        return repr(self(unquote(html.unescape(text)))[:_SHOWN])

    def filter(self, record: logging.LogRecord) -> bool:
        """Take the key out of a log record (see `logging.Filter`)."""
        record.msg, record.args = self(record.getMessage()), ()
        return True
