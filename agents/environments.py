"""Environments for algorithms, and the settings that an environment and a policy must share."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, VectorWrapper

from textgym.spec import guidance_as_plain

if TYPE_CHECKING:
    from gymnasium.envs.registration import EnvSpec
    from transformers import PreTrainedTokenizerBase

    from agents.policy import Actor
    from textgym.engine import TextVectorEnv
    from textgym.task import SplitName


def make_env(env_id: str, *, num_envs: int, **arguments: Any) -> TextVectorEnv:
    """Make an environment with ``parking=True`` (rows wait for each other) and without automatic resets."""
    arguments |= {"parking": True, "autoreset_mode": AutoresetMode.DISABLED}
    return gym.make_vec(env_id, num_envs=num_envs, **arguments).unwrapped  # type: ignore[return-value]


def learning_env(env: Any, num_envs: int, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The environment that an algorithm learns in.

    Args:
        env: An id; an environment that `gymnasium.make` or `make_vec` made, which is made again with what learning in
            batches needs; or a `TextVectorEnv` made with ``parking=True``, which is returned as it is, like anything
            else.
        num_envs: Rows, unless `env` has several.
        tokenizer: The policy's, unless `env` was made with another.

    Raises:
        ValueError: `env` is wrapped: an algorithm would not see what the wrapper does.
    """
    from textgym.engine import TextVectorEnv
    from textgym.env import TextEnv

    if isinstance(env, str):
        return make_env(env, num_envs=num_envs, tokenizer=tokenizer)
    inner = getattr(env, "unwrapped", env)
    if not isinstance(inner, TextVectorEnv | TextEnv):
        return env
    wrappers = (
        [wrapper.name for wrapper in env.spec.additional_wrappers] if isinstance(env, gym.Env) and env.spec else []
    )
    if isinstance(env, VectorWrapper):
        wrappers = [type(env).__name__]
    if wrappers:
        raise ValueError(f"env must not be wrapped for an algorithm, which plays whole batches, got {wrappers}")
    if inner.spec is None or (isinstance(inner, TextVectorEnv) and inner.parking):
        return inner
    arguments = _arguments(inner.spec)
    engine = inner if isinstance(inner, TextVectorEnv) else inner.engine
    rows = engine.num_envs if isinstance(inner, TextVectorEnv) else num_envs
    if arguments.get("tokenizer") is None:
        arguments["tokenizer"] = tokenizer
    return make_env(inner.spec.id, num_envs=rows, **arguments | {"guide": engine.guide})


def sibling_env(
    env: TextVectorEnv, *, num_envs: int, split: SplitName, guided: bool = False, **changes: Any
) -> TextVectorEnv:
    """Make the same environment on another split: without a guide, unless `guided` or its policy can hand off to it.

    Args:
        env: The environment.
        num_envs: Rows.
        split: "train", "validation" or "test".
        guided: Whether it has the guide.
        **changes: Other arguments that it is made with.

    Raises:
        ValueError: `env` was not made by `gymnasium.make_vec`, so its arguments are unknown.
    """
    if env.spec is None:
        raise ValueError(
            f"env must be made by gymnasium.make_vec, so that it can be made again for split {split!r}; for "
            "evaluations, eval_env can be given instead"
        )
    arguments = _arguments(env.spec)
    arguments |= {"guidance": None, "order": "random", "split": split}
    # Share what is already loaded.
    arguments |= {"guide": env.guide if env.handoff or guided else None}
    arguments |= {"tokenizer": env.tokenizer, "reward": env.reward_function}
    return make_env(env.spec.id, num_envs=num_envs, **arguments | changes)


def _arguments(spec: EnvSpec) -> dict[str, Any]:
    """The environment's own arguments in a specification: without those of `gymnasium.make_vec`."""
    return {name: value for name, value in spec.kwargs.items() if name not in ("num_envs", "vectorization_mode")}


def description(env: TextVectorEnv) -> dict[str, Any] | None:
    """The arguments of `make_env` that make an environment again, as plain data; None where that is not known.

    Not among them are the tokenizer, which is the policy's, and a guide that is an object.
    """
    if env.spec is None:
        return None
    registered = {*gym.registry[env.spec.id].kwargs} if env.spec.id in gym.registry else set()
    left_out = registered | {"tokenizer", "parking", "autoreset_mode"}
    arguments = {name: value for name, value in _arguments(env.spec).items() if name not in left_out}
    arguments["source"] = env.source
    if not isinstance(arguments.get("guide"), str | None):
        arguments |= {"guide": None, "guidance": None}
    try:
        described = json.dumps(
            {"env_id": env.spec.id, "num_envs": env.num_envs, **arguments}, default=guidance_as_plain
        )
    except TypeError:
        return None
    return json.loads(described)


def differences(env: TextVectorEnv, other: TextVectorEnv) -> dict[str, tuple[Any, Any]]:
    """What two environments ask of a policy differently, by name; their splits, rows and guides may differ."""
    names = (
        "source",
        "template",
        "chat",
        "stop",
        "max_prompt_tokens",
        "max_new_tokens",
        "truncation_side",
        "min_new_tokens",
        "banned_tokens",
        "handoff",
        "handoff_cost",
    )
    values = {name: (getattr(env, name), getattr(other, name)) for name in names}
    values["task"] = (env.task.name, other.task.name)
    if env.reward != other.reward:  # which may be the same, by name and loaded
        values["reward"] = (described(env.reward_function), described(other.reward_function))
    return {name: (here, there) for name, (here, there) in values.items() if here != there}


def described(reward: Any) -> str:
    """A reward by its name and, if it has one, its fingerprint."""
    name = getattr(reward, "__name__", type(reward).__name__)
    fingerprint = getattr(reward, "fingerprint", None)
    return name if fingerprint is None else f"{name} {fingerprint}"


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
