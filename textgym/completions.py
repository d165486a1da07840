"""Completions of a guide, as tokens of the environment."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from textgym.guides.base import Completion, Guide, GuideRequest
from textgym.tokenization import Context, StopCriteria, encode_continuation


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
    if not requests:
        return []
    completions, name = guide.complete(requests, tokenizer), type(guide).__name__
    if len(completions) != len(requests):
        raise ValueError(
            f"guide must return one completion per request ({len(requests)}), {name} returned {len(completions)}"
        )
    vocab_size, result = len(stop_criteria.tokens), []
    for context, request, completion in zip(contexts, requests, completions, strict=True):
        if isinstance(completion, str):
            completion = Completion(text=completion)
        elif not isinstance(completion, Completion):
            completion = Completion(token_ids=completion, finished=False)
        if completion.token_ids is not None:
            ids = [int(token) for token in completion.token_ids]
            if any(not 0 <= token < vocab_size for token in ids):
                raise ValueError(f"guide must return token ids in [0, {vocab_size}), got {ids}")
        elif completion.text is not None:
            ids = encode_continuation(tokenizer, context.text + request.prefix, [completion.text], "a guide's text")[0]
        else:
            raise ValueError(f"guide must return text or token ids, {name} returned neither")
        ended = stop_criteria.cut(ids, request.prefix_ids, context)
        if ended is None and completion.finished:
            ended = [*ids, stop_criteria.closing_token]
        ids = (ids if ended is None else ended)[: request.max_new_tokens]
        result.append((ids, ids == ended))
    return result
