"""GRPO: advantages relative to a group, in units of its standard deviation."""

from __future__ import annotations

from typing import Literal

import torch

from agents.group import GroupPolicyGradient
from agents.policy import Evaluation
from agents.policy_gradient import Credit
from agents.rollout import Rollout
from textgym.checks import check

# Bounds the advantages of a group whose rewards are nearly equal.
EPSILON = 1e-4


class GRPO(GroupPolicyGradient):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300, equations 3 and 4).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none, or a guide's with probability beta, one per group | policy to the end | none | body | none |

    ``L = -mean_i (1/|y_i|) sum_h [min(rho A_i, clip(rho, 1 - c, 1 + c) A_i) - kl_coef (pi_ref / pi - 1 - log(pi_ref /
    pi))]`` with ``A_i = (r_i - mean r) / std r`` over the k texts of a group, and |y_i| the decisions of text i.

    Differs from the paper: the reward model is not retrained between iterations; a group can start from a prefix.

    Raises:
        ValueError: As for `GroupPolicyGradient`.
    """

    name = "grpo"

    clip_range: float = 0.2
    """c above."""
    kl_coef: float = 0.04
    """Weight of the KL penalty; 0.04 as published."""
    kl_penalty: Literal["reward", "loss"] = "loss"
    """"loss" as published; "reward" subtracts the summed KL from each text's reward, as RLOO does."""
    scale: Literal["group", "batch", "none"] = "group"
    """Divisor of the differences to the group's mean: their standard deviation in the "group" (as published), in the
    "batch" (Hu et al. 2025, REINFORCE++ with baseline, arXiv 2501.03262), or "none" (Liu et al. 2025, Dr. GRPO, arXiv
    2503.20783)."""
    length_norm: Literal["text", "batch", "horizon"] = "text"
    """Divisor of the sum over a text's decisions: their number, "text" (as published); their mean number in the texts
    of a minibatch, "batch", so that every decision has the same weight (token-level loss of DAPO, Yu et al. 2025, arXiv
    2503.14476); or the "horizon" T (Dr. GRPO)."""

    def check_hyperparameters(self) -> None:
        """Check the arguments (see `Algorithm.check_hyperparameters`)."""
        super().check_hyperparameters()
        scales, norms = ("group", "batch", "none"), ("text", "batch", "horizon")
        check("clip_range", self.clip_range, self.clip_range > 0, "above 0")
        check("scale", self.scale, self.scale in scales, '"group", "batch" or "none"')
        check("length_norm", self.length_norm, self.length_norm in norms, '"text", "batch" or "horizon"')

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """Advantages are returns relative to the baseline."""
        advantages = self.relative(rollout, self.group_returns(rollout, reference_log_probs), leave_one_out=False)
        if self.scale != "none":
            deviation = advantages.std(1, keepdim=True) if self.scale == "group" else advantages.std()
            advantages = advantages / (deviation + EPSILON)
        return Credit.without_critic(rollout, reference_log_probs, advantages.flatten())

    def token_weights(self, old: Credit, minibatch: Credit) -> torch.Tensor:
        """One divided by `length_norm`'s divisor and, where it is one of a text, the number of texts."""
        if self.length_norm == "batch":
            return super().token_weights(old, minibatch)
        tokens = self.actions(old).sum(1, keepdim=True).clamp(min=1)
        divisor = tokens if self.length_norm == "text" else torch.full_like(tokens, self.env.max_new_tokens)
        return 1 / (len(minibatch.decisions) * divisor)

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """The clipped surrogate and the KL penalty, averaged over texts as `length_norm` says."""
        weights, num_decisions = self.token_weights(old, minibatch), minibatch.decisions.sum().clamp(min=1)
        log_ratio = (now.log_probs - old.log_probs).masked_fill(~old.decisions, 0)
        ratio, advantages = log_ratio.exp(), old.advantages.masked_fill(~old.decisions, 0)
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        policy_loss = -(weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()
        terms = {
            "loss": policy_loss,
            "policy_loss": policy_loss,
            "entropy": now.entropy.masked_fill(~old.decisions, 0).sum() / num_decisions,
            "approx_kl": (ratio - 1 - log_ratio).sum() / num_decisions,
            "clip_fraction": ((ratio - 1).abs() > self.clip_range).sum() / num_decisions,
        }
        return self.with_kl_loss(terms, now, old, lambda distance: (weights * distance).sum())
