"""Speed of environments, and of starting."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks.performance import workload
from benchmarks.performance.measurement import Measurement
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv

EPISODES = {1: 100, 64: 60, 1024: 12}  # by the number of rows of a vector environment


def environments() -> Iterator[Measurement]:
    """Steps of environments with random actions, resets included, without reward model and guide."""
    arguments: Any = {"task": workload.task(), "tokenizer": workload.tokenizer()}
    random = np.random.default_rng(0)

    def stepper(env: Any, episodes: int) -> Callable[[], float]:
        rows = getattr(env, "num_envs", None)
        env.reset(seed=0)
        upper = int((env.action_space if rows is None else env.single_action_space).n)
        actions = random.integers(0, upper, (episodes * workload.NEW, *(() if rows is None else (rows,))))

        def steps() -> float:
            for action in actions:
                result = env.step(action)
                if rows is None and result[2]:
                    env.reset()
            return float(actions.size)

        return steps

    def sync(rows: int) -> Any:
        return gym.vector.SyncVectorEnv([lambda: TextEnv(**arguments)] * rows)

    single = stepper(TextEnv(**arguments), 100)
    yield Measurement("env_single", "steps/s", single, stepper(sync(1), 50), "SyncVectorEnv")
    for rows, episodes in EPISODES.items():
        ours = stepper(TextVectorEnv(rows, **arguments), episodes)
        reference = stepper(sync(rows), max(1, 40 // rows))
        yield Measurement(f"env_vector_{rows}", "steps/s", ours, reference, f"SyncVectorEnv of {rows}")
        cartpole = stepper(gym.make_vec("CartPole-v1", rows, vectorization_mode="vector_entry_point"), episodes)
        yield Measurement(f"cartpole_vector_{rows}", "steps/s", cartpole, None, "", "for scale: another task")


def starting() -> Iterator[Measurement]:
    """Starting Python, importing textgym and `gym.make`, in a new process."""

    def make() -> float:
        program = "import gymnasium, textgym; gymnasium.make('textgym/IMDB-v0')"
        subprocess.run([sys.executable, "-c", program], check=True)
        return 1.0

    yield Measurement("cold_start", "s", make, None, "", "gym.make of IMDB, tokenizer cached")
