"""The completions of a run that its record keeps, as stretches of text by author."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from agents import EvaluationResult
from agents.rollout import Rollout
from textgym.guides.base import Author
from textgym.tokenization import Context, decode_by_author

SAMPLES = 4  # of a run


def samples(result: EvaluationResult, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """A few completions of the test, of the same prompts for every row."""
    chosen = np.linspace(0, len(result.rewards) - 1, min(SAMPLES, len(result.rewards))).astype(int)
    return [
        {
            "sample_id": int(result.sample_ids[row]),
            "prompt": result.prompts[row],
            "reward": float(result.rewards[row]),
            "segments": segments(result.prompts[row], result.token_ids[row], result.authors[row], tokenizer),
        }
        for row in chosen
    ]


def rollouts(rollout: Rollout | None, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """A few of the last training episodes that the policy did not write alone; none if there is no rollout."""
    if rollout is None:
        return []
    written = rollout.authors != Author.NONE
    ids = rollout.input_ids[:, rollout.prompt_columns :]
    chosen = np.flatnonzero((written & ~rollout.body).any(1).cpu().numpy())[:SAMPLES]
    return [
        {
            "prompt": rollout.prompts[row],
            "prefix_length": int(rollout.prefix_length[row]),
            "reward": float(rollout.rewards[row]),
            "segments": segments(
                rollout.prompts[row],
                ids[row][written[row]].tolist(),
                rollout.authors[row][written[row]].tolist(),
                tokenizer,
            ),
        }
        for row in chosen
    ]


def segments(
    prompt: str, token_ids: Sequence[int], authors: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str]]:
    """A completion as stretches of one author each: (author, text)."""
    context = Context(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"], prompt)
    stretches = decode_by_author(tokenizer, context, token_ids, authors)
    return [(Author(author).name.lower(), text) for author, text in stretches]
