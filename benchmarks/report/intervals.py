"""Estimates with bootstrap intervals, after Agarwal et al. 2021 (arXiv 2108.13264).

There are two ways to resample. Over seeds, for "would other training seeds give the same result?": each run has one
score, and seeds are resampled within each task (`interquartile_mean`, `probability_of_improvement`,
`performance_profile`, `ratio`). Over prompts, for "would other test prompts give the same result for these policies?":
each prompt has one reward, and prompts are resampled (`PromptBootstrap`).

All intervals are percentile bootstraps (Efron and Tibshirani 1993, chapter 13); `coverage` simulates how often they
hold the true value. A resample is how often it has each score, so that statistics of all resamples are products of
matrices. Scores of a task are float (seeds,), one for each run; scores of another shape, or that are not finite, raise
ValueError.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)  # of an interval, as quantiles
RESAMPLES = 10_000

Verdict = Literal["above", "below", "not told apart"]


class Interval(NamedTuple):
    """An estimate and its confidence interval, whose ends are NaN if there is nothing to resample."""

    value: float
    low: float
    high: float

    def against(self, other: Interval | float) -> Verdict:
        """Whether the whole interval lies above or below a number or another whole interval."""
        low, high = (other.low, other.high) if isinstance(other, Interval) else (other, other)
        return "above" if self.low > high else "below" if self.high < low else "not told apart"

    def __neg__(self) -> Interval:
        return Interval(-self.value, -self.high, -self.low)

    def __format__(self, spec: str) -> str:
        """``f"{interval:.2f}"`` is "0.50 [0.40, 0.60]", or "0.50" without an interval; zero has no minus."""
        spec = re.sub(r"(?=\.)", "z", spec)
        ends = f" [{self.low:{spec}}, {self.high:{spec}}]" if np.isfinite(self.low) else ""
        return f"{self.value:{spec}}{ends}"


def interquartile_mean(tasks: Sequence[ArrayLike]) -> Interval:
    """Mean of the middle half of all runs' scores, seeds resampled within each task (section 4.3 of the paper).

    All runs have the same weight: of n runs, the floor(n / 4) lowest and the floor(n / 4) highest are left out.

    Args:
        tasks: One task's scores or more, comparable between tasks.
    """
    samples = _samples("tasks", tasks)
    scores = np.concatenate(samples)
    return Interval(*_over_seeds(samples, lambda *counts: _iqm(scores, np.concatenate(counts))).tolist())


def probability_of_improvement(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Interval:
    """Probability that a run of one algorithm scores higher than a run of another, averaged over tasks.

    For each task the Mann-Whitney statistic, 1/(N K) sum_ij S(x_i, y_j), S being 1 for x > y and 1/2 for x = y
    (section 4.3 of the paper); seeds are resampled within each task and algorithm.

    Args:
        first: The scores x of each task, on any scale.
        second: The other algorithm's scores y on the same tasks.

    Raises:
        ValueError: The numbers of tasks differ.
    """
    samples = _samples("first", first), _samples("second", second)
    if len(samples[0]) != len(samples[1]):
        raise ValueError(f"first and second must be on the same tasks, got {len(samples[0])} and {len(samples[1])}")

    signs = [np.sign(x[:, None] - y) for x, y in zip(*samples, strict=True)]  # (N, K)

    def statistic(*counts: np.ndarray) -> np.ndarray:
        halves = counts[: len(signs)], counts[len(signs) :]
        means = [((sign.T @ x) * y).sum(0) / sign.size for sign, x, y in zip(signs, *halves, strict=True)]
        return (1 + np.mean(means, axis=0)) / 2

    return Interval(*_over_seeds([*samples[0], *samples[1]], statistic).tolist())


def performance_profile(tasks: Sequence[ArrayLike], thresholds: ArrayLike) -> list[Interval]:
    """For each threshold, the share of runs that score above it, averaged over tasks: the paper's section 4.2.

    The intervals, seeds resampled within each task, hold for one threshold at a time.

    Args:
        tasks: One task's scores or more, comparable between tasks.
        thresholds: float (thresholds,).
    """
    samples, levels = _samples("tasks", tasks), np.asarray(thresholds, dtype=np.float64)
    above = [(scores > levels[:, None]).astype(np.float64) for scores in samples]  # (thresholds, seeds)

    def statistic(*counts: np.ndarray) -> np.ndarray:
        return np.mean([of_task @ count / len(count) for of_task, count in zip(above, counts, strict=True)], axis=0)

    return [Interval(*level) for level in _over_seeds(samples, statistic).T.tolist()]


def learning_curve(scores: ArrayLike) -> list[Interval]:
    """For each point of a curve, the interquartile mean over seeds; its intervals hold for one point at a time.

    Args:
        scores: float (points, seeds).
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"scores must be finite and have shape (points, seeds), got {scores!r}")
    found = _over_seeds([array[0]], lambda counts: np.array([_iqm(point, counts) for point in array]), resamples=1_000)
    return [Interval(*point) for point in found.T.tolist()]


def ratio(first: ArrayLike, second: ArrayLike) -> Interval:
    """Ratio of two algorithms' geometric means over seeds of a positive metric; seeds of each are resampled.

    Args:
        first: float (seeds,), above 0.
        second: The other algorithm's, above 0.

    Raises:
        ValueError: A value is not above 0.
    """
    samples = _samples("first and second", [first, second])
    if min(sample.min() for sample in samples) <= 0:
        raise ValueError(f"first and second must be above 0, got {first!r} and {second!r}")
    means = [np.log(sample) / len(sample) for sample in samples]
    return Interval(*np.exp(_over_seeds(samples, lambda x, y: means[0] @ x - means[1] @ y)).tolist())


