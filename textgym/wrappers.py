"""Wrappers for single environments: text as observation, rewards for tokens, a few prompts, episodes as pages."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs

from textgym.checks import check
from textgym.env import TextEnv
from textgym.rewards import split_parts
from textgym.storage import new_file
from textgym.tokenization import decode


class AnyText(spaces.Text):
    """Text of at most `max_length` characters of any kind; samples are of ASCII's."""

    def __init__(self, max_length: int, seed: int | np.random.Generator | None = None) -> None:
        super().__init__(max_length, min_length=0, charset=string.printable, seed=seed)

    def contains(self, x: Any) -> bool:
        """Whether `x` is a text that is not too long."""
        return isinstance(x, str) and len(x) <= self.max_length

    def __repr__(self) -> str:
        return f"AnyText({self.max_length})"


class TextObservation(gym.ObservationWrapper, RecordConstructorArgs):
    """Observations are the prompt and the text so far, as one string: for language models behind an API.

    Args:
        env: A text environment.

    Raises:
        ValueError: `env` is not one.
    """

    def __init__(self, env: gym.Env) -> None:
        RecordConstructorArgs.__init__(self)
        gym.ObservationWrapper.__init__(self, env)
        self._tokenizer = _text_env(env).tokenizer
        # A token decodes to at most as many characters as its name has, and a space may stand before it.
        longest = 1 + max(map(len, self._tokenizer.get_vocab()))
        self.observation_space = AnyText(longest * env.observation_space["input_ids"].shape[0])  # type: ignore[index]

    def observation(self, observation: dict[str, np.ndarray]) -> str:
        """The text of all valid tokens, without special ones."""
        return decode(self._tokenizer, [observation["input_ids"][observation["attention_mask"] != 0].tolist()])[0]


class DenseReward(gym.Wrapper, RecordConstructorArgs):
    """Rewards every token by how much it raised the potential of the text: ``r + gamma Phi(s') - Phi(s)``.

    Potential-based shaping (Ng, Harada, Russell 1999, "Policy invariance under reward transformations", equation 2)
    does not change the order of policies: with the potential of a finished episode at 0, the discounted return of an
    episode is the unshaped one less the potential of its first state.

    Args:
        env: A text environment.
        potential: Phi, a function on batches of unfinished texts with the arguments of a reward (see
            `textgym.rewards.base.RewardFunction`); None: the environment's own reward of the text so far.
        gamma: Discount factor of the learner, in [0, 1].

    Raises:
        ValueError: `env` is not a text environment, or `gamma` is out of range.
    """

    def __init__(self, env: gym.Env, potential: Callable[..., Any] | None = None, gamma: float = 1.0) -> None:
        RecordConstructorArgs.__init__(self, potential=potential, gamma=gamma)
        gym.Wrapper.__init__(self, env)
        check("gamma", gamma, 0 <= gamma <= 1, "in [0, 1]")
        self._engine, self._potential, self.gamma = _text_env(env).engine, potential, gamma

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode (see `TextEnv.reset`)."""
        with self._engine.all_or_nothing():  # a potential can fail as a reward can
            observation, info = self.env.reset(**arguments)
            self._last = self._potential_of_text()
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Write one token (see `TextEnv.step`)."""
        with self._engine.all_or_nothing():
            observation, reward, terminated, truncated, info = self.env.step(action)
            now = 0.0 if terminated else self._potential_of_text()
        reward = float(reward) + self.gamma * now - self._last
        self._last = now
        return observation, reward, terminated, truncated, info

    def _potential_of_text(self) -> float:
        potential = self._potential or self._engine.reward_function
        return float(split_parts(potential(**self._engine.reward_arguments([0])), 1, "potential")[0][0])


