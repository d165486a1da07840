"""Environments for algorithms, and the settings that an environment and a policy must share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode

if TYPE_CHECKING:
    from agents.policy import Actor
    from textgym.engine import TextVectorEnv
    from textgym.task import SplitName


def make_env(env_id: str, *, num_envs: int, **arguments: Any) -> TextVectorEnv:
    """Make an environment with ``parking=True`` (rows wait for each other) and without automatic resets."""
    arguments |= {"parking": True, "autoreset_mode": AutoresetMode.DISABLED}
    return gym.make_vec(env_id, num_envs=num_envs, **arguments).unwrapped  # type: ignore[return-value]


def sibling_env(env: TextVectorEnv, *, num_envs: int, split: SplitName, guided: bool = False) -> TextVectorEnv:
    """Make the same environment on another split: without a guide, unless `guided` or its policy can hand off to it.

    Raises:
        ValueError: `env` was not made by `gymnasium.make_vec`, so its arguments are unknown.
    """
    if env.spec is None:
        raise ValueError(
            f"env must be made by gymnasium.make_vec, so that it can be made again for split {split!r}; for "
            "evaluations, eval_env can be given instead"
        )
    arguments = {key: value for key, value in env.spec.kwargs.items() if key not in ("num_envs", "vectorization_mode")}
    arguments |= {"guidance": None, "order": "random", "split": split}
    # Share what is already loaded.
    arguments |= {"guide": env.guide if env.handoff or guided else None}
    arguments |= {"tokenizer": env.tokenizer, "reward": env.reward_function}
    return make_env(env.spec.id, num_envs=num_envs, **arguments)


def agree(env: TextVectorEnv, policy: Actor) -> None:
    """Give an environment and a policy each other's end tokens, and the policy the maximum length of a text.

    Raises:
        ValueError: Only one of the two has the hand-off, or the environment's texts can be too long for the policy.
    """
    if env.handoff != policy.can_hand_off:
        raise ValueError(
            f"env was made with handoff={env.handoff}, and policy has can_hand_off={policy.can_hand_off}: the "
            "hand-off is an action of both or of neither (CausalLMPolicy takes handoff_prob)"
        )
    policy.check_length(env.max_prompt_tokens, env.max_new_tokens)
    env.add_end_tokens(policy.end_token_ids)
    policy.add_end_tokens(env.end_token_ids)
    policy.context_length = policy.context_length or env.max_prompt_tokens + env.max_new_tokens


@contextlib.contextmanager
def agreeing(env: TextVectorEnv, policy: Actor) -> Iterator[None]:
    """`agree` within a block, after which both have the end tokens that they had before."""
    with env.extra_end_tokens(()), policy.extra_end_tokens(()):
        agree(env, policy)
        yield
