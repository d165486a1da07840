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

# Shorter keys are placeholders, such as "none". Pieces so long are hidden in what is only shown; in completions, which
# must stay as they are, only pieces that are in none by chance, as "required" could be of "sk-no-key-required".
_SHORTEST, _LONG = 8, 16
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
    """Puts ``***`` in the place of a key in texts, or of pieces of it.

    It finds them in capitals or not, forwards or backwards, in hexadecimal or base64 digits.

    Args:
        key: The key, or None for none.
    """

    def __init__(self, key: str | None) -> None:
        raw = (key or "").encode()
        self._short = _pieces(raw, _SHORTEST)
        self._long = _pieces(raw, max(_SHORTEST, min(_LONG, len(raw))))

    def __call__(self, text: str) -> str:
        """Return a completion without the key."""
        return _without(text, self._long)

    def quote(self, text: str) -> str:
        """Return the first 200 characters of a text without the key, quoted so that all are printable."""
        # Cut roughly first: a hostile text can be long. Escapes, as of JSON, HTML and URLs, could hide the key.
        text = _ESCAPED.sub(lambda escape: chr(int(escape[1] or escape[2], 16)), text[: 20 * _SHOWN])
        return repr(_without(unquote(html.unescape(text)), self._short)[:_SHOWN])

    def filter(self, record: logging.LogRecord) -> bool:
        """Take the key out of a log record (see `logging.Filter`)."""
        record.msg, record.args = _without(record.getMessage(), self._short), ()
        return True


def _pieces(key: bytes, size: int) -> frozenset[bytes]:
    """Return all pieces of a key in its forms, in small letters; none of a key that is shorter."""
    if len(key) < size:
        return frozenset()
    forms = [key, key[::-1], key.hex().encode(), *(b64encode(bytes(shift) + key) for shift in range(3))]
    return frozenset(form[i : i + size].lower() for form in forms for i in range(len(form) - size + 1))


def _without(text: str, pieces: frozenset[bytes]) -> str:
    # As bytes, whose `lower` changes no length. Pieces are ASCII, so that no character is cut.
    whole = text.encode("utf-8", "surrogatepass")
    lowered = whole.lower()
    if not any(piece in lowered for piece in pieces):
        return text
    size, hidden = len(next(iter(pieces))), bytearray(len(whole))
    for i in range(len(whole) - size + 1):
        if lowered[i : i + size] in pieces:
            hidden[i : i + size] = b"\1" * size
    runs = groupby(zip(hidden, whole, strict=True), key=itemgetter(0))
    shown = b"".join(b"***" if secret else bytes(byte for _, byte in run) for secret, run in runs)
    return shown.decode("utf-8", "surrogatepass")
