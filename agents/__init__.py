"""Algorithms for textgym environments. Everything loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from textgym.packages import other_owners
from textgym.process import importing

if TYPE_CHECKING:
    import os

    from agents.aggrevated import AggreVaTeD
    from agents.algorithm import Algorithm
    from agents.dr_po import DRPO
    from agents.evaluation import EvaluationResult, evaluate
    from agents.gail import GAIL
    from agents.gkd import GKD
    from agents.grpo import GRPO
    from agents.hpt import HPT
    from agents.lols import D2LOLS, LOLS
    from agents.luffy import LUFFY
    from agents.mentor import MENTOR
    from agents.on_policy_distillation import OnPolicyDistillation
    from agents.pav import PAV
    from agents.policy import CausalLMPolicy, LanguageModelPolicy, Policy, Seq2SeqPolicy
    from agents.policy.tabular import TabularPolicy
    from agents.ppo import PPO
    from agents.ppo_plus_plus import PPOPlusPlus
    from agents.prefix_rft import PrefixRFT
    from agents.reinforce import REINFORCE
    from agents.relift import ReLIFT
    from agents.rloo import RLOO
    from agents.supervised import SL
    from agents.uft import UFT
    from agents.vine_ppo import VinePPO
    from textgym.engine import TextVectorEnv

    ALGORITHMS: dict[str, type]

_ALGORITHMS = {
    "SL": "supervised",
    "PPO": "ppo",
    "PPOPlusPlus": "ppo_plus_plus",
    "AggreVaTeD": "aggrevated",
    "LOLS": "lols",
    "D2LOLS": "lols",
    "DRPO": "dr_po",
    "GAIL": "gail",
    "REINFORCE": "reinforce",
    "RLOO": "rloo",
    "GRPO": "grpo",
    "VinePPO": "vine_ppo",
    "UFT": "uft",
    "LUFFY": "luffy",
    "PrefixRFT": "prefix_rft",
    "HPT": "hpt",
    "ReLIFT": "relift",
    "MENTOR": "mentor",
    "PAV": "pav",
    "OnPolicyDistillation": "on_policy_distillation",
    "GKD": "gkd",
}
_MODULES = _ALGORITHMS | {
    "CausalLMPolicy": "policy",
    "EvaluationResult": "evaluation",
    "LanguageModelPolicy": "policy",
    "Policy": "policy",
    "Seq2SeqPolicy": "policy",
    "TabularPolicy": "policy.tabular",
    "evaluate": "evaluation",
}

__all__ = [
    "ALGORITHMS",
    "D2LOLS",
    "DRPO",
    "GAIL",
    "GKD",
    "GRPO",
    "HPT",
    "LOLS",
    "LUFFY",
    "MENTOR",
    "PAV",
    "PPO",
    "REINFORCE",
    "RLOO",
    "SL",
    "UFT",
    "AggreVaTeD",
    "CausalLMPolicy",
    "EvaluationResult",
    "LanguageModelPolicy",
    "OnPolicyDistillation",
    "PPOPlusPlus",
    "Policy",
    "PrefixRFT",
    "ReLIFT",
    "Seq2SeqPolicy",
    "TabularPolicy",
    "VinePPO",
    "evaluate",
    "load",
    "register",
]


_registered: dict[str, type] = {}


def register(algorithm: type) -> type:
    """Add an algorithm to `ALGORITHMS` under its `name`, so that benchmarks can run it. Also usable as a decorator.

    Args:
        algorithm: A class with the attribute `name`, importable from its module, with the interface of
            `agents.algorithm.Algorithm` (subclasses have it).

    Returns:
        The class.

    Raises:
        ValueError: The class has no name, or the name of another algorithm.
    """
    name = getattr(algorithm, "name", None)
    if not isinstance(name, str):
        raise ValueError(f"algorithm must have a string as its attribute name, got {name!r}")
    if (other := __getattr__("ALGORITHMS").get(name, algorithm)) is not algorithm:
        raise ValueError(f"algorithm must have a name of its own, got {name!r}, which is that of {other.__qualname__}")
    _registered[name] = algorithm
    return algorithm


def load(path: str | os.PathLike, env: TextVectorEnv | str | None = None, **arguments: Any) -> Algorithm:
    """Open what an algorithm's `save` or `push_to_hub` wrote, whichever algorithm it was.

    With the state of its training the agent goes on exactly (see `Algorithm.load`). Without it, as in the zoo and on
    the hub, there is the policy, to be looked at and judged; learning begins anew from it.

    Args:
        path: The folder, or a repository of the hub.
        env: The environment; None makes the one that it learned in, without a guide if that was an object.
        **arguments: Replace the saved arguments of the constructor ("device", "output_dir", ...).

    Raises:
        ValueError: `path` is none of these; it does not say which environment it learned in, or one that is not
            registered; or it goes on with a guide that it cannot make.
    """
    import gymnasium as gym

    import textgym  # noqa: F401  (registers the environments)
    from agents.checkpoint import TRAINING, read_description
    from agents.environments import make_env
    from agents.policy import LanguageModelPolicy
    from textgym.hub import local_folder

    folder = local_folder(path)
    made = read_description(folder, "the save of an algorithm")
    algorithm = __getattr__("ALGORITHMS").get(made.algorithm)
    if algorithm is None:
        raise ValueError(
            f"path must be of an algorithm that is registered, got {made.algorithm!r}: see agents.register"
        )
    if env is None:
        if made.environment is None:
            raise ValueError(
                "env must be given: path does not say how it was made, which was by objects or local files"
            )
        env_id, settings = made.environment["env_id"], {**made.environment, "tokenizer": folder}
        if env_id not in gym.registry:  # nor is a module imported because a file names it
            raise ValueError(f"path must be of an environment that is registered, got {env_id!r}: see textgym.register")
        env = make_env(**settings)
    if (folder / TRAINING).is_dir():
        agent = algorithm.load(path, env, **arguments)
        if agent.num_guide_tokens and agent.env.guide is None:
            raise ValueError("env must be given: its guide was an object, which path does not hold")
        return agent
    hyperparameters = {**made.hyperparameters, "output_dir": None, **arguments}
    policy = LanguageModelPolicy.from_pretrained(folder, device=hyperparameters.get("device", "auto"))
    return algorithm(policy, env, **hyperparameters)


def __getattr__(name: str) -> Any:
    if name == "ALGORITHMS":
        classes = [__getattr__(algorithm) for algorithm in _ALGORITHMS]
        return {algorithm.name: algorithm for algorithm in classes} | _registered
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        if not name.startswith("_") and (owners := other_owners(__name__)):
            message += f"; it is textgym's, and {' and '.join(owners)} has one too, in the same place"
        raise AttributeError(message)
    with importing():
        return getattr(import_module(f"agents.{_MODULES[name]}"), name)
