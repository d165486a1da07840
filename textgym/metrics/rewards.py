"""Metrics that are a reward function's, of whatever reward the texts were written for."""

from __future__ import annotations

import os
from collections.abc import Sequence

import numpy as np

from textgym.data.sources import resolve_source
from textgym.metrics.base import Metric
from textgym.rewards import RewardFunction, load_reward, split_parts
from textgym.task import Task
from textgym.tasks import TASKS


class _Rewarded(Metric):
    """A metric under a reward function."""

    def __init__(
        self, reward: str | os.PathLike[str] | RewardFunction, task: Task, source: str | os.PathLike[str] | None
    ) -> None:
        super().__init__()
        self.reward = load_reward(reward, task, resolve_source(source))
        self.signature = f"reward {getattr(self.reward, 'fingerprint', None) or getattr(reward, '__name__', reward)}"

    def _rewards(self, prompts: Sequence[str], texts: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        values = self.reward(prompts=prompts, completions=texts, references=references)
        return split_parts(values, len(texts))[0]


class Sentiment(_Rewarded):
    """P(positive) of prompt and text together, by the reward model of IMDB.

    Args:
        reward: As the argument of the same name of ``textgym/IMDB-v0``.
        source: "mini", "hub" or a folder, on whose reviews the reward model is trained (see `resolve_source`).

    Returns:
        ``sentiment``, the mean, in [0, 1].
    """

    inputs = ("prompts", "predictions")
    paper = "Maas et al. Learning Word Vectors for Sentiment Analysis. ACL 2011."

    def __init__(
        self,
        reward: str | os.PathLike[str] | RewardFunction = "sentiment",
        *,
        source: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(reward, TASKS["imdb"], source)

    def _scores(self, prompts: Sequence[str], predictions: Sequence[str]) -> dict[str, float]:
        return {"sentiment": self._rewards(prompts, predictions, [()] * len(prompts)).mean()}


class Preference(_Rewarded):
    """The preference model's score of TL;DR summaries, and how often it prefers them to the reference.

    Args:
        reward: As the argument of the same name of ``textgym/TLDR-v0``.
        source: "mini", "hub" or a folder, on whose posts the preference model is trained (see `resolve_source`).

    Returns:
        ``preference``, the mean score, without limits; ``win_rate`` in [0, 1], the share of texts whose score is above
        their reference's, a tie one half; with several references the mean over them.
    """

    inputs = ("prompts", "predictions", "references")
    paper = "Stiennon et al. Learning to Summarize from Human Feedback. NeurIPS 2020."

    def __init__(
        self,
        reward: str | os.PathLike[str] | RewardFunction = "preference",
        *,
        source: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(reward, TASKS["tldr"], source)

    def _scores(
        self, prompts: Sequence[str], predictions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, float]:
        owners = [row for row, texts in enumerate(references) for _ in texts]
        # What a policy writes after "TL;DR:" starts with a space.
        targets = [" " + text.lstrip() for texts in references for text in texts]
        written = self._rewards(prompts, predictions, references)
        of_targets = self._rewards([prompts[row] for row in owners], targets, [references[row] for row in owners])
        wins = np.bincount(owners, np.sign(written[owners] - of_targets) / 2 + 0.5)
        return {"preference": written.mean(), "win_rate": (wins / np.bincount(owners)).mean()}
