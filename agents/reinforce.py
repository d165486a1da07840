"""REINFORCE with a learned baseline."""

from __future__ import annotations

import torch

from agents.advantages import kl_estimate
from agents.policy import Evaluation
from agents.policy_gradient import Credit
from agents.ppo import PPO


class REINFORCE(PPO):
    """REINFORCE with a baseline (Williams 1992; Sutton and Barto 2018, section 13.4).

    ``L = -mean A log pi + vf_coef 1/2 mean (V - G)^2 - ent_coef H`` with G the return after the decision and A = G - V,
    normalised over an iteration's decisions: PPO with lambda = 1 and neither ratio nor clipping. An
    iteration's episodes are used once, by default in a single gradient step, because later steps would not be
    on-policy.

    Differs from the books: advantages are normalised and rewards carry a KL penalty, as in `PPO`, whose arguments for
    clipping have no effect.

    Raises:
        ValueError: An argument is wrong.
    """

    name = "reinforce"

    minibatch_size: int | None = None  # type: ignore[assignment]
    """Number of episodes per gradient step; None takes all of an iteration."""
    n_epochs: int = 1
    """Passes over an iteration's episodes."""
    gae_lambda: float = 1.0
    """Always 1: a decision is credited with the whole return after it."""

    def check_hyperparameters(self) -> None:
        """Check the arguments (see `Algorithm.check_hyperparameters`)."""
        if self.gae_lambda != 1.0:
            raise ValueError(
                "gae_lambda must be 1 for reinforce, which credits a decision with the whole return after it"
            )
        super().check_hyperparameters()

    def __post_init__(self) -> None:
        if self.minibatch_size is None:
            self.minibatch_size = self.episodes_per_iteration
        super().__post_init__()

    def loss(self, now: Evaluation, old: Credit, minibatch: Credit) -> dict[str, torch.Tensor]:
        """The score function times the advantage, the value loss, and the entropy bonus."""
        num_decisions, num_states = minibatch.decisions.sum().clamp(min=1), minibatch.states.sum().clamp(min=1)
        log_probs, entropy = (part.masked_fill(~old.decisions, 0) for part in (now.log_probs, now.entropy))
        policy_loss = -(old.advantages * log_probs).sum() / num_decisions
        value_loss = 0.5 * (now.values - old.returns).masked_fill(~old.states, 0).square().sum() / num_states
        mean_entropy = entropy.sum() / num_decisions
        bonus = (
            self.ent_coef * mean_entropy if self.ent_coef else 0.0
        )  # a term of weight 0 would still be differentiated
        terms = {
            "loss": policy_loss + self.vf_coef * value_loss - bonus,
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": mean_entropy,
            # KL from the sampling policy to the current one, estimated on its samples
            "approx_kl": kl_estimate(old.log_probs, log_probs.detach(), old.decisions).sum() / num_decisions,
        }
        return self.with_kl_loss(terms, now, old, lambda distance: distance.sum() / num_decisions)
