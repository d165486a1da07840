"""Algorithms for textgym environments. Everything loads on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agents.evaluation import EvaluationResult, evaluate
    from agents.policy import CausalLMPolicy, Policy
    from agents.ppo import PPO
    from agents.ppo_plus_plus import PPOPlusPlus
    from agents.supervised import SL

    ALGORITHMS: dict[str, type]

_HOMES = {
    "CausalLMPolicy": "policy",
    "EvaluationResult": "evaluation",
    "PPO": "ppo",
    "PPOPlusPlus": "ppo_plus_plus",
    "Policy": "policy",
    "SL": "supervised",
    "evaluate": "evaluation",
}

__all__ = ["ALGORITHMS", "PPO", "SL", "CausalLMPolicy", "EvaluationResult", "PPOPlusPlus", "Policy", "evaluate"]


def __getattr__(name: str) -> Any:
    if name == "ALGORITHMS":
        classes = [__getattr__(algorithm) for algorithm in ("SL", "PPO", "PPOPlusPlus")]
        return {algorithm.name: algorithm for algorithm in classes}
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"agents.{_HOMES[name]}"), name)
