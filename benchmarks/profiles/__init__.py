"""Profiles: what a benchmark runs, and how large; one small file each."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any, Literal


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
        algorithm: Its name in `agents.ALGORITHMS`, or "package.module:Class" for one of your own or of
            Stable-Baselines3 (see `algorithm_class`). Supervised learning is the warm start itself, so "sl" takes none
            of the next four.
        arguments: The algorithm's arguments, over those that all RL algorithms of the task share.
        env: Arguments of the environment it learns in, over the task's. Tests are in the task's own environment,
            without a guide, unless these say ``handoff=True``: a policy that can hand off is tested with that action,
            the guide and the cost. An object among them, such as another guide, must pickle and have a fingerprint, by
            which records tell it.
        policy: Arguments of `agents.CausalLMPolicy.from_pretrained`.
        start: What the policy starts as, and stays near: the "supervised" policy, which is also the guide, or the
            "start_model" as it was before it learned the task, a learner that is weaker than its guide.
        best_of: Texts that are written for every test prompt, of which the one with the highest reward is kept.
        as_guide: Whether the test is written with the guide's decoding: supervised learning then is the guide.

    Raises:
        ValueError: `best_of` is below 1, `start` is none of these, or "sl" is given arguments.
    """

    algorithm: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    start: Literal["supervised", "start_model"] = "supervised"
    best_of: int = 1
    as_guide: bool = False

    def __post_init__(self) -> None:
        if self.start not in ("supervised", "start_model"):
            raise ValueError(f"start must be 'supervised' or 'start_model', got {self.start!r}")
        if self.best_of < 1:
            raise ValueError(f"best_of must be at least 1, got {self.best_of!r}")
        given = {name: value for name in ("arguments", "env", "policy") if (value := getattr(self, name))}
        if self.start != "supervised":
            given["start"] = self.start
        if self.algorithm == "sl" and given:
            raise ValueError(f"arguments, env, policy and start must be empty for 'sl', the warm start, got {given}")


@dataclass(frozen=True)
class TaskProfile:
    """One task of a profile.

    Attributes:
        env_id: The environment; "package.module:id" imports the module first, which registers it.
        supervised: Arguments of `agents.supervised.SL`.
        episodes: Training episodes of every RL run.
        rl: Arguments that all RL algorithms share.
        rows: What can be run, by the name that tables show, in their order.
        language_model: The start model, trained from scratch, where ``--base`` gives no other.
        base: Or the hub id of the start model.
        policy: Arguments of the policy's `from_pretrained`, for supervised learning and all rows.
        env: Arguments of the environment beside data, tokenizer and guide.
        decoding: `textgym.decoding.Decoding` of training episodes and of validation.
        test_decoding: Decoding of the test; None for the same.
        guide_decoding: Decoding of the guide, which is the supervised policy, frozen.
        test_prompts: Prompts of the test split that every run is judged on.

    Raises:
        ValueError: Both or none of `language_model` and `base` is given.
    """

    env_id: str
    supervised: Mapping[str, Any]
    episodes: int
    rl: Mapping[str, Any]
    rows: Mapping[str, Row]
    language_model: LanguageModel | None = None
    base: str | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    test_decoding: Mapping[str, Any] | None = None
    guide_decoding: Mapping[str, Any] = field(default_factory=lambda: {"top_p": 0.92, "top_k": 50})
    test_prompts: int = 500

    def __post_init__(self) -> None:
        if (self.language_model is None) == (self.base is None):
            raise ValueError(
                "exactly one of language_model and base must be given, "
                f"got language_model={self.language_model!r}, base={self.base!r}"
            )


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

    def with_rows(self, rows: Mapping[str, Row]) -> Profile:
        """The same profile with more rows, on every task, that run by default.

        Raises:
            ValueError: It has a row of such a name.
        """
        if taken := sorted(set(rows) & set(self.rows)):
            raise ValueError(f"rows must have names that the profile {self.name!r} has not, got {taken}")
        tasks = {name: replace(task, rows={**task.rows, **rows}) for name, task in self.tasks.items()}
        return replace(self, tasks=tasks, default=(*self.default, *rows))


