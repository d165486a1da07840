"""What the test prompts can and cannot tell apart."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Interval(NamedTuple):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low > 0 or self.high < 0


def mean_interval(rewards: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean reward over test prompts, with a percentile bootstrap interval (Efron and Tibshirani 1993, chapter 13).

    Seeds are averaged prompt by prompt first, so the interval speaks of other prompts, not of other training seeds.

    Args:
        rewards: float (prompts,) or (seeds, prompts), at least two prompts.
        confidence: Coverage aimed at, in (0, 1).
        resamples: Bootstrap resamples of the prompts.
        seed: Seed of the resampling.

    Raises:
        ValueError: Another shape, fewer than two prompts, or a value that is not finite.
    """
    per_prompt = _per_prompt("rewards", rewards)
    result = stats.bootstrap(
        (per_prompt,),
        np.mean,
        n_resamples=resamples,
        batch=1_000,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = result.confidence_interval
    return Interval(float(per_prompt.mean()), float(interval.low), float(interval.high))


def paired_difference(
    rewards: ArrayLike, baseline: ArrayLike, *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Mean of `rewards` - `baseline` on the same prompts, with a paired bootstrap interval over the prompts.

    A prompt that is easy is easy for both algorithms; resampling prompts, and the pair of rewards with each, takes
    that common part out of the interval.

    Args:
        rewards: float (prompts,) or (seeds, prompts).
        baseline: The other algorithm's rewards; column i is the same prompt. The number of seeds may differ.
        confidence: Coverage aimed at, in (0, 1).
        resamples: Bootstrap resamples of the prompts.
        seed: Seed of the resampling.

    Raises:
        ValueError: The prompts differ in number, or one of the arrays is not as `mean_interval` wants it.
    """
    first, second = _per_prompt("rewards", rewards), _per_prompt("baseline", baseline)
    if first.shape != second.shape:
        raise ValueError(
            f"rewards and baseline must be on the same prompts, got {first.size} prompts and {second.size}"
        )
    return mean_interval(first - second, confidence=confidence, resamples=resamples, seed=seed)


def _per_prompt(name: str, rewards: ArrayLike) -> np.ndarray:
    """Average (seeds, prompts) over the seeds."""
    array = np.asarray(rewards, dtype=np.float64)
    if array.ndim not in (1, 2) or array.shape[-1] < 2 or array.size == 0:
        raise ValueError(
            f"{name} must have shape (prompts,) or (seeds, prompts) with two or more prompts, got {array.shape}"
        )
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} values that are not")
    return np.atleast_2d(array).mean(axis=0)
