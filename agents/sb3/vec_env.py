"""The native vector environment as one of Stable-Baselines3."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecEnv

from textgym.engine import TextVectorEnv
from textgym.env import row_info

# Methods of a TextVectorEnv that return one entry per row.
_ROW_METHODS = ("action_masks", "render")


class TextVecEnv(VecEnv):
    """A `TextVectorEnv` as a vector environment of Stable-Baselines3, which keeps its batching.

    All rows take a step together, and rows that end on the same step are rewarded in one batch. Results are those of
    a `DummyVecEnv` over as many single environments with the same seeds: an episode that ends is replaced by the next
    one within the step, its last observation is ``info["terminal_observation"]``, and since no episode is ever
    truncated, ``info["TimeLimit.truncated"]`` is False. The last info of an episode has ``info["episode"]``, as that
    of a `Monitor` has: its return, the number of its actions, and the seconds since the environment was made.

    Args:
        env: The environment.

    Raises:
        ValueError: `env` is not a `TextVectorEnv`, has rows that are not always live (``parking=True``,
            ``order="sequential"``), resets itself within a step, or returns views (``copy=False``).
    """

    def __init__(self, env: TextVectorEnv) -> None:
        if not isinstance(env, TextVectorEnv):
            raise ValueError(f"env must be a TextVectorEnv without wrappers, as of gymnasium.make_vec, got {env!r}")
        for name, value, why in (
            ("parking", False, "Stable-Baselines3 learns from every row of every step"),
            ("order", "random", "the end of a sequential pass leaves rows idle, which Stable-Baselines3 does not know"),
            ("copy", True, "Stable-Baselines3 stores an observation after the next step"),
        ):
            if getattr(env, name) != value:
                raise ValueError(f"env must be made with {name}={value!r}, got {getattr(env, name)!r}: {why}")
        if env.watches_entropy:
            raise ValueError("env must be made without Guidance.handoff_entropy: Stable-Baselines3 tells no entropies")
        if env.autoreset_mode == AutoresetMode.SAME_STEP:
            raise ValueError("env must be made with autoreset_mode NEXT_STEP or DISABLED, got SAME_STEP")
        self.env = env
        self._started = time.perf_counter()
        self._returns: np.ndarray = np.zeros(env.num_envs)
        self._actions_taken: np.ndarray = np.zeros(env.num_envs, np.int64)
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    def reset(self) -> dict[str, np.ndarray]:  # type: ignore[override]
        """Start an episode in every row, with the seeds of `seed` and the options of `set_options`."""
        names = {name for options in self._options for name in options}
        observation, infos = self.env.reset(
            seed=None if all(seed is None for seed in self._seeds) else self._seeds,
            options={name: [options.get(name) for options in self._options] for name in names},
        )
        self.reset_infos = [row_info(infos, row) for row in range(self.num_envs)]
        self._returns[:], self._actions_taken[:] = 0, 0
        self._reset_seeds()
        self._reset_options()
        return observation

    def step_async(self, actions: np.ndarray) -> None:
        """Store the next actions (N,)."""
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:  # type: ignore[override]
        """Write one token in every row, and replace the episodes that ended.

        Returns:
            Observations, rewards (float32 (N,)), dones (bool (N,)) and one info per row.
        """
        # An episode that ended must not be lost where the guide fails in the reset after it.
        with self.env.all_or_nothing():
            observation, rewards, dones, _, infos = self.env.step(self._actions)
            row_infos = [{**row_info(infos, row), "TimeLimit.truncated": False} for row in range(self.num_envs)]
            if dones.any():
                last, (observation, infos) = observation, self.env.reset(options={"reset_mask": dones})
        self._returns += rewards
        self._actions_taken += 1
        if dones.any():
            seconds = round(time.perf_counter() - self._started, 6)
            for row in np.flatnonzero(dones).tolist():
                total, length = float(self._returns[row]), int(self._actions_taken[row])
                row_infos[row]["episode"] = {"r": round(total, 6), "l": length, "t": seconds}
                row_infos[row]["terminal_observation"] = {name: ids[row].copy() for name, ids in last.items()}
                self.reset_infos[row] = row_info(infos, row)
            self._returns[dones], self._actions_taken[dones] = 0, 0
        return observation, rewards.astype(np.float32), dones, row_infos

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """There are none: texts are rendered as text."""
        return [None] * self.num_envs

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """The attribute's value for each row, as its single environment would have it.

        Raises:
            AttributeError: There is no such attribute.
        """
        rows = list(self._get_indices(indices))
        if attr_name in _ROW_METHODS:
            return [partial(self._call_for_row, attr_name, row) for row in rows]
        if attr_name in ("action_space", "observation_space"):
            attr_name = f"single_{attr_name}"
        value = getattr(self.env, attr_name)
        if attr_name == "guidance" and isinstance(value, tuple):
            return [value[row] for row in rows]
        return [value] * len(rows)

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Set an attribute of the environment.

        Raises:
            ValueError: `indices` are not all rows, which share one environment.
        """
        if set(self._get_indices(indices)) != set(range(self.num_envs)):
            raise ValueError(f"indices must be None or all rows, which share their attributes, got {indices!r}")
        setattr(self.env, attr_name, value)

    def env_method(
        self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any
    ) -> list[Any]:
        """Call a method of the environment once, and return each row's part of the result.

        Raises:
            AttributeError: The method is none of those that return one entry per row.
        """
        if method_name not in _ROW_METHODS:
            raise AttributeError(f"method_name must be one of {list(_ROW_METHODS)}, got {method_name!r}")
        result = getattr(self.env, method_name)(*args, **kwargs)
        return [None if result is None else result[row] for row in self._get_indices(indices)]

    def _call_for_row(self, name: str, row: int, *args: Any, **kwargs: Any) -> Any:
        return self.env_method(name, *args, indices=row, **kwargs)[0]

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper], indices: int | Iterable[int] | None = None
    ) -> list[bool]:
        """Whether rows are wrapped: never, but they report episodes as a `Monitor` does."""
        return [issubclass(wrapper_class, Monitor) for _ in self._get_indices(indices)]
