"""Rewards of finished texts."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from inspect import signature
from typing import Any

import numpy as np

from textgym.checks import check_place
from textgym.rewards.base import RewardFunction, Rewards

__all__ = ["RewardFunction", "Rewards", "check_reward", "load_reward", "split_parts"]


def check_reward(reward: str | os.PathLike[str] | RewardFunction | None, named: Collection[str]) -> None:
    """Check the environment's argument `reward` without loading or training anything.

    Args:
        reward: None for the task's own; a name in `named`; a hub id ("owner/name") or a folder of a
            sequence-classification model; or a function on batches.
        named: The names of the task's rewards.

    Raises:
        ValueError: `reward` is none of these, or a function that does not take the arguments of one.
    """
    if callable(reward):
        try:
            signature(reward).bind(prompts=[], completions=[], references=[])
        except TypeError as error:
            raise ValueError(
                "reward must be a function of the keyword arguments prompts, completions and references, got "
                f"{getattr(reward, '__name__', reward)!r}: {error}"
            ) from None
        except ValueError:  # a builtin does not say what it takes
            pass
        return
    if reward is None or (isinstance(reward, str) and reward in named):
        return
    path = isinstance(reward, os.PathLike) or (isinstance(reward, str) and ("/" in reward or os.path.isdir(reward)))
    if not path:
        raise ValueError(
            f"reward must be None, one of {sorted(named)}, a hub id 'owner/name' or a folder of a "
            f"sequence-classification model, or a function on batches, got {reward!r}"
        )
    check_place("reward", reward, "a sequence-classification model")  # type: ignore[arg-type]


def load_reward(
    reward: str | os.PathLike[str] | RewardFunction, named: Mapping[str, Callable[[str], RewardFunction]], source: str
) -> RewardFunction:
    """Return a reward as a function; those that are `named` are functions of the data source.

    Raises:
        ValueError: It is none of those that `check_reward` allows.
    """
    check_reward(reward, named)
    if not isinstance(reward, str | os.PathLike):
        return reward
    if isinstance(reward, str) and reward in named:
        return named[reward](source)
    from textgym.rewards.classifier import ModelReward

    return ModelReward(os.fspath(reward))


def split_parts(values: Rewards, n: int, name: str = "reward") -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Check the values of a reward function and return their total and parts.

    Args:
        values: N floats, or a mapping from part names to N floats.
        n: The number of texts that were scored.
        name: The name of the reward in errors.

    Returns:
        The sum of the parts, float64 (n,), and each part, float64 (n,); without parts, one part "reward".

    Raises:
        ValueError: A value is not a finite number, there are not n of them, or there is no part.
    """
    named: Mapping[Any, Any] = values if isinstance(values, Mapping) else {"reward": values}
    if not named:
        raise ValueError(f"{name} must return {n} numbers or named parts, got an empty mapping")
    parts = {}
    for part, numbers in named.items():
        try:
            array = np.asarray(numbers)
            # Strings and dates would be converted, too.
            if array.dtype.kind not in "biufO" or any(isinstance(value, str | bytes) for value in array.flat):
                raise TypeError(f"{array.dtype} is no type of numbers")
            array = array.astype(np.float64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must return {n} numbers, part {part!r} is a {type(numbers).__name__}") from error
        if array.shape != (n,):
            raise ValueError(f"{name} must return {n} numbers, part {part!r} has shape {array.shape}")
        if not np.isfinite(array).all():
            row = int(np.flatnonzero(~np.isfinite(array))[0])
            raise ValueError(f"{name} must return finite numbers, part {part!r} is {array[row]} for text {row}")
        parts[str(part)] = array
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(list(parts.values()), axis=0)
    if not np.isfinite(total).all():
        row = int(np.flatnonzero(~np.isfinite(total))[0])
        raise ValueError(f"{name} must have a finite sum of its parts {sorted(parts)}, got {total[row]} for text {row}")
    return total, parts
