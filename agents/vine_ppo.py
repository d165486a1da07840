"""VinePPO: the advantages of PPO from Monte Carlo values, which further completions by the policy estimate."""

from __future__ import annotations

from typing import Any, Literal

import torch

from agents.advantages import whiten
from agents.monte_carlo import progress
from agents.policy import Evaluation
from agents.policy_gradient import Credit, PolicyGradient
from agents.ppo import clipped_loss
from agents.rollout import Rollout
from textgym.checks import check
from textgym.guidance import Guidance


class VinePPO(PolicyGradient):
    """VinePPO (Kazemnejad et al. 2024, arXiv 2410.01679).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | policy to the end; the policy again, K times, from states along it | none | body | none |

    Every episode is cut into steps of m decisions. The value ``V(s)`` of the state s before a step is the mean reward
    of K further texts that the policy writes from s; after the last step it is the episode's own reward. All decisions
    of a step from s to s' have the advantage ``V(s') - V(s)``, undiscounted and without bootstrapping, in the clipped
    surrogate of `PPO`.

    As a reward the KL penalty of an episode is known without any further text. Decision h changes only what follows, so
    that the gradient of ``E[sum_i l_i]``, with ``l = log pi - log pi_ref``, is ``E[sum_h grad log pi_h sum_{i >= h}
    l_i]``, and ``kl_coef sum_{i >= h} l_i`` is subtracted from the advantage of decision h.

    The further texts train nothing, and are played without the environment's guidance. Their tokens count: they are
    part of `num_timesteps` and of a record's "policy_tokens", which names them as "value_tokens" too. `num_episodes`
    counts only the episodes that are trained on. In an environment with hand-offs the hand-off is a decision like any
    other, also in the further texts.

    Differs from the paper: a step is a number of decisions, not a line of reasoning; advantages are normalised over an
    iteration (in the authors' code over a minibatch); the KL loss is a mean over decisions (in that code a text's sum,
    clipped, of weight 1e-4: as much as 0.02 for the mean over 200 decisions).

    Raises:
        ValueError: The environment's own guidance hands off, or an argument is wrong.
    """

    name = "vine-ppo"

    rollouts_per_state: int = 9
    """K above; 9 as published."""
    tokens_per_step: int = 8
    """m above, the number of decisions between two states that are valued; 1 values every state."""
    normalize_advantage: bool = True
    """Whether advantages are shifted and scaled to mean 0 and standard deviation 1 over an iteration's decisions."""
    clip_range: float = 0.2
    """Maximum distance of a ratio from 1."""
    kl_penalty: Literal["reward", "loss"] = "loss"
    """"loss" as published; "reward" subtracts each decision's share of the KL from its advantage, as above."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that the policy ends its texts itself."""
        super().check_hyperparameters()
        for name in ("rollouts_per_state", "tokens_per_step"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check("clip_range", self.clip_range, self.clip_range > 0, "above 0")
        guidance = getattr(self.env, "initial_guidance", ())
        if any(part.handoff_prob for part in ((guidance,) if isinstance(guidance, Guidance) else guidance)):
            raise ValueError(
                f"env must be made without a guidance that hands off for {self.name}, whose values are those of texts "
                f"that the policy completes, got {guidance}"
            )

    def iterate(self) -> dict[str, Any]:
        """Play episodes, value the states along them, and take gradient steps."""
        return super().iterate() | {"value_tokens": self.value_tokens}

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """Advantages are differences of the values of successive states."""
        advantages, self.value_tokens = progress(self, rollout, self.tokens_per_step, self.rollouts_per_state)
        self.num_timesteps += self.value_tokens
        if self.kl_penalty == "reward":
            log_ratio = rollout.log_ratio(reference_log_probs)
            advantages = advantages - self.kl_coef * log_ratio.flip(1).cumsum(1).flip(1)
        if self.normalize_advantage:
            advantages = whiten(advantages, rollout.decisions)
        return Credit.without_critic(rollout, reference_log_probs, advantages)

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """The clipped surrogate, and the KL penalty if it is a loss."""
        num_decisions = minibatch.decisions.sum().clamp(min=1)
        terms = clipped_loss(now, old, minibatch, self.clip_range)
        return self.with_kl_loss(terms, now, old, lambda distance: distance.sum() / num_decisions)
