"""RLOO: the baseline of a text is the mean return of the others in its group."""

from __future__ import annotations

import torch

from agents.group import GroupPolicyGradient
from agents.policy import Evaluation
from agents.policy_gradient import Credit
from agents.rollout import Rollout
from textgym.checks import check


class RLOO(GroupPolicyGradient):
    """REINFORCE leave-one-out (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none, or a guide's with probability beta, one per group | policy to the end | none | body | none |

    With R_i = r_i - kl_coef sum_h (log pi - log pi_ref) the advantage of text i is R_i minus the mean R of the k - 1
    others, and the whole text is one action: ``L = -mean_i min(rho_i A_i, clip(rho_i, 1 - c, 1 + c) A_i)`` with rho_i
    the ratio of the probabilities of the body. In an iteration's first gradient step rho is 1 and this is the
    published gradient; ratio and clipping serve the steps after it.

    Differs from the papers: gradient steps after an iteration's first are those of the clipped ratio.

    Raises:
        ValueError: As for `GroupPolicyGradient`.
    """

    name = "rloo"

    n_epochs: int = 1
    """Passes over an iteration's episodes."""
    clip_range: float | None = 0.2
    """c above; None does not clip."""

    def check_hyperparameters(self) -> None:
        """Check the arguments (see `Algorithm.check_hyperparameters`)."""
        super().check_hyperparameters()
        check("clip_range", self.clip_range, self.clip_range is None or self.clip_range > 0, "None or above 0")

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """Advantages are returns minus the mean return of the others in the group."""
        advantages = self.relative(rollout, self.group_returns(rollout, reference_log_probs), leave_one_out=True)
        return Credit.without_critic(rollout, reference_log_probs, advantages.flatten())

    def token_weights(self, old: Credit, minibatch: Credit) -> torch.Tensor:
        """One divided by the number of texts."""
        return torch.tensor(1 / len(minibatch.decisions))

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """The clipped surrogate with whole texts as actions."""
        num_texts, num_decisions = len(minibatch.decisions), minibatch.decisions.sum().clamp(min=1)
        log_ratios = (now.log_probs - old.log_probs).masked_fill(~old.decisions, 0)
        ratio, advantages = log_ratios.sum(1).exp(), old.advantages[:, 0]
        surrogate = ratio * advantages
        if self.clip_range is not None:
            clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
            surrogate = torch.minimum(surrogate, clipped * advantages)
        policy_loss = -surrogate.sum() / num_texts
        terms = {
            "loss": policy_loss,
            "policy_loss": policy_loss,
            "entropy": now.entropy.masked_fill(~old.decisions, 0).sum() / num_decisions,
            "approx_kl": (log_ratios.exp() - 1 - log_ratios).sum() / num_decisions,
        }
        if self.clip_range is not None:
            terms["clip_fraction"] = ((ratio - 1).abs() > self.clip_range).sum() / num_texts
        return self.with_kl_loss(terms, now, old, lambda distance: distance.sum() / num_texts)
