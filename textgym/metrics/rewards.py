"""Metrics that are reward functions, for texts that were written for any reward."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from textgym.data.sources import resolve_source
from textgym.metrics.base import TextMetric
from textgym.rewards import RewardFunction, load_reward, split_parts
from textgym.rewards.classifier import sentiment_reward
from textgym.rewards.preference import preference_reward

_REWARDS: Mapping[str, Callable[[str], RewardFunction]] = {
    "sentiment": sentiment_reward,
    "preference": preference_reward,
}


class _RewardMetric(TextMetric):
    """A metric computed by a reward function, by default by the one of its own name."""

    needs: ClassVar = {"source": "source"}

    def __init__(
        self,
        reward: str | os.PathLike[str] | RewardFunction | None = None,
        *,
        source: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__()
        reward = self.name if reward is None else reward
        self.reward = load_reward(reward, {self.name: _REWARDS[self.name]}, resolve_source(source))
        self.signature = f"reward {getattr(self.reward, 'fingerprint', None) or getattr(reward, '__name__', reward)}"

    def _rewards(self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        values = self.reward(prompts=prompts, completions=texts, references=references)
        return split_parts(values, len(texts))[0]


class Sentiment(_RewardMetric):
    """P(positive) of prompt and text together, by the reward model of IMDB.

    Args:
        reward: The argument of ``textgym/IMDB-v0`` with this name; None is "sentiment".
        source: "mini", "hub" or a folder, on whose reviews the reward model is trained (see `resolve_source`).

    Returns:
        ``sentiment``, the mean, in [0, 1].
    """

    inputs = ("prompts", "predictions")
    paper = "Maas et al. Learning Word Vectors for Sentiment Analysis. ACL 2011."

    def _scores(self, prompts: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        return {"sentiment": self._rewards(prompts, predictions, [()] * len(prompts)).mean()}


class Preference(_RewardMetric):
    """The preference model's score of TL;DR summaries, and how often it prefers them to the reference.

    Args:
        reward: The argument of ``textgym/TLDR-v0`` with this name; None is "preference".
        source: "mini", "hub" or a folder, on whose posts the preference model is trained (see `resolve_source`).

    Returns:
        ``preference``, the mean score, unbounded; ``win_rate`` in [0, 1], the share of texts whose score is above that
        of their reference, ties counted as one half; the mean over several references.
    """

    inputs = ("prompts", "predictions", "references")
    paper = "Stiennon et al. Learning to Summarize from Human Feedback. NeurIPS 2020."

    def _scores(
        self, prompts: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        owners = [row for row, texts in enumerate(references) for _ in texts]
        # A policy's text after "TL;DR:" starts with a space, too.
        targets = [" " + text.lstrip() for texts in references for text in texts]
        written = self._rewards(prompts, predictions, references)
        of_targets = self._rewards([prompts[row] for row in owners], targets, [references[row] for row in owners])
        wins = np.bincount(owners, np.sign(written[owners] - of_targets) / 2 + 0.5)
        return {"preference": written.mean(), "win_rate": (wins / np.bincount(owners)).mean()}
