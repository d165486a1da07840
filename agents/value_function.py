"""The value function of actor-critic algorithms, on the policy's network or on a separate one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agents.advantages import gae, masked_mean
from agents.processes import in_shares

if TYPE_CHECKING:
    from accelerate import Accelerator

    from agents.policy import Continuation, Policy
    from agents.rollout import Rollout


class ValueFunction:
    """Values of the states of an iteration's episodes.

    Differs from the literature in how it starts: the first time that a continuation is evaluated, its values are
    shifted to the mean return of the states that will be learned. If values of the other continuation were learned
    before, they are copied first, because the network's features now serve that head. Gradient steps of a size that
    suits the policy hardly move a bias: an offset would be learned through the mean of the features, which ranks the
    states wrongly, and the first advantages would mostly reflect how near the end a token is.

    Args:
        network: The policy, or a copy of it, whose value heads are used.
        learner: The module on which gradient steps for `network` are taken (see `Algorithm.twin_of`).
        recorded: Whether rollouts hold `network`'s values of the policy's states.
        accelerator: Divides the passes through the network among processes.
        rows_at_once: Number of episodes per pass through the network.
        gamma: Discount factor of the returns.

    Attributes:
        started: The continuations whose values have started.
    """

    def __init__(
        self,
        network: Policy,
        learner: Policy,
        *,
        recorded: bool,
        accelerator: Accelerator,
        rows_at_once: int,
        gamma: float,
    ) -> None:
        self.network, self.learner, self.recorded = network, learner, recorded
        self.accelerator, self.rows_at_once, self.gamma = accelerator, rows_at_once, gamma
        self.started: list[Continuation] = []

    def __call__(self, rollout: Rollout, rewards: Tensor, steps: Tensor, learned: Tensor, of: Continuation) -> Tensor:
        """Values of the states before steps; a continuation's first call starts its values.

        Args:
            rollout: N episodes.
            rewards: float (N, T), of the steps.
            steps: bool (N, T), up to the end of each episode.
            learned: bool (N, T), the steps before which the state's value is learned.
            of: Who continues the texts.

        Returns:
            float (N, T), zero outside of `steps`.
        """
        starts = of not in self.started and bool(learned.any())
        copied = starts and bool(self.started)
        if copied:
            self.network.copy_values(to=of)
        recorded = self.recorded and of == "policy" and not copied
        values = rollout.values if recorded else self.of_states(rollout, steps, of)
        values = values.masked_fill(~steps, 0)
        if starts:
            _, returns = gae(rewards, values, steps, self.gamma, 1.0)
            shift = float(masked_mean(returns - values, learned))
            self.network.shift_values(of, shift)
            self.started.append(of)
            values = (values + shift).masked_fill(~steps, 0)
        return values

    @torch.no_grad()
    def of_states(self, rollout: Rollout, steps: Tensor, of: Continuation) -> Tensor:
        """Values (N, T) of the states before `steps`, by the current weights."""
        columns, rows = rollout.columns(steps), torch.nonzero(steps.any(1)).flatten()

        def values(part: Tensor) -> Tensor:
            return self.network.values(rollout.input_ids[part], rollout.attention_mask[part], columns[part], of)

        return in_shares(self.accelerator, torch.zeros_like(rollout.values), rows, self.rows_at_once, values)
