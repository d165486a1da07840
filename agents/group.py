"""What RLOO and GRPO share: several texts of one prompt, which are each other's baseline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from agents.algorithm import check, check_guide
from agents.policy import Policy
from agents.policy_gradient import PolicyGradient, in_parts
from agents.rollout import Rollout
from textgym.guidance import Guidance

if TYPE_CHECKING:
    from textgym.engine import TextVectorEnv


class GroupPolicyGradient(PolicyGradient):
    """Base class of the algorithms whose baseline is a group: k texts of one prompt and, with a guide, one prefix.

    Args:
        policy: As for `PolicyGradient`.
        env: As for `PolicyGradient`; its number of rows is a multiple of `group_size`, in every process.
        group_size: k. Texts with other prefixes would be other states, which need other baselines.
        beta: Probability that a group starts from a guide's prefix, cut as in PPO++; 0 needs no guide.
        **shared: As for `PolicyGradient`.

    Raises:
        ValueError: The environment has no guide where `beta` asks for one, its rows make no whole groups, or an
            argument is wrong.
    """

    def __init__(
        self,
        policy: Policy | str | os.PathLike,
        env: TextVectorEnv | str,
        *,
        group_size: int = 4,
        beta: float = 0.0,
        **shared: Any,
    ) -> None:
        check("group_size", group_size, group_size >= 2, "at least 2")
        check("beta", beta, 0 <= beta <= 1, "in [0, 1]")
        if beta:
            check_guide(env, f"{self.name} with beta={beta}")
        super().__init__(policy, env, **shared)
        check("group_size", group_size, self.env.num_envs % group_size == 0, f"a divisor of {self.env.num_envs} rows")
        self.hyperparameters |= {"group_size": group_size, "beta": beta}
        self.group_size, self.beta = group_size, beta

    def guidance(self) -> Guidance | tuple[Guidance, ...]:
        """Restart groups from a guide's prefix with probability beta."""
        return Guidance(restart_prob=self.beta) if self.beta else super().guidance()

    def play(self) -> Rollout:
        """Play whole groups, one after another."""
        return self.collect(group_size=self.group_size)

    def minibatches(self, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Split groups at random, `n_epochs` times: texts of one prompt stay together, and it is read once for all."""
        random = np.random.default_rng([self.seed, self.iteration])
        for _ in range(self.n_epochs):
            places = torch.from_numpy(random.permutation(len(self.last_rollout) // self.group_size)).to(rows.device)
            order = places[rows // self.group_size].argsort(stable=True)
            yield from in_parts(rows[order], self.minibatch_size)

    def group_returns(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> torch.Tensor:
        """Returns, (groups, k): rewards, less kl_coef times the summed KL where it is part of the reward."""
        returns = self.rewards(rollout)
        if self.kl_penalty == "reward":
            returns = returns - self.kl_coef * rollout.log_ratio(reference_log_probs).sum(1)
        return returns.unflatten(0, (-1, self.group_size))
