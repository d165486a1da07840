"""Learning curves where every value is known: ``python -m benchmarks.lock``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from agents import D2LOLS, GRPO, LOLS, PPO, RLOO, AggreVaTeD, PPOPlusPlus, TabularPolicy
from agents.algorithm import Algorithm
from agents.evaluation import make_env
from agents.policy import Policy
from textgym.tasks.lock import CombinationLock

ROWS = 256
PLAIN: dict[str, Any] = {"vocab_size": 20, "length": 10, "guide_accuracy": 0.9}
FORK: dict[str, Any] = {"vocab_size": 5, "length": 4, "fork": True}
# The same for all: large steps, since a table has nothing to unlearn, and no KL, since it starts uniform.
SETTINGS: dict[str, Any] = {
    "episodes_per_iteration": ROWS,
    "minibatch_size": ROWS,
    "n_epochs": 4,
    "learning_rate": 0.05,
    "kl_coef": 0.0,
    "max_grad_norm": 1e9,
    "device": "cpu",
}
# Some entropy bonus: until the first reward all advantages are the critic's noise, and whitening makes it loud.
CRITIC = {"vf_coef": 1.0, "clip_range_vf": None, "ent_coef": 0.01}


class Curve(NamedTuple):
    """One line of the picture.

    Attributes:
        label: Its name.
        algorithm: The algorithm.
        arguments: Its arguments beside `SETTINGS`.
    """

    label: str
    algorithm: type[Algorithm]
    arguments: dict[str, Any]


CURVES = (
    Curve("PPO", PPO, CRITIC),
    Curve("PPO++", PPOPlusPlus, CRITIC | {"beta": 0.8}),
    Curve("AggreVaTeD", AggreVaTeD, CRITIC | {"beta": 0.8}),
    Curve("LOLS", LOLS, CRITIC | {"beta": 0.8, "tau": 0.8}),
    Curve("D2LOLS", D2LOLS, CRITIC | {"beta": 0.8, "tau": 10}),
    Curve("RLOO", RLOO, {"group_size": 8}),
    Curve("guided RLOO", RLOO, {"group_size": 8, "beta": 0.8}),
    Curve("guided GRPO", GRPO, {"group_size": 8, "beta": 0.8}),
)


def expected_reward(policy: Policy, lock: CombinationLock) -> float:
    """The policy's expected reward, exactly: the worth of each ending times its probability."""
    endings = torch.tensor([ending for ending, _ in lock.endings], device=policy.device)
    texts = torch.nn.functional.pad(endings, (1, 0), value=1)  # the prompt is the symbol 1
    columns = torch.arange(1, texts.shape[1], device=policy.device).expand_as(endings)
    with torch.no_grad():
        log_probs = policy.evaluate(texts, torch.ones_like(texts), columns).log_probs
    worths = torch.tensor([worth for _, worth in lock.endings], device=policy.device)
    return float(log_probs.sum(1).exp() @ worths)


def learn(curve: Curve, lock: dict[str, Any], seed: int, iterations: int) -> np.ndarray:
    """Train a tabular policy on a lock.

    Args:
        curve: What to train.
        lock: Arguments of the environment.
        seed: The seed.
        iterations: Iterations of `ROWS` episodes.

    Returns:
        float (iterations,), the exact expected reward after each.
    """
    env: Any = make_env("textgym/CombinationLock-v0", num_envs=ROWS, **lock)
    policy = TabularPolicy.for_lock(env.lock)
    agent = curve.algorithm(policy, env, seed=seed, **SETTINGS, **curve.arguments)
    rewards: list[float] = []
    agent.learn(total_episodes=ROWS * iterations, callback=lambda *_: rewards.append(expected_reward(policy, env.lock)))
    return np.array(rewards)
