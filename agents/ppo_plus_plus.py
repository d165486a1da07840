"""PPO++: PPO whose episodes often start from a prefix that the guide wrote."""

from __future__ import annotations

from agents.algorithm import check_guide
from agents.phase import Phase
from agents.ppo import PPO
from textgym.checks import check
from textgym.guidance import Guidance


def restart(beta: float) -> Phase:
    """The policy completes texts, which start from a guide's prefix with probability beta.

    The guide writes a whole text of L tokens and the episode keeps the first t of them, t uniform on {0..L-1}.
    """
    return Phase(Guidance(restart_prob=beta))


class PPOPlusPlus(PPO):
    """PPO with restarts from guide states (Chang et al. 2023, arXiv 2306.11816).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | with probability beta, t guide tokens | policy to the end | none | body | V of the policy, on body |

    The mixture of starts covers the states that a good text passes through, which a weak policy alone would seldom
    reach.

    Differs from the paper: as `PPO` does.

    Raises:
        ValueError: The environment has no guide, or an argument is wrong.
    """

    name = "ppo++"

    beta: float = 0.6
    """Probability that an episode starts from a prefix of the guide."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that there is a guide."""
        super().check_hyperparameters()
        check("beta", self.beta, 0 <= self.beta <= 1, "in [0, 1]")
        check_guide(self.env, self.name)

    @property
    def phase(self) -> Phase:
        """Restarts from the guide's prefixes."""
        return restart(self.beta)
