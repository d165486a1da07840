"""DR-PO: PPO whose episodes often start from a prefix of a reference text."""

from __future__ import annotations

from agents.ppo_plus_plus import PPOPlusPlus
from textgym.engine import TextVectorEnv
from textgym.guides.base import Author


class DRPO(PPOPlusPlus):
    """Dataset reset policy optimisation (Chang et al. 2024, arXiv 2404.08495).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | with probability beta, the first t tokens of a reference | to the end | none | body | V of the policy, on body |

    Differs from the paper: as `PPO` does.

    Raises:
        ValueError: The environment was not made with ``guide="references"``, or an argument is wrong.
    """

    name = "dr-po"

    beta: float = 1.0
    """Probability that an episode starts from a prefix of a reference."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that the guide is the dataset's references."""
        made = isinstance(self.env, TextVectorEnv)  # an id is checked when the environment is made
        if made and getattr(self.env.guide, "author", None) != Author.REFERENCE:
            raise ValueError(f"env must be made with guide='references' for {self.name}, got {self.env.guide!r}")
        super().check_hyperparameters()
