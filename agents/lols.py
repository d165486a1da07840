"""LOLS and D2LOLS: iterations of AggreVaTeD (imitation) and of PPO++ (improvement), mixed or one after the other."""

from __future__ import annotations

from agents.aggrevated import imitate
from agents.algorithm import check_guide
from agents.phase import Phase
from agents.ppo import PPO
from agents.ppo_plus_plus import restart
from textgym.checks import check
from textgym.seeding import uniform


class LOLS(PPO):
    """Locally optimal learning to search (Chang et al. 2015, arXiv 1502.02206; Chang et al. 2023, arXiv 2306.11816).

    | iteration | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|---|
    | with probability tau, as PPO++ | with prob. beta, t guide tokens | to the end | none | body | V of the policy |
    | else, as AggreVaTeD | none | with prob. beta, t policy tokens | guide | body | V of the guide, on completion |

    The two value functions are two heads of one network.

    Differs from the first paper: gradient steps are PPO's, and the draw is per iteration, not per episode.

    Raises:
        ValueError: As for `AggreVaTeD`.
    """

    name = "lols"

    tau: float = 0.8
    """Probability that an iteration is one of PPO++."""
    beta: float = 0.8
    """Fraction of the episodes with a prefix, or with a body."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that the guide can complete texts."""
        super().check_hyperparameters()
        check("tau", self.tau, 0 <= self.tau <= 1, "in [0, 1]")
        check("beta", self.beta, 0 < self.beta <= 1, "in (0, 1]")
        check_guide(self.env, self.name, completes=True)

    @property
    def phase(self) -> Phase:
        """Drawn at random for each iteration."""
        return restart(self.beta) if uniform(self.seed, self.iteration) < self.tau else imitate(self.beta)


class D2LOLS(PPO):
    """Direct and differentiable LOLS (Chang et al. 2023, arXiv 2306.11816): first imitate the guide, then surpass it.

    | iteration | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|---|
    | the first tau, as AggreVaTeD | none | with prob. beta, t policy tokens | guide | body | V of the guide |
    | after, as PPO++ | with prob. beta, t guide tokens | to the end | none | body | V of the policy |

    Differs from the paper: when the phase changes, the new value head starts as a copy of the other one
    (`agents.value_function`); otherwise as PPO++ and AggreVaTeD.

    Raises:
        ValueError: As for `AggreVaTeD`.
    """

    name = "d2lols"

    tau: int = 20
    """Iterations of AggreVaTeD."""
    beta: float = 0.8
    """Fraction of the episodes with a body, or with a prefix."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that the guide can complete texts."""
        super().check_hyperparameters()
        check("tau", self.tau, self.tau >= 0, "an int of at least 0, a number of iterations")
        check("beta", self.beta, 0 < self.beta <= 1, "in (0, 1]")
        check_guide(self.env, self.name, completes=True)

    @property
    def phase(self) -> Phase:
        """The guide is imitated in the first tau iterations."""
        return imitate(self.beta) if self.iteration < self.tau else restart(self.beta)