def load_object(path: str) -> Any:
    """What "package.module:name" names.

    Raises:
        ValueError: There is no such module, or nothing of this name in it.
    """
    module, _, name = path.partition(":")
    if not name:
        raise ValueError(f"{path!r} must have the form package.module:name")
    try:
        return getattr(import_module(module), name)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"{path!r} must name something that can be imported: {error}") from error


def algorithm_class(name: str) -> type:
    """The class of an algorithm.

    Args:
        name: Its name in `agents.ALGORITHMS`; or "package.module:Class" for a class that is made and used as these are:
            ``Class(policy, env, seed=..., output_dir=..., **arguments)``, ``learn(total_episodes=..., callback=...)``,
            and the attributes `policy`, `history`, `num_episodes`, `num_timesteps` and `num_guide_tokens` (a subclass
            of `agents.algorithm.Algorithm` has all of that); or for a class of Stable-Baselines3, which becomes an
            `agents.sb3.SB3Algorithm`.

    Raises:
        ValueError: There is no such algorithm.
    """
    from agents import ALGORITHMS
    from agents.algorithm import Algorithm

    if ":" not in name:
        if name not in ALGORITHMS:
            raise ValueError(f"algorithm must be one of {[*ALGORITHMS]}, or package.module:Class, got {name!r}")
        return ALGORITHMS[name]
    algorithm = load_object(name)
    if not (inspect.isclass(algorithm) and callable(getattr(algorithm, "learn", None))):
        raise ValueError(f"algorithm {name!r} must be a class with the method learn, got {algorithm!r}")
    if not issubclass(algorithm, Algorithm):
        from stable_baselines3.common.base_class import BaseAlgorithm

        if issubclass(algorithm, BaseAlgorithm):
            from agents.sb3 import SB3Algorithm

            return SB3Algorithm.of(algorithm)
    return algorithm


def row_of(algorithm: str | type | Row) -> tuple[str, Row]:
    """A row for an algorithm from outside, and its name.

    Args:
        algorithm: A class; or "package.module:name" of a class, or of a `Row`, which says with what arguments.

    Returns:
        The row is called as the class calls itself in its attribute `name`, else as the path.

    Raises:
        ValueError: There is no such class or row.
    """
    if isinstance(algorithm, str):
        path, given = algorithm, load_object(algorithm)
    else:
        path, given = f"{algorithm.__module__}:{algorithm.__qualname__}", algorithm  # type: ignore[union-attr]
    row = given if isinstance(given, Row) else Row(path)
    own_name = vars(algorithm_class(row.algorithm)).get("name")
    if isinstance(given, Row) or not isinstance(own_name, str):
        own_name = path
    return own_name.replace(":", "."), row


def accepted(algorithm: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some arguments that a class's constructor takes, or one of its bases' to which it hands on the rest."""
    names: set[str] = set()
    for base in algorithm.__mro__:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names |= {parameter.name for parameter in parameters}
            if all(parameter.kind != inspect.Parameter.VAR_KEYWORD for parameter in parameters):
                break
    return {name: value for name, value in arguments.items() if name in names}


def load_profile(name: str) -> Profile:
    """Load a profile.

    Args:
        name: Of one that is here; or "package.module:NAME" of one of your own.

    Raises:
        ValueError: There is none of this name.
    """
    from benchmarks.profiles.options import OPTIONS
    from benchmarks.profiles.paper import PAPER
    from benchmarks.profiles.quick import QUICK
    from benchmarks.profiles.small import SMALL

    if ":" in name:
        profile = load_object(name)
        if not isinstance(profile, Profile):
            raise ValueError(f"profile must name a Profile, got {profile!r}")
        return profile
    profiles = {profile.name: profile for profile in (QUICK, SMALL, PAPER, OPTIONS)}
    if name not in profiles:
        raise ValueError(f"profile must be one of {sorted(profiles)}, or package.module:NAME, got {name!r}")
    return profiles[name]
