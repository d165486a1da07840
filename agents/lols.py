"""LOLS and D2LOLS: imitate the guide and improve on it, by turns or one after the other."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import torch

from agents.aggrevated import AggreVaTeD
from agents.algorithm import check
from agents.policy import Policy
from agents.policy_gradient import Credit
from agents.ppo import PPO
from agents.rollout import Rollout
from textgym.guidance import Guidance
from textgym.seeding import uniform

if TYPE_CHECKING:
    from textgym.engine import TextVectorEnv


class LOLS(AggreVaTeD):
    """Locally optimal learning to search (Chang et al. 2015, arXiv 1502.02206; Chang et al. 2023, arXiv 2306.11816).

    | iteration | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|---|
    | with probability tau, as PPO++ | with prob. beta, t guide tokens | to the end | none | body | V of the policy |
    | else, as AggreVaTeD | none | with prob. beta, t policy tokens | guide | body | V of the guide, on completion |

    The two critics are two heads of one network.

    Args:
        policy: As for `PPO`.
        env: As for `AggreVaTeD`.
        tau: Probability that an iteration is one of PPO++.
        beta: Share of the episodes with a prefix, or with a body.
        **hyperparameters: As for `PPO`.

    Raises:
        ValueError: The environment has no guide that can complete texts, or an argument is wrong.
    """

    name = "lols"

    def __init__(
        self,
        policy: Policy | str | os.PathLike,
        env: TextVectorEnv,
        *,
        tau: float = 0.8,
        beta: float = 0.8,
        **hyperparameters: Any,
    ) -> None:
        check("tau", tau, 0 <= tau <= 1, "in [0, 1]")
        super().__init__(policy, env, beta=beta, **hyperparameters)
        self.hyperparameters["tau"] = self.tau = tau

    @property
    def restarting(self) -> bool:
        """Whether this iteration is one of PPO++."""
        return bool(uniform(self.seed, self.iteration) < self.tau)

    def guidance(self) -> Guidance:
        """The guide starts texts, or ends them."""
        return Guidance(restart_prob=self.beta) if self.restarting else super().guidance()

    @property
    def critic_of(self) -> Literal["policy", "guide"]:
        """After a decision goes on who ends the text."""
        return "policy" if self.restarting else "guide"

    def estimate(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """PPO's credit, or AggreVaTeD's."""
        estimate = PPO.estimate if self.restarting else AggreVaTeD.estimate
        return estimate(self, rollout, reference_log_probs)


class D2LOLS(LOLS):
    """Direct and differentiable LOLS (Chang et al. 2023, arXiv 2306.11816): first imitate the guide, then surpass it.

    | iteration | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|---|
    | the first tau, as AggreVaTeD | none | with prob. beta, t policy tokens | guide | body | V of the guide |
    | after, as PPO++ | with prob. beta, t guide tokens | to the end | none | body | V of the policy |

    Args:
        policy: As for `PPO`.
        env: As for `AggreVaTeD`.
        tau: Iterations of AggreVaTeD.
        beta: Share of the episodes with a body, or with a prefix.
        **hyperparameters: As for `PPO`.

    Raises:
        ValueError: The environment has no guide that can complete texts, or an argument is wrong.
    """

    name = "d2lols"

    def __init__(
        self,
        policy: Policy | str | os.PathLike,
        env: TextVectorEnv,
        *,
        tau: int = 20,
        beta: float = 0.8,
        **hyperparameters: Any,
    ) -> None:
        check("tau", tau, isinstance(tau, int) and tau >= 0, "an int of at least 0, a number of iterations")
        super().__init__(policy, env, beta=beta, **hyperparameters)
        self.hyperparameters["tau"] = self.tau = tau

    @property
    def restarting(self) -> bool:
        """Whether the guide has been imitated long enough."""
        return self.iteration >= self.tau
