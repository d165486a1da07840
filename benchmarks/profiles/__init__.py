"""Profiles: what a benchmark runs, and how large; one small file each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class LanguageModel:
    """A small GPT-2, trained from scratch on a task's text where no base model is given.

    Attributes:
        n_embd: Width.
        n_layer: Layers.
        n_head: Attention heads.
        training: Arguments of `agents.supervised.SL`, which learns prompts and references of all rows.
    """

    n_embd: int
    n_layer: int
    n_head: int
    training: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """A row of a task's tables: an algorithm, and what sets it apart.

    Attributes:
        algorithm: Its name in `agents.ALGORITHMS`. Supervised learning is the warm start itself, so "sl" takes none of
            the next three.
        arguments: The algorithm's arguments, over those that all RL algorithms of the task share.
        env: Arguments of the environment it learns in, over the task's. Tests are in the task's own environment,
            without a guide, unless these say ``handoff=True``: a policy that can hand off is tested with that action,
            the guide and the cost.
        policy: Arguments of `agents.CausalLMPolicy.from_pretrained`.
        best_of: Texts that are written for every test prompt, of which the one with the highest reward is kept.

    Raises:
        ValueError: `best_of` is below 1, or "sl" is given arguments.
    """

    algorithm: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    best_of: int = 1

    def __post_init__(self) -> None:
        if self.best_of < 1:
            raise ValueError(f"best_of must be at least 1, got {self.best_of!r}")
        given = {name: value for name in ("arguments", "env", "policy") if (value := getattr(self, name))}
        if self.algorithm == "sl" and given:
            raise ValueError(f"arguments, env and policy must be empty for 'sl', which is the warm start, got {given}")


@dataclass(frozen=True)
class TaskProfile:
    """One task of a profile.

    Attributes:
        env_id: The environment.
        language_model: The start model where no base is given.
        supervised: Arguments of `agents.supervised.SL`.
        episodes: Training episodes of every RL run.
        rl: Arguments that all RL algorithms share.
        rows: What can be run, by the name that tables show, in their order.
        env: Arguments of the environment beside data, tokenizer and guide.
        decoding: `textgym.decoding.Decoding` of training episodes and of evaluations.
        guide_decoding: Decoding of the guide, which is the supervised policy, frozen.
        test_prompts: Prompts of the test split that every run is judged on.
    """

    env_id: str
    language_model: LanguageModel
    supervised: Mapping[str, Any]
    episodes: int
    rl: Mapping[str, Any]
    rows: Mapping[str, Row]
    env: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    guide_decoding: Mapping[str, Any] = field(default_factory=lambda: {"top_p": 0.92, "top_k": 50})
    test_prompts: int = 500


@dataclass(frozen=True)
class Profile:
    """A named set of tasks.

    Attributes:
        name: What `--profile` selects.
        source: Data where `--source` gives none.
        tasks: Its tasks by name; all of them have rows of the same names.
        default: Names of the rows that run where `--algos` names none.

    Raises:
        ValueError: The rows of two tasks differ in name, or `default` names one that is not there.
    """

    name: str
    source: str
    tasks: Mapping[str, TaskProfile]
    default: tuple[str, ...] = ("sl", "ppo", "ppo++")

    def __post_init__(self) -> None:
        for name, task in self.tasks.items():
            if list(task.rows) != self.rows:
                raise ValueError(f"rows of {name} must be those of the first task, {self.rows}, got {list(task.rows)}")
        if not set(self.default) <= set(self.rows):
            raise ValueError(f"default must be some of {self.rows}, got {self.default}")

    @property
    def rows(self) -> list[str]:
        """Names of its rows, in the order of its tables."""
        return list(next(iter(self.tasks.values())).rows)


def load_profile(name: str) -> Profile:
    """Load a profile by name.

    Raises:
        ValueError: There is none of this name.
    """
    from benchmarks.profiles.options import OPTIONS
    from benchmarks.profiles.quick import QUICK
    from benchmarks.profiles.small import SMALL

    profiles = {profile.name: profile for profile in (QUICK, SMALL, OPTIONS)}
    if name not in profiles:
        raise ValueError(f"profile must be one of {sorted(profiles)}, got {name!r}")
    return profiles[name]
