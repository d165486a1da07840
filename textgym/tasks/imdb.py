"""IMDB: finish a film review so that it reads as a positive one."""

from __future__ import annotations

import functools

from textgym.data.sources import load_split
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.rewards.classifier import sentiment_reward
from textgym.task import Row, Task


def _halves(row: Row) -> tuple[str, str]:
    """Return the first and second half of a review's words; the second starts with a space."""
    words = row["text"].split()
    middle = len(words) // 2
    return " ".join(words[:middle]), " " + " ".join(words[middle:])


def _prompt(row: Row) -> str:
    return _halves(row)[0]


def _references(row: Row) -> list[str]:
    return [_halves(row)[1]]


def _is_positive(row: Row) -> bool:
    return row["label"] == 1


TASK = Task(
    name="imdb",
    data=functools.partial(load_split, "imdb"),
    prompt=_prompt,
    references=_references,
    max_prompt_tokens=64,
    max_new_tokens=48,
    # The end of a long first half is kept, so that the reference continues the prompt.
    truncation_side="left",
    reward="sentiment",
    rewards={"sentiment": sentiment_reward},
    metrics=("perplexity", "distinct", "self_bleu"),
    demonstration=_is_positive,
)


class IMDBEnv(TextEnv):
    """Finish a film review so that it is positive.

    Description
        The prompt is the first half of a review of the Large Movie Review Dataset (Maas et al. 2011), at most P tokens.
        The text continues it. One of the tasks of RLGF (arXiv 2306.11816).

    Action Space
        ``Discrete(vocab)``: the id of the next token. With ``handoff=True``, ``Discrete(vocab + 1)``: the last action
        asks the guide to finish the text.

    Observation Space
        ``Dict`` of ``input_ids``, int64 (P+T,), and ``attention_mask``, int8 (P+T,). The prompt is left-padded into the
        first P columns; token h of the text is in column P+h; the columns after the text are padding, mask 0.

    Rewards
        Zero until the episode ends, then P(positive) of prompt and text together, in [0, 1], by a small classifier
        trained on the same data source.

        Every token of a guide's completion costs ``handoff_cost``.

    Starting State
        The prompt of a sample, with probability ``guidance.restart_prob`` followed by a prefix that the guide wrote.
        The options of ``reset`` choose the sample (``index``), or give a ``prompt`` with ``references``, a ``prefix``,
        or new ``guidance``.

    Episode End
        The episode terminates at the end-of-sequence token or a string of ``stop`` ("stop"), after T tokens ("length"),
        or when the guide has completed the text ("handoff"). It is never truncated: the horizon is part of the task.

    Arguments
        ``split``: "train" (default), "validation" or "test".
        ``source``: "mini" (made for this project, no network), "hub", or a folder with the layout of the real data.
        None reads the environment variable ``TEXTGYM_SOURCE``, else "mini".
        ``train_samples``: samples of the train split that are used, evenly spaced; None for all.
        ``tokenizer``: a tokenizer, its hub id or path; None trains a byte-level BPE on the task's train split, once.
        ``max_prompt_tokens``, ``max_new_tokens``: P and T, by default 64 and 48.
        ``truncation_side``: which end of the truncatable text is dropped, by default "left".
        ``template``: a text with ``{prompt}`` that the policy reads instead of the prompt, such as "Q: {prompt} A:".
        ``chat``: True makes it a user's message in the chat template. ``stop``: strings, or names of special tokens,
        that end the text; the reward reads the text before them.
        ``reward``: None or "sentiment"; the hub id or path of a sequence-classification
        model; or a callable ``(prompts, completions, references) -> floats or named parts``.
        ``guide``: "references" (which restarts from positive reviews only), the hub id or path of a causal language
        model, a ".jsonl" file of recorded completions, a `textgym.guides.Guide`, or a function on a list of
        `textgym.guides.GuideRequest`.
        ``guidance``: a `textgym.Guidance`, or a mapping of its fields, which says when the guide takes part.
        ``handoff``: True adds the hand-off action. ``handoff_cost``: the cost of each token of a guide's completion.
        ``min_new_tokens``, ``banned_tokens``: `action_masks` does not allow an end before so many tokens, nor these
        token ids.
        ``order``: "random" (default) or "sequential", which visits each sample of the split once.
        ``render_mode``: "ansi", "html", "human" or None.

        The vector environment also takes ``num_envs``, ``parking``, ``autoreset_mode`` and ``copy``
        (see `textgym.engine.TextVectorEnv`).

    Info
        From ``reset``: ``prompt``, ``references``, ``sample_id`` (-1 for a user's prompt), ``prefix_length``,
        ``authors`` (int8 (T,): -1 nothing, 0 policy, 1 guide, 2 reference, 3 user). From the last ``step``: ``text``,
        ``authors``, ``finish_reason``, ``reward_parts``, ``prefix_length``, ``policy_tokens``, ``guide_tokens``.

    Version History
        v0: first version.
    """

    task = TASK


class IMDBVectorEnv(TextVectorEnv):
    """`IMDBEnv` for N rows at once (see `textgym.engine.TextVectorEnv`)."""

    task = TASK
