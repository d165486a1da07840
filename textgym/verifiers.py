"""A text environment's task as a taskset of `verifiers` (0.4): its prompts, and its reward.

.. code-block:: python

    tasks = taskset("textgym/CommonGen-v0", split="validation")

or, as a plugin that the commands of verifiers find by its name, a module ``my_tasks.py``:

.. code-block:: python

    from textgym.verifiers import TextTaskset

    __all__ = ["TextTaskset"]
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
from pydantic import Field, field_validator

from textgym.engine import TextVectorEnv
from textgym.packages import require
from textgym.rewards import split_parts
from textgym.trl import engine_of, prompt_dataset

try:
    import verifiers.v1 as vf
except ImportError:
    require("verifiers", "textgym.verifiers", "verifiers")
    raise

__all__ = ["TextTaskset"]  # a plugin exports one taskset


class TextTasksetConfig(vf.TasksetConfig):
    """Which environment a taskset has the prompts and the reward of.

    Attributes:
        env: Its id.
        arguments: Further arguments of `gymnasium.make`, which JSON can hold: ``split``, ``source``, ``template``,
            ``stop``, ``reward``, those of the task.
    """

    env: str = ""
    arguments: dict[str, Any] = Field(default_factory=dict)

    @field_validator("arguments")
    @classmethod
    def _is_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        return json.loads(_as_json(value))


class TextTaskData(vf.TaskData):
    """One sample of an environment; also what another process makes the task of.

    Attributes:
        env: The environment's id.
        arguments: Its arguments.
        task_prompt: The prompt without the template, as the reward reads it.
        references: The sample's reference texts.
    """

    env: str
    arguments: dict[str, Any]
    task_prompt: str
    references: list[str]


class TextTask(vf.Task[TextTaskData, vf.State, vf.TaskConfig]):
    """One sample, to be answered in one message."""

    @vf.reward
    async def reward(self, trace: vf.Trace) -> dict[str, float]:
        """The parts of the environment's reward for the last message: as it stands, up to a string of ``stop``."""
        data, engine = self.data, _engine(self.data.env, _as_json(self.data.arguments))
        text = trace.root_reply  # of the main agent, where there are several
        if text is None:
            messages = trace.assistant_messages
            text = (messages[-1].content if messages else None) or ""
        for string in engine.stop:
            text = text.partition(string)[0]
        values = engine.reward_function(
            prompts=[data.task_prompt], completions=[text], references=[tuple(data.references)]
        )
        _, parts = split_parts(values, 1)
        return {name: float(part[0]) for name, part in parts.items()}


class TextTaskset(vf.Taskset[TextTask, TextTasksetConfig]):
    """The samples of an environment's split, in the order of its data.

    Raises:
        ValueError: There is no such environment, it is not of this package, or its arguments are wrong.
    """

    def __init__(self, config: TextTasksetConfig) -> None:
        super().__init__(config)
        self._env = _engine(config.env, _as_json(config.arguments))

    def load(self) -> Iterator[TextTask]:
        """Yield the tasks: a user's message with the prompt in the environment's template."""
        for row in prompt_dataset(self._env):
            data = TextTaskData(
                id=f"{self._env.split}-{row['sample_id']}",
                name=self._env.task.name,
                prompt=self._env.template.format(prompt=row["task_prompt"]),
                env=self.config.env,
                arguments=self.config.arguments,
                task_prompt=row["task_prompt"],
                references=row["references"],
            )
            yield TextTask(data, self.config.task)


def taskset(env: str, **arguments: Any) -> TextTaskset:
    """The taskset of an environment.

    Args:
        env: Its id.
        **arguments: As for `gymnasium.make`.

    Raises:
        ValueError: As for `TextTaskset`, or an argument that JSON cannot hold.
    """
    return TextTaskset(TextTasksetConfig(env=env, arguments=arguments))


def _as_json(arguments: dict[str, Any]) -> str:
    try:
        return json.dumps(arguments, sort_keys=True)
    except TypeError as error:
        raise ValueError(f"arguments must be what JSON can hold, ids and paths for objects: {error}") from None


@functools.lru_cache(maxsize=8)
def _engine(env: str, arguments: str) -> TextVectorEnv:
    """The environment, made once in a process: its tasks travel between processes without it."""
    try:
        made = gym.make(env, disable_env_checker=True, **json.loads(arguments))
    except gym.error.Error as error:
        raise ValueError(f"env must be the id of an environment, got {env!r}: {error}") from error
    return engine_of(made)
