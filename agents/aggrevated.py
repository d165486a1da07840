"""AggreVaTeD: imitation of a guide by its cost-to-go."""

from __future__ import annotations

import torch

from agents.advantages import gae, last_of
from agents.algorithm import check_guide
from agents.phase import Phase
from agents.ppo import PPO
from textgym.checks import check
from textgym.guidance import Guidance


def imitate(beta: float) -> Phase:
    """The guide completes every text: with prob. beta after t policy tokens, t uniform on {1..T}, else all of it."""
    guidance = Guidance(handoff_prob=1.0, handoff_length=None, no_body_prob=1 - beta)
    return Phase(guidance, continuation="guide", advantages=guide_advantages)


def guide_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    steps: torch.Tensor,
    decisions: torch.Tensor,
    gamma: float,
    gae_lambda: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The guide's Q minus V at the policy's decisions (an `agents.phase.Estimator`).

    The Q of the last decision is observed: the guide completed the text, and the GAE trace runs over the completion.
    An earlier decision is credited by the value of the next state, ``A_h = r_h + gamma V_g(s_{h+1}) - V_g(s_h)``,
    because a longer trace would include the policy's later mistakes.
    """
    trace, returns = gae(rewards, values, steps, gamma, gae_lambda)
    one_step, _ = gae(rewards, values, steps, gamma, 0.0)
    return torch.where(last_of(decisions), trace, one_step).masked_fill(~decisions, 0), returns


class AggreVaTeD(PPO):
    """Imitation of a guide's cost-to-go (Sun et al. 2017, arXiv 1703.01030; Chang et al. 2023, arXiv 2306.11816).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | with prob. beta, t policy tokens, else none | guide to the end | body | V of the guide, on completion |

    t is uniform on {1..T}. Where the policy ends the text before it has written t tokens there is no completion. The
    advantage of a decision is the guide's Q minus V: in the states that it visits, the policy learns the tokens from
    which the guide continues best, which is at most one step of improvement on the guide in each state.

    Differs from the paper: gradient steps are PPO's, and earlier decisions are credited by one-step differences of V.

    Raises:
        ValueError: The environment has no guide that can complete texts, or was made with ``handoff=True`` (here the
            schedule hands off, not the policy), or an argument is wrong.
    """

    name = "aggrevated"

    beta: float = 0.8
    """Probability that the policy begins the text, above 0."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that the guide can complete texts."""
        super().check_hyperparameters()
        check("beta", self.beta, 0 < self.beta <= 1, "in (0, 1]")
        check_guide(self.env, self.name, completes=True)

    @property
    def phase(self) -> Phase:
        """The guide completes every text."""
        return imitate(self.beta)
