"""What servers answer, read with care: nothing in an answer is taken for what it should be."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from textgym.checks import is_int, is_number, is_text

# No token of any vocabulary is so long, and no text of so few tokens.
_MOST_CHARACTERS, _MOST_BYTES = 1024, 32
# A token's bytes where nobody has counted.
_BYTES = 4
# No model reads or writes so many.
_MOST_TOKENS = 10**7
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Answer:
    """A completion of a server, or of the cache.

    Attributes:
        text: The text. Of a text that was scored, what the server reads, or empty where it does not say.
        finish_reason: Why it ended: "length" or "content_filter" where it is not finished.
        prompt_tokens: Tokens read.
        completion_tokens: Tokens written.
        log_probs: Of a text that was scored, those of its tokens after the first.

    Raises:
        TypeError: A field has a wrong type.
        ValueError: The text has half a surrogate pair, or a number is out of range.
    """

    text: str
    finish_reason: str | None
    prompt_tokens: int
    completion_tokens: int
    log_probs: Sequence[float] | None = None

    def __post_init__(self) -> None:
        counts = (self.prompt_tokens, self.completion_tokens)
        numbers = () if self.log_probs is None else self.log_probs
        if not (
            isinstance(self.text, str)
            and isinstance(self.finish_reason, str | None)
            and isinstance(numbers, list | tuple)
            and all(map(is_number, numbers))
            and all(map(is_int, counts))
        ):
            raise TypeError("a field has a wrong type")
        if not is_text(self.text) or min(counts) < 0 or not all(map(math.isfinite, numbers)):
            raise ValueError("the text is no Unicode, or a number is out of range")


def sent(body: Mapping[str, Any]) -> int:
    """Return about how many tokens the text of a request has, exactly where it is token ids."""
    return len(body["prompt"]) if _is_ids(body) else math.ceil(_sent_bytes(body) / _BYTES)


def limit(body: Mapping[str, Any]) -> int:
    """Return the limit of tokens of a request, which has two names."""
    return body.get("max_completion_tokens") or body["max_tokens"]


def read_answer(reply: Any, body: Mapping[str, Any], hide: Callable[[str], str]) -> Answer:
    """Read a server's answer to a request.

    Its token counts are believed where they are possible. Others are replaced by what was sent, and by the limit.

    Args:
        reply: JSON values.
        body: The request.
        hide: Takes the key out of a text.

    Raises:
        AttributeError: It is no completion.
        LookupError: As above.
        TypeError: As above.
        ValueError: As above.
    """
    choice = reply["choices"][0]
    text = choice["message"]["content"] if "message" in choice else choice["text"]
    reason = choice.get("finish_reason")
    log_probs = None
    if "echo" in body:
        echoed = (choice.get("logprobs") or {}).get("token_logprobs") or []
        text = text if len(echoed) >= len(body["prompt"]) else ""
        log_probs = _log_probs(choice, echoed, body["prompt"])
    # Cut to more than could be kept: in a chat it may repeat what was sent.
    most = _MOST_CHARACTERS * (limit(body) + (len(body["prompt"]) if _is_ids(body) else 0)) + _sent_bytes(body)
    text = hide(_SURROGATES.sub("\ufffd", ("" if text is None else text)[:most]))
    usage = reply.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    least = sent(body) if _is_ids(body) else _sent_bytes(body) // _MOST_BYTES
    return Answer(
        text,
        reason if reason in (None, "length", "content_filter") else "stop",
        _believed(usage.get("prompt_tokens"), least, sent(body)),
        _believed(
            usage.get("completion_tokens"), 0 if "echo" in body else len(text.encode()) // _MOST_BYTES, limit(body)
        ),
        log_probs,
    )


def _log_probs(choice: Any, echoed: Sequence[Any], ids: Sequence[int]) -> list[float] | None:
    """Return the log-probabilities of token ids after the first; None where the server does not say them."""
    try:
        if (by_token := choice.get("prompt_logprobs")) is not None:
            found = [float(by_token[at][str(token)]["logprob"]) for at, token in enumerate(ids) if at]
        else:
            found = [float(echoed[at]) for at in range(1, len(ids))]
    except (LookupError, TypeError, ValueError):
        return None
    return found if all(map(math.isfinite, found)) else None


def _believed(count: Any, least: int, otherwise: int) -> int:
    """Return a server's count of tokens, not below `least`; `otherwise` where it is no possible count."""
    return max(count, least) if is_int(count) and 0 <= count < _MOST_TOKENS else max(otherwise, least)


def _is_ids(body: Mapping[str, Any]) -> bool:
    return isinstance(body.get("prompt"), list)


def _sent_bytes(body: Mapping[str, Any]) -> int:
    if _is_ids(body):
        return 0
    texts = [message["content"] for message in body["messages"]] if "messages" in body else [body["prompt"]]
    return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts)