class FrozenPrompts(gym.Wrapper, RecordConstructorArgs):
    """Episodes are about a few prompts, in turn: to watch what is learned about them, or to memorise one.

    Args:
        env: A text environment.
        indices: The prompts' rows in the environment's data.

    Raises:
        ValueError: `env` is not a text environment, or `indices` are not rows of its data; at a reset, options that
            choose another prompt.
    """

    def __init__(self, env: gym.Env, indices: Sequence[int]) -> None:
        RecordConstructorArgs.__init__(self, indices=indices)
        gym.Wrapper.__init__(self, env)
        size = len(_text_env(env).data)
        self.indices = tuple(int(index) for index in indices)
        valid = bool(self.indices) and all(0 <= index < size for index in self.indices)
        check("indices", indices, valid, f"rows of the data, in [0, {size}), and at least one")
        self._next = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode about the next prompt; a seed begins with the first again."""
        chosen = sorted({"index", "prompt", "references"} & {*(options or {})})
        if chosen:
            raise ValueError(f"options must not choose the prompt, which FrozenPrompts does, got {chosen}")
        turn = self._next if seed is None else 0
        index = self.indices[turn % len(self.indices)]
        started = self.env.reset(seed=seed, options={**(options or {}), "index": index})
        self._next = turn + 1
        return started


# What a page shows: the episode after its last step, or after the one that the slider is at.
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark"><title>{title}</title>
<style>body {{ font: 16px/1.5 system-ui; max-width: 45em; margin: 2em auto; padding: 0 1em }} input {{ width: 100% }}
section:not(.shown) {{ display: none }}</style>
<h1>{title}</h1>
<p>The prompt is grey; the policy writes in green, the guide in purple, the dataset in blue, and who called reset in
ochre.</p>
<input type="range" min="0" max="{last}" value="{last}" aria-label="step" oninput="
document.querySelectorAll('section').forEach((part, step) => part.classList.toggle('shown', step == this.value))">
{sections}
</html>
"""


class RecordEpisodes(gym.Wrapper, RecordConstructorArgs):
    """Writes episodes as pages of HTML, in which a slider shows the text after each step, with authors in colours.

    Episode 0 is ``episode-0.html``, written when the episode ends; one that is reset before is not written. A file of
    the same name is replaced.

    Args:
        env: A text environment made with ``render_mode="html"``.
        folder: The folder of the pages, which is made.
        episode_trigger: Says of an episode's number, from 0, whether it is recorded, as for Gymnasium's `RecordVideo`;
            None records all.

    Raises:
        ValueError: `env` is not a text environment, or is rendered in another mode.
    """

    def __init__(self, env: gym.Env, folder: str | Path, episode_trigger: Callable[[int], bool] | None = None) -> None:
        RecordConstructorArgs.__init__(self, folder=folder, episode_trigger=episode_trigger)
        gym.Wrapper.__init__(self, env)
        mode = _text_env(env).render_mode
        check("render_mode", mode, mode == "html", 'that of an environment made with render_mode="html"')
        self.folder, self.episode_trigger = Path(folder), episode_trigger
        self._episode = -1
        self._frames: list[str] = []

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode (see `TextEnv.reset`)."""
        observation, info = self.env.reset(**arguments)
        self._episode += 1
        self._frames = []
        if self.episode_trigger is None or self.episode_trigger(self._episode):
            self._keep("the start")
        return observation, info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Write one token (see `TextEnv.step`)."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        if self._frames:
            self._keep(f"step {len(self._frames)}, reward {float(reward):g}")
            if terminated or truncated:
                self._write()
        return observation, float(reward), terminated, truncated, info

    def _keep(self, what: str) -> None:
        self._frames.append(f"<p>{what}</p>{self.env.render()}")

    def _write(self) -> None:
        last = len(self._frames) - 1
        sections = "\n".join(
            f"<section{' class=shown' if step == last else ''}>{frame}</section>"
            for step, frame in enumerate(self._frames)
        )
        task = escape(_text_env(self.env).task.name)
        page = _PAGE.format(title=f"{task}, episode {self._episode}", last=last, sections=sections)
        with new_file(self.folder / f"episode-{self._episode}.html") as file:
            file.write_text(page, encoding="utf-8")
        self._frames = []


def _text_env(env: gym.Env) -> TextEnv:
    inside = env.unwrapped
    if not isinstance(inside, TextEnv):
        raise ValueError(f"env must be a text environment of this package, got {env!r}")
    return inside
