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
class TaskProfile:
    """One task of a profile.

    Attributes:
        env_id: The environment.
        language_model: The start model where no base is given.
        supervised: Arguments of `agents.supervised.SL`.
        episodes: Training episodes of every RL run.
        rl: Arguments that all RL algorithms share.
        algorithms: Arguments of single RL algorithms, by name.
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
    algorithms: Mapping[str, Mapping[str, Any]]
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
        tasks: Its tasks by name.
    """

    name: str
    source: str
    tasks: Mapping[str, TaskProfile]


def load_profile(name: str) -> Profile:
    """Load a profile by name.

    Raises:
        ValueError: There is none of this name.
    """
    from benchmarks.profiles.quick import QUICK
    from benchmarks.profiles.small import SMALL

    profiles = {profile.name: profile for profile in (QUICK, SMALL)}
    if name not in profiles:
        raise ValueError(f"profile must be one of {sorted(profiles)}, got {name!r}")
    return profiles[name]
