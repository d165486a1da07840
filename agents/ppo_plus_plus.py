"""PPO++: PPO whose episodes often start where the guide would have got to."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from agents.algorithm import check, check_guide
from agents.policy import Policy
from agents.ppo import PPO
from textgym.guidance import Guidance

if TYPE_CHECKING:
    from textgym.engine import TextVectorEnv


class PPOPlusPlus(PPO):
    """PPO with restarts from guide states (Chang et al. 2023, arXiv 2306.11816).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | with probability beta, t guide tokens | policy to the end | none | body | V of the policy, on body |

    The guide writes a whole text of L tokens and the episode keeps the first t of them, t uniform on {0..L-1}. The
    mixture of starts covers the states that a good text passes through, which a weak policy alone would seldom reach.

    Args:
        policy: As for `PPO`.
        env: A `TextVectorEnv` with a guide.
        beta: Probability that an episode starts from a prefix of the guide.
        **hyperparameters: As for `PPO`.

    Raises:
        ValueError: The environment has no guide, or an argument is wrong.
    """

    name = "ppo++"

    def __init__(
        self, policy: Policy | str | os.PathLike, env: TextVectorEnv, *, beta: float = 0.6, **hyperparameters: Any
    ) -> None:
        check("beta", beta, 0 <= beta <= 1, "in [0, 1]")
        check_guide(env, self.name)
        super().__init__(policy, env, **hyperparameters)
        self.hyperparameters["beta"] = self.beta = beta

    def guidance(self) -> Guidance:
        """Restart from a guide's prefix with probability beta, cut as published."""
        return Guidance(restart_prob=self.beta, restart_length=None)
