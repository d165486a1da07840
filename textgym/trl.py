"""An environment's prompts and reward for the trainers of TRL, such as `GRPOTrainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from textgym.checks import check
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.rewards import Rewards, split_parts
from textgym.seeding import hash64

if TYPE_CHECKING:
    import datasets
    import trl


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

    engine = engine_of(env)
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
        the name of the task. After `agents.trl.GroupRollouts`, whose episodes were already paid, it returns what they
        were paid and logs what is said of them. It raises ValueError where ids and texts show that the trainer's
        tokenizer is not the environment's.

    Raises:
        ValueError: `env` is not a text environment.
    """
    engine = engine_of(env)

    def reward(
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        task_prompt: Sequence[str] = (),
        references: Sequence[Sequence[str]] = (),
        environments: Sequence[GroupMember] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        reward_parts: Sequence[Mapping[str, float]] | None = None,
        rollout_metrics: Sequence[Mapping[str, float]] | None = None,
        **_: Any,
    ) -> list[float]:
        ids = [list(text) for text in completion_ids]
        if environments is not None:
            task_prompt = [member.task_prompt for member in environments]
            references = [member.references for member in environments]
        if not engine.chat and list(completions) != engine.tokenizer.batch_decode(ids, skip_special_tokens=True):
            raise ValueError(
                "completion_ids must be tokens of the environment's tokenizer, got ids that are other texts in it: "
                "give the trainer processing_class=env.unwrapped.tokenizer, or make the environment with tokenizer="
            )
        if reward_parts is not None:
            values: Rewards = {name: [row[name] for row in reward_parts] for name in reward_parts[0]}
        else:
            values = engine.reward_function(
                prompts=list(task_prompt),
                completions=engine.texts(ids, list(task_prompt)),
                references=[tuple(texts) for texts in references],
            )
        total, parts = split_parts(values, len(ids))
        metrics = {f"rewards/{engine.task.name}/{name}": part for name, part in parts.items()} if len(parts) > 1 else {}
        if rollout_metrics is not None:
            metrics |= {name: np.array([row[name] for row in rollout_metrics]) for name in rollout_metrics[0]}
        if log_metric is not None:
            for name, values_of in metrics.items():
                log_metric(name, float(values_of.mean()))
        return total.tolist()

    reward.__name__ = engine.task.name
    return reward


class GroupMember:
    """One of the environments between which `environment_factory` shares the starts of groups.

    Attributes:
        task_prompt: The prompt of its episode, without the template.
        references: The sample's reference texts.
    """

    def __init__(self, starts: _GroupStarts, number: int) -> None:
        self._starts, self._number = starts, number
        self.task_prompt, self.references = "", tuple[str, ...]()

    def reset(self, task_prompt: str | None = None, references: Sequence[str] = (), **_: Any) -> str | None:
        """Begin an episode.

        Args:
            task_prompt: Of a row of `prompt_dataset`, whose prompt the message already has; None to draw a sample.
            references: The reference texts of that row.

        Returns:
            What the policy is to read: the prompt in the template, and the guide's prefix as a hint.
        """
        if self._number == 0:
            self._starts.begin_batch()
        if task_prompt is not None:
            self.task_prompt, self.references = task_prompt, tuple(references)
            return None
        shown, self.task_prompt, self.references = self._starts.of_group(self._number)
        return shown


class _GroupStarts:
    """The starts of the groups of a batch. The trainer resets its environments in the order of their making."""

    def __init__(self, env: TextEnv, args: trl.GRPOConfig, hint: str) -> None:
        given: Any = args
        self.env, self.hint, self.group_size = env, hint, given.num_generations
        self.seeds, self.batches, self.members = (given.seed, given.process_index), 0, 0
        self.starts: dict[int, tuple[str, str, tuple[str, ...]]] = {}

    def make(self) -> GroupMember:
        self.members += 1
        return GroupMember(self, self.members - 1)

    def begin_batch(self) -> None:
        self.batches += 1
        self.starts = {}

    def of_group(self, number: int) -> tuple[str, str, tuple[str, ...]]:
        """The text that the policy reads, and the prompt and references of the sample."""
        group = number // self.group_size
        if group not in self.starts:
            _, info = self.env.reset(seed=int(hash64(*self.seeds, self.batches, group)))
            prompt = info["prompt"]
            shown = self.env.engine.template.format(prompt=prompt)
            if info["prefix_length"]:
                (prefix,) = self.env.engine.reward_arguments([0])["completions"]
                shown += self.hint.format(prefix=prefix.strip())
            self.starts[group] = shown, prompt, info["references"]
        return self.starts[group]


def environment_factory(
    env: gym.Env, args: trl.GRPOConfig, *, hint: str = "\nBegin with: {prefix}"
) -> Callable[[], GroupMember]:
    """Environments for `GRPOTrainer` that own the data: the members of a group share sample and prefix.

    Without a dataset the trainer resets one environment for each text and gives none of them a seed, so that those of a
    group would start differently. Here samples and prefixes are drawn once for a group. A prefix, where the
    environment's guidance draws one, is shown in the user's message: it is a hint, and the policy writes the whole
    text. Rows of a dataset, as in evaluations, are played without the guide. The tokens are those of the trainer, which
    applies the chat template.

    Args:
        env: A single text environment with ``chat=True``.
        args: The trainer's arguments.
        hint: What is added to the message where there is a prefix.

    Returns:
        What makes an environment. Their reward is `reward_function` of `env`.

    Raises:
        ValueError: `env` is not a single text environment with ``chat=True``, `hint` has no ``{prefix}``, or a group
            is spread over processes.
    """
    inside = env.unwrapped
    if not isinstance(inside, TextEnv):
        raise ValueError(f"env must be a single text environment of this package (gym.make), got {env!r}")
    if not inside.engine.chat:
        raise ValueError("env must be made with chat=True: trl's environments speak in messages")
    check("hint", hint, "{prefix}" in hint, "a text with {prefix}")
    texts_per_process(args)
    return _GroupStarts(inside, args, hint).make


def texts_per_process(args: trl.GRPOConfig) -> int:
    """How many texts each process of a `GRPOTrainer` writes before it learns.

    Raises:
        ValueError: Not all are texts of whole groups.
    """
    given: Any = args  # whose types allow None where there is none any more
    texts, size = given.per_device_train_batch_size * given.steps_per_generation, given.num_generations
    whole = f"a multiple of num_generations={size}: a group has one start, in one process"
    check("per_device_train_batch_size * steps_per_generation", texts, texts % size == 0, whole)
    return texts


def engine_of(env: gym.Env | VectorEnv) -> TextVectorEnv:
    """The vector environment that runs the episodes of an environment.

    Raises:
        ValueError: `env` is not a text environment.
    """
    inside = env.unwrapped
    engine = inside.engine if isinstance(inside, TextEnv) else inside
    if not isinstance(engine, TextVectorEnv):
        raise ValueError(f"env must be a text environment of this package, got {env!r}")
    return engine
