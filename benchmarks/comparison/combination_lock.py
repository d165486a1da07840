"""Learning curves on the combination lock, whose every value is known (extra "plots").

``python -m benchmarks.comparison.combination_lock`` draws them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from agents import D2LOLS, GRPO, LOLS, PPO, RLOO, AggreVaTeD, PPOPlusPlus, TabularPolicy
from agents.algorithm import Algorithm
from agents.evaluation import make_env
from agents.policy import Policy
from benchmarks.report.plots import figure, save
from textgym.packages import require
from textgym.tasks.lock import CombinationLock

ROWS = 256
PLAIN: dict[str, Any] = {"vocab_size": 20, "length": 10, "guide_accuracy": 0.9}
FORK: dict[str, Any] = {"vocab_size": 5, "length": 4, "fork": True}
# Shared by all: large steps, since a table has nothing to unlearn, and no KL penalty, since it starts uniform.
SETTINGS: dict[str, Any] = {
    "episodes_per_iteration": ROWS,
    "minibatch_size": ROWS,
    "n_epochs": 4,
    "learning_rate": 0.05,
    "kl_coef": 0.0,
    "max_grad_norm": 1e9,
    "device": "cpu",
}
# Some entropy bonus: until the first reward all advantages are noise of the critic, which whitening amplifies.
CRITIC = {"vf_coef": 1.0, "clip_range_vf": None, "ent_coef": 0.01}


class Curve(NamedTuple):
    """One line of the picture.

    Attributes:
        label: Its name.
        algorithm: The algorithm.
        arguments: Its arguments in addition to `SETTINGS`.
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
        log_probs = policy.evaluate_actions(texts, torch.ones_like(texts), columns).log_probs
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


def draw(curves: dict[str, dict[str, np.ndarray]], path: Path) -> None:
    """Draw the median over seeds, and the range of all of them, against episodes.

    Args:
        curves: For each lock, by its title, and each label: float (seeds, iterations).
        path: The picture, PNG.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    picture = figure(11, 4.2)
    axes = picture.subplots(1, len(curves), sharey=True)
    for axis, (title, lines) in zip(axes, curves.items(), strict=True):
        for number, (label, rewards) in enumerate(lines.items()):
            episodes = ROWS * np.arange(1, rewards.shape[1] + 1)
            axis.plot(episodes, np.median(rewards, 0), color=f"C{number}", label=label, linewidth=1.8)
            axis.fill_between(episodes, rewards.min(0), rewards.max(0), color=f"C{number}", alpha=0.12, linewidth=0)
        axis.set(title=title, xlabel="episodes", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("expected reward, exact")
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    save(picture, path)


def main(seeds: int = 5, iterations: int = 120, out: Path = Path("docs/combination_lock.png")) -> None:
    """Train tabular policies on the plain lock and on the fork, and draw their learning curves.

    Args:
        seeds: Number of seeds, 0 to seeds - 1.
        iterations: Iterations of 256 episodes.
        out: The picture.
    """
    require("plots", "drawing", "matplotlib")  # now, not after training
    torch.set_num_threads(1)  # a table is quicker without
    titles = {"plain lock: K = 20, H = 10, p = 0.9": PLAIN, "fork: safe 0.5, better 1; K = 5, H = 4": FORK}
    curves: dict[str, dict[str, np.ndarray]] = {}
    for title, lock in titles.items():
        curves[title] = {}
        for curve in CURVES:
            rewards = np.stack([learn(curve, lock, seed, iterations) for seed in range(seeds)])
            curves[title][curve.label] = rewards
            print(f"{title}, {curve.label}: {', '.join(f'{last:.3f}' for last in rewards[:, -1])}", flush=True)
    draw(curves, out)
    print(out)


if __name__ == "__main__":
    import tyro

    from textgym.process import keep_freed_memory

    keep_freed_memory()
    tyro.cli(main)
