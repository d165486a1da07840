"""The base class of RLOO and GRPO: several texts of one prompt, which are each other's baseline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from agents.algorithm import check_guide
from agents.phase import Phase
from agents.policy_gradient import PolicyGradient
from agents.ppo_plus_plus import restart
from agents.processes import in_parts
from agents.rollout import Rollout
from textgym.checks import check


class GroupPolicyGradient(PolicyGradient):
    """Base class of the algorithms whose baseline is a group: k texts of one prompt and, with a guide, one prefix.

    The rows of `env`, in every process, are a multiple of `group_size`.

    Raises:
        ValueError: The environment has no guide and `beta` is above 0, its number of rows is not a multiple of
            `group_size`, or an argument is wrong.
    """

    group_size: int = 4
    """k, the number of texts of a group, which have the same prompt and prefix, and so the same baseline."""
    beta: float = 0.0
    """Probability that a group starts from a guide's prefix, cut as in PPO++; 0 needs no guide."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that there is a guide where `beta` needs one."""
        super().check_hyperparameters()
        check("group_size", self.group_size, self.group_size >= 2, "at least 2")
        check("beta", self.beta, 0 <= self.beta <= 1, "in [0, 1]")
        if self.beta:
            check_guide(self.env, f"{self.name} with beta={self.beta}")

    def __post_init__(self) -> None:
        super().__post_init__()
        rows = self.env.num_envs
        check("group_size", self.group_size, rows % self.group_size == 0, f"a divisor of {rows} rows")

    @property
    def phase(self) -> Phase:
        """Groups restart from a guide's prefix with probability beta."""
        return restart(self.beta) if self.beta else Phase()

    def play(self, **options: Any) -> Rollout:
        """Play whole groups, one after another."""
        return super().play(group_size=self.group_size, **options)

    def minibatches(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Split groups at random, `n_epochs` times: a group stays together, so that its prompt is read once."""
        random = np.random.default_rng([self.seed, self.iteration])
        for _ in range(self.n_epochs):
            places = torch.from_numpy(random.permutation(len(self.last_rollout) // self.group_size)).to(rows.device)
            order = places[rows // self.group_size].argsort(stable=True)
            yield from in_parts(rows[order], self.minibatch_size)

    def group_returns(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> torch.Tensor:
        """Returns, (groups, k): rewards, minus kl_coef times the summed KL if it is part of the reward."""
        returns = self.rewards(rollout)
        if self.kl_penalty == "reward":
            returns = returns - self.kl_coef * rollout.log_ratio(reference_log_probs).sum(1)
        return returns.unflatten(0, (-1, self.group_size))
