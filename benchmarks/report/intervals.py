"""What runs and test prompts can and cannot tell apart, after Agarwal et al. 2021 (arXiv 2108.13264).

Two questions, two ways to resample. *Would other seeds say the same?* One score a run; seeds are resampled within each
task (`interquartile_mean`, `probability_of_improvement`, `performance_profile`, `ratio`). *Would other prompts say the
same of these very policies?* One reward a prompt; prompts are resampled (`PromptBootstrap`).

All intervals are percentile bootstraps (Efron and Tibshirani 1993, chapter 13); `coverage` says what they are worth.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000

Verdict = Literal["above", "below", "not told apart"]


class Interval(NamedTuple):
    """An estimate and its confidence interval, whose ends are NaN where there is nothing to resample."""

    value: float
    low: float
    high: float

    def against(self, other: Interval | float) -> Verdict:
        """Where the whole interval lies, seen from a number or from another whole interval."""
        low, high = (other.low, other.high) if isinstance(other, Interval) else (other, other)
        return "above" if self.low > high else "below" if self.high < low else "not told apart"

    def __format__(self, spec: str) -> str:
        """``f"{interval:.2f}"`` is "0.50 [0.40, 0.60]", or "0.50" without an interval; zero has no minus."""
        spec = re.sub(r"(?=\.)", "z", spec)
        ends = f" [{self.low:{spec}}, {self.high:{spec}}]" if np.isfinite(self.low) else ""
        return f"{self.value:{spec}}{ends}"


def interquartile_mean(tasks: Sequence[ArrayLike]) -> Interval:
    """Mean of the middle half of all runs' scores, seeds resampled within each task (section 4.3 of the paper).

    All runs count alike: from n of them the floor(n / 4) lowest and highest are left out.

    Args:
        tasks: For each task, float (seeds,), comparable between tasks.

    Raises:
        ValueError: No task, or one whose scores are not as above.
    """
    return Interval(*_over_seeds(_samples("tasks", tasks), _iqm).tolist())


def probability_of_improvement(first: Sequence[ArrayLike], second: Sequence[ArrayLike]) -> Interval:
    """Probability that a run of one algorithm scores higher than a run of another, averaged over tasks.

    For each task the Mann-Whitney statistic, 1/(N K) sum_ij S(x_i, y_j), S being 1 for x > y and 1/2 for x = y
    (section 4.3 of the paper); seeds are resampled within each task and algorithm.

    Args:
        first: For each task, float (seeds,): the scores x. Their scale does not matter.
        second: The other algorithm's scores y on the same tasks.

    Raises:
        ValueError: The numbers of tasks differ, or scores are not as above.
    """
    samples = _samples("first", first), _samples("second", second)
    if len(samples[0]) != len(samples[1]):
        raise ValueError(f"first and second must be on the same tasks, got {len(samples[0])} and {len(samples[1])}")

    def statistic(*scores: np.ndarray, axis: int) -> np.ndarray:
        pairs = zip(scores[: len(scores) // 2], scores[len(scores) // 2 :], strict=True)
        # (..., N, 1) against (..., 1, K)
        signs = [np.sign(x[..., :, None] - y[..., None, :]).mean((-2, -1)) for x, y in pairs]
        return (1 + np.mean(signs, axis=0)) / 2

    return Interval(*_over_seeds([*samples[0], *samples[1]], statistic).tolist())


def performance_profile(tasks: Sequence[ArrayLike], thresholds: ArrayLike) -> list[Interval]:
    """For each threshold, the share of runs that score above it, averaged over tasks (section 4.2 of the paper).

    This is the paper's run-score distribution; the intervals, seeds resampled within each task, hold for one threshold
    at a time.

    Args:
        tasks: For each task, float (seeds,), comparable between tasks.
        thresholds: float (thresholds,).

    Raises:
        ValueError: No task, or one whose scores are not as above.
    """
    levels = np.asarray(thresholds, dtype=np.float64)

    def statistic(*scores: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([(x > levels.reshape(-1, *[1] * x.ndim)).mean(axis) for x in scores], axis=0)

    return [Interval(*level) for level in _over_seeds(_samples("tasks", tasks), statistic).T.tolist()]


def learning_curve(scores: ArrayLike) -> list[Interval]:
    """For each point of a curve, the interquartile mean over seeds; its intervals hold for one point at a time.

    Args:
        scores: float (points, seeds).

    Raises:
        ValueError: Scores are not as above.
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"scores must be finite and have shape (points, seeds), got {scores!r}")
    return [Interval(*point) for point in _over_seeds([array], _iqm, resamples=1_000).T.tolist()]


