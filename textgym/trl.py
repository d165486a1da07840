"""An environment's prompts and reward for the trainers of TRL, such as `GRPOTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.rewards import split_parts

if TYPE_CHECKING:
    import datasets


def prompt_dataset(env: gym.Env | VectorEnv) -> datasets.Dataset:
    """The prompts of an environment's split, in the order of its data.

    TRL encodes a truncated prompt again from its text, so tokens beside the cut can differ from the environment's.

    Args:
        env: A text environment, single or vector. Its guide takes no part.

    Returns:
        A dataset with the columns ``prompt`` (what the policy reads: str, or with ``chat=True`` the user's message in a
        list), ``task_prompt`` (str, without the template), ``references`` (list of str) and ``sample_id`` (int). Its
        ``info.description`` names the task, split and source, and the fingerprint of the data.

    Raises:
        ValueError: `env` is not a text environment.
    """
    from datasets import Dataset, DatasetInfo

    engine = _engine(env)
    task, data = engine.task, engine.data
    prompts = [text for text, _ in engine.encode_prompts([task.prompt_of(row) for row in data.rows])]
    shown: list[Any] = [engine.in_template(text) for text in prompts]
    if engine.chat:  # whose template TRL applies itself
        shown = [[{"role": "user", "content": engine.template.format(prompt=text)}] for text in prompts]
    description = f"{task.name}, split {engine.split!r} of source {engine.source!r}, fingerprint {data.fingerprint}"
    return Dataset.from_dict(
        {
            "prompt": shown,
            "task_prompt": prompts,
            "references": [list(task.references_of(row)) for row in data.rows],
            "sample_id": list(range(len(data))),
        },
        info=DatasetInfo(description=description),
    )


def reward_function(env: gym.Env | VectorEnv) -> Callable[..., list[float]]:
    """The reward of an environment, as a reward function of TRL.

    A text ends where its episode would, at an end-of-sequence token, a string of ``stop`` or after T tokens, whatever
    follows.

    Args:
        env: A text environment, single or vector.

    Returns:
        A function of ``prompts``, ``completions``, ``completion_ids``, ``task_prompt`` and ``references``, which logs
        the parts of the reward with ``log_metric`` and ignores the rest of TRL's keyword arguments. TRL logs it under
        the name of the task. It raises ValueError where ids and texts show that the trainer's tokenizer is not the
        environment's.

    Raises:
        ValueError: `env` is not a text environment.
    """
    engine = _engine(env)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        task_prompt: Sequence[str],
        references: Sequence[Sequence[str]],
        log_metric: Callable[[str, float], None] | None = None,
        **_: Any,
    ) -> list[float]:
        ids = [list(text) for text in completion_ids]
        if not engine.chat and list(completions) != engine.tokenizer.batch_decode(ids, skip_special_tokens=True):
            raise ValueError(
                "completion_ids must be tokens of the environment's tokenizer, got ids that are other texts in it: "
                "give the trainer processing_class=env.unwrapped.tokenizer, or make the environment with tokenizer="
            )
        values = engine.reward_function(
            prompts=list(task_prompt),
            completions=engine.texts(ids, list(task_prompt)),
            references=[tuple(texts) for texts in references],
        )
        total, parts = split_parts(values, len(ids))
        if log_metric is not None and len(parts) > 1:
            for name, part in parts.items():
                log_metric(f"rewards/{engine.task.name}/{name}", float(part.mean()))
        return total.tolist()

    reward.__name__ = engine.task.name
    return reward


def _engine(env: gym.Env | VectorEnv) -> TextVectorEnv:
    inside = env.unwrapped
    engine = inside.engine if isinstance(inside, TextEnv) else inside
    if not isinstance(engine, TextVectorEnv):
        raise ValueError(f"env must be a text environment of this package, got {env!r}")
    return engine
