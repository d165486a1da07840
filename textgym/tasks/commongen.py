"""CommonGen: write a sentence that uses all of the given concepts (Lin et al. 2020, arXiv 1911.03705)."""

from __future__ import annotations

import functools

from textgym.data.sources import load_split
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.rewards.overlap import cider_coverage_reward
from textgym.task import Row, Task


def _prompt(row: Row) -> tuple[str, str, str]:
    # No part may be truncated: a sentence cannot use a concept that the prompt lost.
    return "generate a sentence with: " + " ".join(row["concepts"]), "", ""


TASK = Task(
    name="commongen",
    data=functools.partial(load_split, "commongen"),
    prompt=_prompt,
    references="targets",
    # The longest prompt of CommonGen v1.1 has 23 tokens with a byte-level BPE of 8,192 tokens (tests/test_tasks.py
    # counts them), and some tokenizers add a start token. The published 15 would cut concepts off.
    max_prompt_tokens=24,
    max_new_tokens=20,
    reward="cider_coverage",
    rewards={"cider_coverage": cider_coverage_reward},
    metrics=("perplexity", "distinct", "bleu", "rouge", "meteor", "cider_d", "spice", "bert_score", "coverage"),
)


class CommonGenEnv(TextEnv):
    """Write a sentence with all of the given concepts.

    Description
        The prompt is "generate a sentence with: c1 c2 c3", with three to five concepts of CommonGen (Lin et al. 2020).
        No concept is ever truncated.

    Action Space
        ``Discrete(vocab)``: the id of the next token. With ``handoff=True``, ``Discrete(vocab + 1)``: the last action
        asks the guide to finish the text.

    Observation Space
        ``Dict`` of ``input_ids``, int64 (P+T,), and ``attention_mask``, int8 (P+T,). The prompt is left-padded into the
        first P columns; token h of the text is in column P+h; the columns after the text are padding, mask 0.

    Rewards
        Zero until the episode ends, then a weighted sum, at least 0, of CIDEr-D against the references and of the share
        of concepts that the sentence mentions.

        The weights are in `textgym.rewards.overlap`; ``info["reward_parts"]`` has both.
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
        ``max_prompt_tokens``, ``max_new_tokens``: P and T, by default 24 and 20.
        ``truncation_side``: which end of the truncatable text is dropped, by default "right".
        ``template``: a text with ``{prompt}`` that the policy reads instead of the prompt, such as "Q: {prompt} A:".
        ``chat``: True makes it a user's message in the chat template. ``stop``: strings, or names of special tokens,
        that end the text; the reward reads the text before them.
        ``reward``: "cider_coverage" (None is the first); the hub id or path of a sequence-classification
        model; or a callable ``(prompts, completions, references) -> floats or named parts``.
        ``guide``: "references", the hub id or path of a language model, a ".jsonl" file of recorded completions, a
        `textgym.guides.Guide`, or a function on a list of `textgym.guides.GuideRequest`.
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


class CommonGenVectorEnv(TextVectorEnv):
    """`CommonGenEnv` for N rows at once (see `textgym.engine.TextVectorEnv`)."""

    task = TASK