def ratio(first: ArrayLike, second: ArrayLike) -> Interval:
    """Ratio of two algorithms' geometric means over seeds, of a metric that is positive, each one's seeds resampled.

    Args:
        first: float (seeds,), above 0.
        second: The other algorithm's, above 0.

    Raises:
        ValueError: Values are not as above.
    """
    samples = _samples("first and second", [first, second])
    if min(sample.min() for sample in samples) <= 0:
        raise ValueError(f"first and second must be above 0, got {first!r} and {second!r}")
    logs = [np.log(sample) for sample in samples]
    return Interval(*np.exp(_over_seeds(logs, lambda x, y, axis: x.mean(axis) - y.mean(axis))).tolist())


class PromptBootstrap:
    """Mean rewards of runs on the same test prompts, and those means on resampled prompts.

    A prompt that is easy is easy for all; resampling prompts, and the rewards of all runs with each, takes this common
    part out of a difference between two of them. A prompt is resampled for all seeds together: what it does to a
    difference they have in common, and one drawn for each seed anew would pass for so many more prompts.

    Args:
        rewards: float (runs, prompts), two or more prompts.
        seed: Seed of the resampling.

    Raises:
        ValueError: Another shape, fewer than two prompts, or a value that is not finite.
    """

    def __init__(self, rewards: ArrayLike, *, seed: int = 0) -> None:
        array = np.asarray(rewards, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] < 2 or array.size == 0:
            raise ValueError(f"rewards must have shape (runs, prompts) with two or more prompts, got {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"rewards must be finite, got {int((~np.isfinite(array)).sum())} values that are not")
        self._means = array.mean(1)
        self._resampled = stats.bootstrap(
            (array,),
            np.mean,
            axis=1,
            n_resamples=RESAMPLES,
            batch=max(1, 10_000_000 // array.size),
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution

    def difference(self, first: Sequence[int], second: Sequence[int]) -> Interval:
        """Mean difference between runs of one algorithm and runs of another.

        The interval speaks of these policies on other prompts, not of policies that other seeds would have given.

        Args:
            first: Rows of `rewards`.
            second: As many: the other algorithm's runs with the same seeds, in the same order.
        """
        means = self._means[first] - self._means[second]
        resampled = (self._resampled[first] - self._resampled[second]).mean(0)
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(float(means.mean()), float(low), float(high))


@lru_cache
def coverage(seeds: int) -> float:
    """How often `interquartile_mean` of one task's runs holds the true mean, where scores are normal: by simulation.

    A bootstrap of few values cannot go beyond them, so that its intervals are too narrow.

    Args:
        seeds: Number of runs, at least 2.

    Returns:
        A probability, to about 0.01, where 0.95 is aimed at.
    """
    rng = np.random.default_rng(0)
    result = stats.bootstrap(
        (rng.normal(size=(4_000, seeds)),), _iqm, axis=1, n_resamples=1_000, batch=100, method="percentile", rng=rng
    )
    interval = result.confidence_interval
    return float(((interval.low <= 0) & (interval.high >= 0)).mean())


def _iqm(*samples: np.ndarray, axis: int) -> np.ndarray:
    return stats.trim_mean(np.concatenate(samples, axis=axis), 0.25, axis=axis)


def _over_seeds(
    samples: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], resamples: int = RESAMPLES
) -> np.ndarray:
    """A statistic of strata, each resampled by itself: its value and the ends of its interval, (3, ...)."""
    value = statistic(*samples, axis=-1)
    if min(sample.shape[-1] for sample in samples) < 2:
        return np.stack([value, np.full_like(value, np.nan), np.full_like(value, np.nan)])
    interval = stats.bootstrap(
        samples,
        statistic,
        axis=-1,
        vectorized=True,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return np.stack([value, interval.low, interval.high])


def _samples(name: str, samples: Sequence[ArrayLike]) -> list[np.ndarray]:
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not arrays or any(array.ndim != 1 or not array.size or not np.isfinite(array).all() for array in arrays):
        raise ValueError(f"{name} must be one or more arrays of finite scores, one a seed, got {samples!r}")
    return arrays
