"""AggreVaTeD: imitate a guide by what it would make of each decision."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch

from agents.advantages import gae, last_of
from agents.algorithm import check, check_guide
from agents.policy import Policy
from agents.policy_gradient import Credit
from agents.ppo import PPO
from agents.rollout import Rollout
from textgym.guidance import Guidance

if TYPE_CHECKING:
    from textgym.engine import TextVectorEnv


class AggreVaTeD(PPO):
    """Imitation of a guide's cost-to-go (Sun et al. 2017, arXiv 1703.01030; Chang et al. 2023, arXiv 2306.11816).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | with prob. beta, t policy tokens, else none | guide to the end | body | V of the guide, on completion |

    t is uniform on {1..T}. Where the policy ends the text before it has written t tokens there is no completion. The
    advantage of a decision is the guide's Q minus V: the policy learns to choose what serves the guide best, in states
    of its own, and does at best one step of improvement on the guide in each of them.

    Args:
        policy: As for `PPO`.
        env: A `TextVectorEnv` with a guide that can complete texts, made without ``handoff=True``: here the schedule
            hands off, not the policy.
        beta: Probability that the policy writes at all, above 0.
        **hyperparameters: As for `PPO`.

    Raises:
        ValueError: The environment has no such guide, or an argument is wrong.
    """

    name = "aggrevated"

    def __init__(
        self, policy: Policy | str | os.PathLike, env: TextVectorEnv, *, beta: float = 0.8, **hyperparameters: Any
    ) -> None:
        check("beta", beta, 0 < beta <= 1, "in (0, 1]")
        check_guide(env, self.name, hand_off=True)
        if env.handoff:
            raise ValueError(f"env must be made without handoff=True for {self.name}: here the schedule hands off")
        super().__init__(policy, env, **hyperparameters)
        self.hyperparameters["beta"] = self.beta = beta

    def guidance(self) -> Guidance:
        """The guide writes every text to its end, after t policy tokens or alone."""
        return Guidance(handoff_prob=1.0, handoff_length=None, no_body_prob=1 - self.beta)

    @property
    def critic_of(self) -> Literal["policy", "guide"]:
        """After the credited decision the guide goes on."""
        return "guide"

    def estimate(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """The guide's Q minus V.

        The last decision's Q is seen: the guide did go on from there, and its GAE trace runs over the completion. The
        Q of one before is what the critic says of the next state: ``A_h = r_h + gamma V_g(s_{h+1}) - V_g(s_h)``, since
        a longer trace would mix in the policy's own mistakes.
        """
        decisions, completion = rollout.decisions, rollout.completion
        written = decisions | completion
        rewards = self.token_rewards(rollout, reference_log_probs, written)
        values = self.state_values(rollout, rewards, written, completion)
        trace, returns = gae(rewards, values, written, self.gamma, self.gae_lambda)
        one_step, _ = gae(rewards, values, written, self.gamma, 0.0)
        return Credit(
            decisions=decisions,
            log_probs=rollout.log_probs,
            reference_log_probs=reference_log_probs,
            advantages=torch.where(last_of(decisions), trace, one_step).masked_fill(~decisions, 0),
            states=completion,
            values=values,
            returns=returns,
        )
