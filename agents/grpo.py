"""GRPO: advantages relative to a group, in units of its standard deviation."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch

from agents.algorithm import check
from agents.group import GroupPolicyGradient
from agents.policy import Evaluation, Policy
from agents.policy_gradient import Credit
from agents.rollout import Rollout

if TYPE_CHECKING:
    from textgym.engine import TextVectorEnv

# Keeps advantages of a group whose rewards are all but equal from blowing up.
EPSILON = 1e-4


class GRPO(GroupPolicyGradient):
    """Group relative policy optimisation (Shao et al. 2024, arXiv 2402.03300, equations 3 and 4).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none, or a guide's with probability beta, one a group | policy to the end | none | body | none |

    ``L = -mean_i (1/|y_i|) sum_h [min(rho A_i, clip(rho, 1 - c, 1 + c) A_i) - kl_coef (pi_ref / pi - 1 - log(pi_ref /
    pi))]`` with ``A_i = (r_i - mean r) / std r`` over the k texts of a group, and |y_i| the decisions of text i.

    Args:
        policy: As for `PolicyGradient`.
        env: As for `PolicyGradient`; its number of rows is a multiple of `group_size`.
        group_size: k, texts of one prompt and one prefix.
        beta: Probability that a group starts from a guide's prefix (guided GRPO); 0 needs no guide.
        clip_range: c above.
        kl_coef: Weight of the KL penalty; 0.04 is published.
        kl_penalty: "loss" is published; "reward" takes the summed KL from each text's reward, as RLOO does.
        scale: What differences to the group's mean are divided by: their standard deviation in the "group" (published),
            in the "batch" (Hu et al. 2025, REINFORCE++ with baseline, arXiv 2501.03262), or "none" (Liu et al. 2025,
            Dr. GRPO, arXiv 2503.20783).
        length_norm: What the sum over a text's decisions is divided by: their number, "text" (published); the mean
            number of decisions of a minibatch's texts, "batch", so that every decision counts alike (the token-level
            loss of DAPO, Yu et al. 2025, arXiv 2503.14476); or the "horizon" T (Dr. GRPO).
        **shared: As for `PolicyGradient`.

    Raises:
        ValueError: The environment has no guide where `beta` asks for one, its rows make no whole groups, or an
            argument is wrong.
    """

    name = "grpo"

    def __init__(
        self,
        policy: Policy | str | os.PathLike,
        env: TextVectorEnv | str,
        *,
        group_size: int = 4,
        beta: float = 0.0,
        clip_range: float = 0.2,
        kl_coef: float = 0.04,
        kl_penalty: Literal["reward", "loss"] = "loss",
        scale: Literal["group", "batch", "none"] = "group",
        length_norm: Literal["text", "batch", "horizon"] = "text",
        **shared: Any,
    ) -> None:
        check("clip_range", clip_range, clip_range > 0, "above 0")
        check("scale", scale, scale in ("group", "batch", "none"), '"group", "batch" or "none"')
        check("length_norm", length_norm, length_norm in ("text", "batch", "horizon"), '"text", "batch" or "horizon"')
        super().__init__(
            policy, env, group_size=group_size, beta=beta, kl_coef=kl_coef, kl_penalty=kl_penalty, **shared
        )
        self.hyperparameters |= {"clip_range": clip_range, "scale": scale, "length_norm": length_norm}
        self.clip_range, self.scale, self.length_norm = clip_range, scale, length_norm

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """Return relative to the group."""
        returns = self.group_returns(rollout, reference_log_probs)
        advantages = returns - returns.mean(1, keepdim=True)
        if self.scale != "none":
            deviation = advantages.std(1, keepdim=True) if self.scale == "group" else advantages.std()
            advantages = advantages / (deviation + EPSILON)
        return Credit.without_critic(rollout, reference_log_probs, advantages.flatten())

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """The clipped surrogate and the KL penalty, in the mean over texts that `length_norm` says."""
        num_texts, num_decisions = len(minibatch.decisions), minibatch.decisions.sum().clamp(min=1)
        if self.length_norm == "text":
            weights = 1 / (num_texts * old.decisions.sum(1, keepdim=True).clamp(min=1))
        elif self.length_norm == "batch":
            weights = 1 / num_decisions
        else:
            weights = torch.tensor(1 / (num_texts * self.env.max_new_tokens), device=now.log_probs.device)
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
