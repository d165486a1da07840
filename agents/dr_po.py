"""DR-PO: PPO that starts from what people wrote."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from agents.policy import Policy
from agents.ppo_plus_plus import PPOPlusPlus
from textgym.guides.base import Author

if TYPE_CHECKING:
    from textgym.engine import TextVectorEnv


class DRPO(PPOPlusPlus):
    """Dataset reset policy optimisation (Chang et al. 2024, arXiv 2404.08495).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | with probability beta, the first t tokens of a reference | to the end | none | body | V of the policy, on body |

    Args:
        policy: As for `PPO`.
        env: A `TextVectorEnv` made with ``guide="references"``.
        beta: Probability that an episode starts from a reference.
        **hyperparameters: As for `PPO`.

    Raises:
        ValueError: The environment has another guide or none, or an argument is wrong.
    """

    name = "dr-po"

    def __init__(
        self, policy: Policy | str | os.PathLike, env: TextVectorEnv, *, beta: float = 0.6, **hyperparameters: Any
    ) -> None:
        guide = getattr(env, "guide", None)
        if getattr(guide, "author", None) != Author.REFERENCE:
            raise ValueError(f"env must be made with guide='references' for {self.name}, got {guide!r}")
        super().__init__(policy, env, beta=beta, **hyperparameters)
