"""What a task asks for and what its reward pays, in the words of its environment's page."""

from __future__ import annotations

import inspect

import gymnasium as gym
from gymnasium.envs.registration import load_env_creator

from textgym.env import TextEnv


def about(env_id: str) -> str:
    """The first line of an environment's page and the first paragraph of its "Rewards"; "" where nothing is said.

    A task that `textgym.register` made an environment has no page: then the docstring of its reward says it, if that is
    a function.

    Args:
        env_id: The environment, whose module has been imported; "package.module:id" or its id.
    """
    spec = gym.spec(env_id.rpartition(":")[2])
    assert spec.entry_point is not None
    environment = load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point
    if environment is TextEnv:
        reward = spec.kwargs["task"].reward
        said = inspect.getdoc(reward) if inspect.isroutine(reward) else None
        title, pays = "", [(said or "").partition("\n\n")[0]]
    else:
        title, *sections = (inspect.getdoc(environment) or "").split("\n\n")
        pays = [section.partition("\n")[2].strip() for section in sections if section.startswith("Rewards\n")]
    parts = [title, *(f"Reward: {text[0].lower()}{text[1:]}" for text in pays if text)]
    return " ".join(" ".join(parts).replace("``", "").replace("`", "").split())