class PromptBootstrap:
    """Mean rewards of runs on the same test prompts, and those means on resampled prompts.

    An easy prompt is easy for all policies. Resampling a prompt together with the rewards of all runs on it removes
    this common part from the difference between two runs. A prompt is resampled for all seeds together, since its
    effect on a difference is common to them: resampled per seed, the same prompts would count several times.

    Args:
        rewards: float (runs, prompts), two or more prompts.
        seed: Seed of the resampling.

    Raises:
        ValueError: `rewards` has another shape, fewer than two prompts, or a value that is not finite.
    """

    def __init__(self, rewards: ArrayLike, *, seed: int = 0) -> None:
        array = np.asarray(rewards, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] < 2 or array.size == 0:
            raise ValueError(f"rewards must have shape (runs, prompts) with two or more prompts, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"rewards must be finite, got {int((~np.isfinite(array)).sum())} values that are not")
        self._means = array.mean(1)
        rng, prompts, at_once = np.random.default_rng(seed), array.shape[1], 500
        parts = [array @ _draw(rng, prompts, at_once) / prompts for _ in range(RESAMPLES // at_once)]
        self._resampled = np.concatenate(parts, axis=1)

    def difference(self, first: Sequence[int], second: Sequence[int]) -> Interval:
        """Mean difference between runs of one algorithm and runs of another.

        The interval is about these policies on other prompts, not about policies trained with other seeds.

        Args:
            first: Rows of `rewards`, one per run of the first algorithm.
            second: Rows of the other algorithm's runs with the same seeds, in the same order.
        """
        means = self._means[first] - self._means[second]
        resampled = (self._resampled[first] - self._resampled[second]).mean(0)
        return Interval(float(means.mean()), *np.quantile(resampled, ENDS).tolist())

    def differences(self, first: Sequence[int], second: Sequence[int]) -> list[Interval]:
        """The same difference for each pair of runs alone."""
        means = self._means[first] - self._means[second]
        ends = np.quantile(self._resampled[first] - self._resampled[second], ENDS, axis=1)
        return [Interval(*difference) for difference in zip(means.tolist(), *ends.tolist(), strict=True)]


@lru_cache
def coverage(seeds: int) -> float:
    """Simulate how often the interval of `interquartile_mean` on one task holds the true mean of normal scores.

    Returns a probability to about 0.01, nominally 0.95, for two `seeds` or more. A bootstrap never goes beyond the
    values it resamples, so that with few of them its intervals are too narrow.
    """
    rng = np.random.default_rng(0)
    samples = rng.normal(size=(4_000, seeds))
    counts = _draw(rng, seeds, 1_000)
    low, high = np.quantile([_iqm(scores, counts) for scores in samples], ENDS, axis=1)
    return float(((low <= 0) & (high >= 0)).mean())


def _iqm(scores: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Interquartile means of resamples.

    Args:
        scores: float (n,).
        counts: float (n, resamples), how often each score is in a resample of n.

    Returns:
        float (resamples,).
    """
    order, left_out = np.argsort(scores, kind="stable"), len(scores) // 4
    # Of the scores of a resample, in ascending order, those at places left_out to n - left_out count.
    before = np.cumsum(counts[order], axis=0).clip(left_out, len(scores) - left_out)
    kept = np.diff(before, axis=0, prepend=left_out)
    return scores[order] @ kept / (len(scores) - 2 * left_out)


def _over_seeds(
    samples: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], resamples: int = RESAMPLES
) -> np.ndarray:
    """A statistic of samples, each resampled independently.

    Args:
        samples: Arrays of the sizes n of the samples.
        statistic: Takes for each sample how often its scores are in resamples, float (n, resamples), and returns
            (..., resamples).
        resamples: Number of resamples.

    Returns:
        The statistic's value and the ends of its interval, (3, ...).
    """
    sizes = tuple(len(sample) for sample in samples)
    value = statistic(*(np.ones((size, 1)) for size in sizes))[..., 0]
    if min(sizes) < 2:
        return np.stack([value, np.full_like(value, np.nan), np.full_like(value, np.nan)])
    return np.stack([value, *np.quantile(statistic(*_counts(sizes, resamples)), ENDS, axis=-1)])


@lru_cache(maxsize=16)
def _counts(sizes: tuple[int, ...], resamples: int) -> list[np.ndarray]:
    """How often each score of samples of these sizes is in each of their resamples, always the same ones."""
    rng = np.random.default_rng(0)
    return [_draw(rng, size, resamples) for size in sizes]


def _draw(rng: np.random.Generator, size: int, resamples: int) -> np.ndarray:
    """Resample `size` things: how often each is in each resample, float (size, resamples)."""
    drawn = rng.integers(0, size, (resamples, size))
    places = drawn * resamples + np.arange(resamples)[:, None]
    return np.bincount(places.ravel(), minlength=size * resamples).reshape(size, resamples).astype(np.float64)


def _samples(name: str, samples: Sequence[ArrayLike]) -> list[np.ndarray]:
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or any(array.ndim != 1 or not array.size or not np.isfinite(array).all() for array in arrays):
        raise ValueError(f"{name} must be one or more arrays of finite scores, one a seed, got {samples!r}")
    return arrays
