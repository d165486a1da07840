"""Profiles: the tasks, rows and sizes of a benchmark, one small file each."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from typing import Any, Literal

from textgym.checks import check_name


@dataclass(frozen=True)
class LanguageModel:
    """A small model that is trained from scratch on a task's text if no base model is given.

    Attributes:
        n_embd: Width.
        n_layer: Layers.
        n_head: Attention heads.
        training: Arguments of `agents.supervised.SL`, which trains on prompts and references.
        family: "gpt2"; or "llama", which has rotary positions, RMSNorm and SwiGLU.
        env: Arguments of the environment in which it is trained, which override the task's: with easier problems, the
            start model knows the format and a little.

    Raises:
        ValueError: `family` is none of these.
    """

    n_embd: int
    n_layer: int
    n_head: int
    training: Mapping[str, Any]
    family: Literal["gpt2", "llama"] = "gpt2"
    env: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.family not in ("gpt2", "llama"):
            raise ValueError(f"family must be 'gpt2' or 'llama', got {self.family!r}")

    def settings(self) -> dict[str, Any]:
        """Its attributes as records have them: `family` and `env` only if they are not the defaults."""
        defaults = {"family": "gpt2", "env": {}}
        return {name: value for name, value in asdict(self).items() if value != defaults.get(name)}


@dataclass(frozen=True)
class Row:
    """A row of a task's tables: an algorithm with its arguments.

    Attributes:
        algorithm: Its name in `agents.ALGORITHMS`, or "package.module:Class" for one of your own or of
            Stable-Baselines3 (see `algorithm_class`). "sl" without arguments trains nothing: it is the policy that
            `start` names, and takes neither `env` nor `policy`. With arguments, it is trained from there.
        arguments: The algorithm's arguments, which override those that all RL algorithms of the task share; those of
            "sl" override the task's `supervised`.
        env: Arguments of the training environment, which override the task's. Tests are in the task's own environment,
            without a guide, unless these have ``handoff=True``: a policy that can hand off is tested with that action,
            the guide and the cost. Objects among them, such as another guide, must be picklable and have a
            fingerprint, which identifies them in records.
        policy: Arguments of `agents.CausalLMPolicy.from_pretrained`.
        start: The initial policy, which is also the reference of the KL penalty: the "supervised" policy, which is the
            guide too, or the "start_model" before supervised learning, a learner that is weaker than its guide.
        guidance: `textgym.Guidance` of the test, which is then in the training environment, with its guide. None takes
            part by default; with ``{"handoff_prob": 1.0, "no_body_prob": 1.0}`` a row "sl" without arguments is the
            guide alone.
        best_of: Completions per test prompt, of which the one with the highest reward is kept.
        as_guide: Whether the test uses the guide's decoding; supervised learning is then the guide.
        after: Supervised learning that comes first, as a row "sl" with arguments: it is trained from `start`, and this
            row's algorithm from the policy that comes out, which is then the reference of the KL penalty.

    Raises:
        ValueError: `best_of` is below 1, `start` is none of these, "sl" without arguments is given what only training
            needs, or `after` is another kind of row.
    """

    algorithm: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    start: Literal["supervised", "start_model"] = "supervised"
    guidance: Mapping[str, Any] = field(default_factory=dict)
    best_of: int = 1
    as_guide: bool = False
    after: Row | None = None

    def __post_init__(self) -> None:
        if self.start not in ("supervised", "start_model"):
            raise ValueError(f"start must be 'supervised' or 'start_model', got {self.start!r}")
        if self.best_of < 1:
            raise ValueError(f"best_of must be at least 1, got {self.best_of!r}")
        useless = ("policy", "after") if self.guidance else ("env", "policy", "after")
        given = {name: value for name in useless if (value := getattr(self, name))}
        if not self.trains and given:
            *first, last = useless
            raise ValueError(f"{', '.join(first)} and {last} must be left out for 'sl' without arguments, got {given}")
        after = self.after
        if after is not None and after != Row("sl", after.arguments, after.env, after.policy):
            raise ValueError(
                f"after must be a row 'sl' with nothing but arguments, env and policy; its start is this row's: {after}"
            )
        if after is not None and not after.trains:
            raise ValueError(f"after must be a row with arguments, which is trained, got {after}")

    @property
    def trains(self) -> bool:
        """Whether it trains a policy; "sl" without arguments is a policy of the warm start, which all rows share."""
        return self.algorithm != "sl" or bool(self.arguments)


@dataclass(frozen=True)
class TaskProfile:
    """One task of a profile.

    Attributes:
        env_id: The environment; "package.module:id" imports the module first, which registers it.
        supervised: Arguments of `agents.supervised.SL`.
        rl: Arguments that all RL algorithms share.
        rows: What can be run, by the name that tables show, in their order.
        episodes: Training episodes of every RL run.
        tokens: Instead of `episodes`, the tokens of every run that the policy and the guide wrote, with texts of the
            guide that are not learned and episodes that are played again; a prefix counts once, however many episodes
            start from it. A run ends with the iteration in which it reaches them. Supervised learning follows its own
            schedule of epochs, however many tokens its guide writes; tokens that it learns are no tokens that the
            policy writes, and do not count.
        language_model: The start model that is trained from scratch, unless ``--base`` gives another.
        base: Hub id of the start model, instead of `language_model`.
        policy: Arguments of the policy's `from_pretrained`, for supervised learning and all rows.
        env: Arguments of the environment other than data and tokenizer. If neither these nor the environment's defaults
            give a guide, it is the supervised policy, frozen.
        decoding: `textgym.decoding.Decoding` of training episodes and of validation.
        test_decoding: Decoding of the test; None for the same.
        guide_decoding: Decoding of the guide that is the supervised policy.
        test_prompts: Prompts of the test split that every run is judged on.
        test_samples: Texts per test prompt, of which records have pass@k for k = 1, 4, 16, ...; best-of rows write only
            those that they choose from.

    Raises:
        ValueError: Both or none of `language_model` and `base`, or of `episodes` and `tokens`, is given; or
            `test_samples` is below 1, or above 1 with greedy decoding or beams.
    """

    env_id: str
    supervised: Mapping[str, Any]
    rl: Mapping[str, Any]
    rows: Mapping[str, Row]
    episodes: int | None = None
    tokens: int | None = None
    language_model: LanguageModel | None = None
    base: str | None = None
    policy: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, Any] = field(default_factory=dict)
    decoding: Mapping[str, Any] = field(default_factory=dict)
    test_decoding: Mapping[str, Any] | None = None
    guide_decoding: Mapping[str, Any] = field(default_factory=lambda: {"top_p": 0.92, "top_k": 50})
    test_prompts: int = 500
    test_samples: int = 1

    def __post_init__(self) -> None:
        if (self.language_model is None) == (self.base is None):
            raise ValueError(
                "exactly one of language_model and base must be given, "
                f"got language_model={self.language_model!r}, base={self.base!r}"
            )
        if (self.episodes is None) == (self.tokens is None):
            raise ValueError(
                f"exactly one of episodes and tokens must be given, got episodes={self.episodes}, tokens={self.tokens}"
            )
        if self.test_samples < 1:
            raise ValueError(f"test_samples must be at least 1, got {self.test_samples}")
        how = self.decoding if self.test_decoding is None else self.test_decoding
        if self.test_samples > 1 and (how.get("greedy") or how.get("num_beams", 1) > 1):
            raise ValueError(f"test_samples must be 1 where the test does not sample, got {self.test_samples}: {how}")

    def samples(self, row: Row) -> int:
        """Texts per test prompt of a row, of which none is chosen."""
        return self.test_samples if row.best_of == 1 else 1


@dataclass(frozen=True)
class Profile:
    """A named set of tasks.

    Attributes:
        name: What `--profile` selects.
        source: Source of the data, unless `--source` gives another.
        tasks: Its tasks by name; all of them have rows of the same names.
        default: Names of the rows that run without `--algos`.

    Raises:
        ValueError: The rows of two tasks have different names, or `default` names an unknown row; a name cannot be part
            of a file's name, or two runs would write to the same folder.
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
        for kind, names in (("profile", [self.name]), ("task", self.tasks), ("row", self.rows)):
            for name in names:
                check_name(f"the name of a {kind}", name)
        folders = Counter(f"{task}-{row}" for task in self.tasks for row in self.rows)
        if shared := [folder for folder, count in folders.items() if count > 1]:
            raise ValueError(f"tasks and rows must have names that differ also when joined, got {shared} twice")

    @property
    def rows(self) -> list[str]:
        """Names of its rows, in the order of its tables."""
        return list(next(iter(self.tasks.values())).rows)

    def with_rows(self, rows: Mapping[str, Row]) -> Profile:
        """The same profile with more rows, on every task, that run by default.

        Raises:
            ValueError: It already has a row of such a name.
        """
        if taken := sorted(set(rows) & set(self.rows)):
            raise ValueError(f"rows must have names that the profile {self.name!r} has not, got {taken}")
        tasks = {name: replace(task, rows={**task.rows, **rows}) for name, task in self.tasks.items()}
        return replace(self, tasks=tasks, default=(*self.default, *rows))


