"""The single environment: the engine with one row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Signature, signature
from typing import Any, cast

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode

from textgym.checks import check, check_arguments
from textgym.engine import TextVectorEnv, argument_names
from textgym.guidance import Guidance
from textgym.guides.base import Guide
from textgym.rewards.base import RewardFunction
from textgym.spec import WithSpec
from textgym.task import Split, Task

VECTOR_ONLY = ("num_envs", "parking", "autoreset_mode", "copy")
VECTOR_ONLY_OPTIONS = ("reset_mask", "idle", "group_size")


class TextEnv(WithSpec, gym.Env):  # type: ignore[misc]
    """Token-level text generation, one episode at a time.

    An episode is ``prompt | prefix (guide) | body (policy) | completion (guide)`` with one reward at its end. The
    classes of the tasks (`textgym.tasks`) are the reference pages; this is their base class.

    Args:
        task: The task. Subclasses set it as a class attribute.
        **arguments: As for `TextVectorEnv`, except those that only a vector environment has: ``num_envs``,
            ``parking``, ``autoreset_mode``, ``copy``.

    Raises:
        TypeError: An unknown argument; the message names the one that was probably meant.
        ValueError: An argument outside of what is allowed, or one that only the vector environment has.

    Attributes:
        engine: The vector environment of one row that runs the episodes.
    """

    metadata: dict[str, Any] = {"render_modes": ["ansi", "html", "human"], "render_fps": 4}  # noqa: RUF012
    task: Task

    def __init__(self, *, task: Task | None = None, **arguments: Any) -> None:
        for name in VECTOR_ONLY:
            if name in arguments:
                raise ValueError(
                    f"{name} is an argument of the vector environment only (gym.make_vec), "
                    f"got {name}={arguments[name]!r}"
                )
        check_arguments(type(self).__name__, arguments, argument_names(type(self)))
        if task is not None:
            self.task = task
        self.engine = TextVectorEnv(1, task=self.task, autoreset_mode=AutoresetMode.DISABLED, **arguments)
        self.render_mode = self.engine.render_mode
        self.observation_space = self.engine.single_observation_space
        self.action_space = self.engine.single_action_space

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: Seeds everything random from here on.
            options: Any of ``index`` (int), ``prompt`` (str) with ``references`` (a sequence of str), ``prefix``
                (str or token ids), ``guidance`` (in force until replaced).

        Returns:
            The observation, and info: ``prompt``, ``references``, ``sample_id`` (-1 for a user's prompt),
            ``prefix_length``, ``authors`` (int8 (T,), codes of `textgym.guides.Author`).

        Raises:
            ValueError: An unknown option, or a value outside of what is allowed.
        """
        if not isinstance(options, Mapping | None):
            raise ValueError(f"options must be a mapping or None, got {type(options).__name__}: {options!r}")
        super().reset(seed=seed)
        options = dict(options or {})
        for name in VECTOR_ONLY_OPTIONS:
            if name in options:
                raise ValueError(f"options[{name!r}] is an option of the vector environment only")
        # To the engine, whose only row this is, a sequence has one entry per row.
        for name, allowed in (("prefix", "a text or token ids"), ("references", "a sequence of texts")):
            if options.get(name) is not None:
                listed = isinstance(options[name], Sequence | np.ndarray) and not isinstance(options[name], bytes)
                check(f"options[{name!r}]", options[name], listed, allowed)
                options[name] = [options[name]]
        if isinstance(options.get("prompt"), str):
            options["prompt"] = [options["prompt"]]
        if seed is None and not self.engine.seeded:
            seed = int(self.np_random.integers(2**31))
        observation, infos = self.engine.reset(seed=seed, options=options)
        return _first(observation), row_info(infos, 0)

    def step(
        self, action: Any, entropy: float | None = None
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Write one token, or ask the guide to finish (see `TextVectorEnv.step`).

        Args:
            action: A token id, or ``vocab_size`` for a hand-off where the environment has that action.
            entropy: The entropy in nats of the distribution from which it was drawn, where the guidance has a
                `handoff_entropy`.

        Returns:
            Observation, reward, terminated, truncated (never True) and info, which is empty until the episode ends.

        Raises:
            ValueError: An action outside of the action space, or an entropy that is missing or wrong.
            gymnasium.error.ResetNeeded: The episode is over, or never began.
        """
        action = np.asarray(action)
        check("action", action, action.size == 1, "one action")
        entropies = None if entropy is None else [entropy]
        observation, rewards, terminations, _, infos = self.engine.step(action.reshape(1), entropies)
        return _first(observation), float(rewards[0]), bool(terminations[0]), False, row_info(infos, 0)

    def action_masks(self) -> np.ndarray:
        """Which actions are allowed now, bool (actions,) (see `TextVectorEnv.action_masks`)."""
        return self.engine.action_masks()[0]

    def render(self) -> str | None:
        """Show prompt and text, each author in their own colour: as a string ("ansi") or printed ("human")."""
        frames = self.engine.render()
        return frames[0] if frames else None

    @property
    def exhausted(self) -> bool:
        """Whether every sample of a sequential pass was visited; the next reset starts another pass."""
        return self.engine.exhausted

    @property
    def guidance(self) -> Guidance:
        """The guidance in force."""
        return cast("Guidance", self.engine.guidance)

    @property
    def guide(self) -> Guide | None:
        """The guide."""
        return self.engine.guide

    @property
    def data(self) -> Split:
        """The split's samples and fingerprint."""
        return self.engine.data

    @property
    def tokenizer(self) -> Any:
        """The tokenizer whose ids are the actions."""
        return self.engine.tokenizer

    @property
    def reward_function(self) -> RewardFunction:
        """The reward; loaded, and trained where the task says so, on first use."""
        return self.engine.reward_function


# So that `help` shows the arguments, which are written once.
_parameters = signature(TextVectorEnv.__init__).parameters.values()
TextEnv.__init__.__signature__ = Signature(  # type: ignore[attr-defined]
    [parameter for parameter in _parameters if parameter.name not in (*VECTOR_ONLY, "unknown")]
)


def _first(observation: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: value[0] for key, value in observation.items()}


def row_info(infos: Mapping[str, Any], row: int) -> dict[str, Any]:
    """The info of one row, as the single environment has it, from the infos of a vector environment."""
    info: dict[str, Any] = {}
    for key, value in infos.items():
        if key.startswith("_") or not infos[f"_{key}"][row]:
            continue
        if isinstance(value, dict):
            info[key] = row_info(value, row)
        else:
            own: Any = value[row]
            info[key] = own.item() if isinstance(own, np.generic) else own
    return info
