"""Algorithms for textgym environments. Everything loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from textgym.packages import other_owners

if TYPE_CHECKING:
    from agents.aggrevated import AggreVaTeD
    from agents.dr_po import DRPO
    from agents.evaluation import EvaluationResult, evaluate
    from agents.gail import GAIL
    from agents.grpo import GRPO
    from agents.hpt import HPT
    from agents.lols import D2LOLS, LOLS
    from agents.luffy import LUFFY
    from agents.on_policy_distillation import OnPolicyDistillation
    from agents.pav import PAV
    from agents.policy import CausalLMPolicy, LanguageModelPolicy, Policy, Seq2SeqPolicy
    from agents.policy.tabular import TabularPolicy
    from agents.ppo import PPO
    from agents.ppo_plus_plus import PPOPlusPlus
    from agents.prefix_rft import PrefixRFT
    from agents.reinforce import REINFORCE
    from agents.rloo import RLOO
    from agents.supervised import SL
    from agents.uft import UFT
    from agents.vine_ppo import VinePPO

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
    "PAV": "pav",
    "OnPolicyDistillation": "on_policy_distillation",
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
    "GRPO",
    "HPT",
    "LOLS",
    "LUFFY",
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
    "Seq2SeqPolicy",
    "TabularPolicy",
    "VinePPO",
    "evaluate",
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


def __getattr__(name: str) -> Any:
    if name == "ALGORITHMS":
        classes = [__getattr__(algorithm) for algorithm in _ALGORITHMS]
        return {algorithm.name: algorithm for algorithm in classes} | _registered
    if name not in _MODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        if not name.startswith("_") and (owners := other_owners(__name__)):
            message += f"; it is textgym's, and {' and '.join(owners)} has one too, in the same place"
        raise AttributeError(message)
    return getattr(import_module(f"agents.{_MODULES[name]}"), name)