def load_object(path: str) -> Any:
    """Import the object that "package.module:name" names.

    Raises:
        ValueError: The module or the name does not exist.
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
            ``Class(policy, env, seed=..., output_dir=..., **arguments)``, ``learn(total_episodes=..., callback=...)``
            (``total_timesteps=...`` where a task has a budget of `tokens`; a callback that returns False ends it), and
            the attributes `policy`, `history`, `num_episodes`, `num_timesteps` and `num_guide_tokens` (a subclass
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
    """The arguments that a class's constructor takes, itself or through the bases to which it passes ``**kwargs``."""
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
        name: Name of a profile of this package, or "package.module:NAME" of one of your own.

    Raises:
        ValueError: There is no such profile.
    """
    from benchmarks.profiles.frontier import FRONTIER
    from benchmarks.profiles.options import OPTIONS
    from benchmarks.profiles.paper import PAPER
    from benchmarks.profiles.quick import QUICK
    from benchmarks.profiles.small import SMALL

    if ":" in name:
        profile = load_object(name)
        if not isinstance(profile, Profile):
            raise ValueError(f"profile must name a Profile, got {profile!r}")
        return profile
    profiles = {profile.name: profile for profile in (QUICK, SMALL, PAPER, OPTIONS, FRONTIER)}
    if name not in profiles:
        raise ValueError(f"profile must be one of {sorted(profiles)}, or package.module:NAME, got {name!r}")
    return profiles[name]
