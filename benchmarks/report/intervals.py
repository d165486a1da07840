"""Estimates with bootstrap intervals, after Agarwal et al. 2021 (arXiv 2108.13264).

There are two ways to resample. Over seeds, for "would other training seeds give the same result?": each run has one
score, and seeds are resampled within each task (`interquartile_mean`, `probability_of_improvement`,
`performance_profile`, `ratio`). Over prompts, for "would other test prompts give the same result for these policies?":
each prompt has one reward, and prompts are resampled (`PromptBootstrap`).

All intervals are percentile bootstraps (Efron and Tibshirani 1993, chapter 13); `coverage` simulates how often they
hold the true value. Scores of a task are float (seeds,), one for each run; scores of another shape, or that are not
finite, raise ValueError.
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
    """An estimate and its confidence interval, whose ends are NaN if there is nothing to resample."""

    value: float
    low: float
    high: float

    def against(self, other: Interval | float) -> Verdict:
        """Whether the whole interval lies above or below a number or another whole interval."""
        low, high = (other.low, other.high) if isinstance(other, Interval) else (other, other)
        return "above" if self.low > high else "below" if self.high < low else "not told apart"

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
    return Interval(*_over_seeds(_samples("tasks", tasks), _iqm).tolist())


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

    def statistic(*scores: np.ndarray, axis: int) -> np.ndarray:
        pairs = zip(scores[: len(scores) // 2], scores[len(scores) // 2 :], strict=True)
        # (..., N, 1) against (..., 1, K)
        signs = [np.sign(x[..., :, None] - y[..., None, :]).mean((-2, -1)) for x, y in pairs]
        return (1 + np.mean(signs, axis=0)) / 2

    return Interval(*_over_seeds([*samples[0], *samples[1]], statistic).tolist())


def performance_profile(tasks: Sequence[ArrayLike], thresholds: ArrayLike) -> list[Interval]:
    """For each threshold, the share of runs that score above it, averaged over tasks: the paper's section 4.2.

    The intervals, seeds resampled within each task, hold for one threshold at a time.

    Args:
        tasks: One task's scores or more, comparable between tasks.
        thresholds: float (thresholds,).
    """
    levels = np.asarray(thresholds, dtype=np.float64)

    def statistic(*scores: np.ndarray, axis: int) -> np.ndarray:
        return np.mean([(x > levels.reshape(-1, *[1] * x.ndim)).mean(axis) for x in scores], axis=0)

    return [Interval(*level) for level in _over_seeds(_samples("tasks", tasks), statistic).T.tolist()]


def learning_curve(scores: ArrayLike) -> list[Interval]:
    """For each point of a curve, the interquartile mean over seeds; its intervals hold for one point at a time.

    Args:
        scores: float (points, seeds).
    """
    array = np.asarray(scores, dtype=np.float64)
    if array.ndim != 2 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"scores must be finite and have shape (points, seeds), got {scores!r}")
    return [Interval(*point) for point in _over_seeds([array], _iqm, resamples=1_000).T.tolist()]


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
    logs = [np.log(sample) for sample in samples]
    return Interval(*np.exp(_over_seeds(logs, lambda x, y, axis: x.mean(axis) - y.mean(axis))).tolist())


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

        The interval is about these policies on other prompts, not about policies trained with other seeds.

        Args:
            first: Rows of `rewards`, one per run of the first algorithm.
            second: Rows of the other algorithm's runs with the same seeds, in the same order.
        """
        means = self._means[first] - self._means[second]
        resampled = (self._resampled[first] - self._resampled[second]).mean(0)
        low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
        return Interval(float(means.mean()), float(low), float(high))


@lru_cache
def coverage(seeds: int) -> float:
    """Simulate how often the interval of `interquartile_mean` on one task holds the true mean of normal scores.

    Returns a probability to about 0.01, nominally 0.95, for two `seeds` or more. A bootstrap never goes beyond the
    values it resamples, so that with few of them its intervals are too narrow.
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
    """A statistic of samples, each resampled independently: its value and the ends of its interval, (3, ...)."""
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
