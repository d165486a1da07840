"""An algorithm of your own, and how it enters the benchmark.

    python benchmarks/run_all.py --algo examples.raft:RAFT --algos sl,ppo

RAFT (Dong et al. 2023, arXiv 2304.06767) writes several texts for every prompt and imitates the best one.
"""

from __future__ import annotations

from typing import Any

import torch

from agents.group import GroupPolicyGradient
from agents.policy import Evaluation
from agents.policy_gradient import Credit
from agents.rollout import Rollout


class RAFT(GroupPolicyGradient):
    """Reward-ranked fine-tuning: maximum likelihood of the best of k texts.

    Args:
        policy: As for `GroupPolicyGradient`.
        env: As for `GroupPolicyGradient`.
        **arguments: As for `GroupPolicyGradient`; a profile's that are among them are passed on.
    """

    name = "raft"

    def __init__(self, policy: Any, env: Any, **arguments: Any) -> None:
        super().__init__(policy, env, **{"kl_penalty": "loss", **arguments})

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """One for the best text of each group, zero for the others."""
        returns = self.group_returns(rollout, reference_log_probs)
        best = torch.zeros_like(returns).scatter_(1, returns.argmax(1, keepdim=True), 1.0)
        return Credit.without_critic(rollout, reference_log_probs, best.flatten())

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """Negative log-likelihood of the chosen texts' tokens, mean over these."""
        chosen = old.advantages.masked_fill(~old.decisions, 0)
        count = (minibatch.advantages * minibatch.decisions).sum().clamp(min=1)
        log_ratios = (now.log_probs - old.log_probs).masked_fill(~old.decisions, 0)
        num_decisions = minibatch.decisions.sum().clamp(min=1)
        terms = {
            "loss": -(chosen * now.log_probs).sum() / count,
            "approx_kl": (log_ratios.exp() - 1 - log_ratios).detach().sum() / num_decisions,
        }
        return self.with_kl_loss(terms, now, old, lambda distance: distance.sum() / num_decisions)
