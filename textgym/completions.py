"""Completions of a guide, as tokens of the environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from textgym.checks import check, is_int, is_text
from textgym.guides.base import Completion, Guide, GuideRequest
from textgym.tokenization import Context, StopCriteria, beginning, encode_continuations


def complete(
    guide: Guide,
    requests: Sequence[GuideRequest],
    contexts: Sequence[Context],
    tokenizer: PreTrainedTokenizerBase,
    stop_criteria: StopCriteria,
) -> list[tuple[list[int], bool]]:
    """Ask a guide to continue texts.

    Args:
        guide: The guide.
        requests: N requests.
        contexts: The prompt of each text, as the policy reads it.
        tokenizer: The environment's tokenizer.
        stop_criteria: Where texts end.

    Returns:
        For each request the new token ids, cut where the text ends, and whether it ends with the last of them.

    Raises:
        ValueError: The guide did not return one completion per request, in text or in valid token ids.
    """
    completions, result = ask(guide, requests, tokenizer, len(stop_criteria.tokens)), []
    texts = {
        row: beginning(tokenizer, completion.text or "", request.max_new_tokens)
        for row, (request, completion) in enumerate(zip(requests, completions, strict=True))
        if completion.token_ids is None
    }
    before = [contexts[row].text + requests[row].prefix for row in texts]
    encoded = dict(
        zip(texts, encode_continuations(tokenizer, before, [*texts.values()], "a guide's text"), strict=True)
    )
    for row, (context, request, completion) in enumerate(zip(contexts, requests, completions, strict=True)):
        ids = encoded[row] if row in encoded else list(completion.token_ids or ())
        ended = stop_criteria.cut(ids, request.prefix_ids, context)
        if ended is None and completion.finished:
            ended = [*ids, stop_criteria.closing_token]
        ids = (ids if ended is None else ended)[: request.max_new_tokens]
        result.append((ids, ids == ended))
    return result


def ask(
    guide: Guide, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase, vocab_size: int
) -> list[Completion]:
    """Ask a guide, and read what it returns.

    Args:
        guide: The guide.
        requests: N requests.
        tokenizer: The environment's tokenizer.
        vocab_size: Size of its vocabulary.

    Returns:
        N completions, each with a text or with valid token ids, a list.

    Raises:
        ValueError: The guide did not return one completion per request, in text or in valid token ids.
    """
    if not requests:
        return []
    completions, name = guide.complete(requests, tokenizer), type(guide).__name__
    if not isinstance(completions, Sequence | np.ndarray) or isinstance(completions, str | bytes | bytearray):
        raise ValueError(
            f"guide must return a list with one completion per request, {name} returned "
            f"{type(completions).__name__}: {_short(completions)}"
        )
    if len(completions) != len(requests):
        raise ValueError(
            f"guide must return one completion per request ({len(requests)}), {name} returned {len(completions)}"
        )
    return [_read(returned, vocab_size, name) for returned in completions]


def _read(returned: Any, vocab_size: int, name: str) -> Completion:
    """Return what a guide returned for one request as a completion with a text or with valid token ids, a list.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(returned, str):
        returned = Completion(text=returned)
    elif not isinstance(returned, Completion):
        returned = Completion(token_ids=returned, finished=False)
    ids, text, finished = returned.token_ids, returned.text, returned.finished
    check("Completion.finished", finished, isinstance(finished, bool | np.bool_), "True or False")
    if ids is not None:
        wrong = isinstance(ids, str | bytes | bytearray | memoryview)
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # of an array or a tensor
        wrong = wrong or not isinstance(ids, Sequence) or not all(map(is_int, ids))
        if wrong or any(not 0 <= token < vocab_size for token in ids):
            raise ValueError(
                f"guide must return text, or token ids in [0, {vocab_size}), {name} returned {_short(returned)}"
            )
        return Completion(token_ids=[int(token) for token in ids], finished=bool(finished))
    if not is_text(text):
        raise ValueError(f"guide must return Unicode text or token ids, {name} returned {_short(returned)}")
    return returned


def _short(value: Any) -> str:
    return repr(value)[:200]
