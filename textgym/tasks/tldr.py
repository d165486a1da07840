"""TL;DR: summarise a Reddit post, in the layout of Stiennon et al. 2020 (arXiv 2009.01325)."""

from __future__ import annotations

import functools

from textgym.data.sources import load_split, post_prompt
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.rewards.overlap import rouge_l_reward
from textgym.rewards.preference import preference_reward
from textgym.task import Task

TASK = Task(
    name="tldr",
    data=functools.partial(load_split, "tldr"),
    prompt=post_prompt,
    references="summary",
    # As published. A model with fewer than 550 positions needs a smaller max_prompt_tokens.
    max_prompt_tokens=500,
    max_new_tokens=50,
    truncation_side="right",
    reward="rouge_l",
    rewards={"rouge_l": rouge_l_reward, "preference": preference_reward},
    metrics=("perplexity", "distinct", "preference", "rouge", "bleu", "meteor", "bert_score"),
)


class TLDREnv(TextEnv):
    """Summarise a Reddit post.

    Description
        The prompt has the layout of Stiennon et al. 2020 (arXiv 2009.01325): subreddit, title, post, "TL;DR:". Only the
        post is ever truncated.

    Action Space
        ``Discrete(vocab)``: the id of the next token. With ``handoff=True``, ``Discrete(vocab + 1)``: the last action
        asks the guide to finish the text.

    Observation Space
        ``Dict`` of ``input_ids``, int64 (P+T,), and ``attention_mask``, int8 (P+T,). The prompt is left-padded into the
        first P columns; token h of the text is in column P+h; the columns after the text are padding, mask 0.

    Rewards
        Zero until the episode ends, then ROUGE-L (F1) against the author's own summary, in [0, 1]; with
        ``reward="preference"`` the score of a model trained on preference pairs, in log-odds: any number, 0 on average
        for authors' summaries.

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
        ``max_prompt_tokens``, ``max_new_tokens``: P and T, by default 500 and 50.
        ``truncation_side``: which end of the truncatable text is dropped, by default "right".
        ``template``: a text with ``{prompt}`` that the policy reads instead of the prompt, such as "Q: {prompt} A:".
        ``chat``: True makes it a user's message in the chat template. ``stop``: strings, or names of special tokens,
        that end the text; the reward reads the text before them.
        ``reward``: "rouge_l" or "preference" (None is the first); the hub id or path of a sequence-classification
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


class TLDRVectorEnv(TextVectorEnv):
    """`TLDREnv` for N rows at once (see `textgym.engine.TextVectorEnv`)."""

    task = TASK
