"""The value function of actor-critic algorithms, on the policy's network or on one of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from agents.advantages import gae, masked_mean
from agents.processes import in_parts, reduce, share

if TYPE_CHECKING:
    from accelerate import Accelerator

    from agents.policy import Continuation, Policy
    from agents.rollout import Rollout


class ValueFunction:
    """Values of the states of an iteration's episodes.

    Its one departure from the books is how it starts. The first time that states are judged for a continuation, its
    values are shifted to the mean return of the states that will be learned; where those of the other continuation were
    learned already, they begin as a copy of these, since the features of the network now serve that head. Gradient
    steps of a size that suits the policy hardly move a bias: an offset would be learned through the mean of the
    features, in the wrong order of the states, and the first advantages would mostly say how near the end a token is.

    Args:
        network: Whose value heads are used: the policy, or a copy of it.
        learner: What gradient steps on `network` are taken on (see `Algorithm.twin_of`).
        recorded: Whether rollouts hold what `network` said of the policy's states as they were played.
        accelerator: Shares the passes through the network out among processes.
        rows_at_once: Episodes that the network reads at a time.
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
        """Values of the states before steps, started where they have not been.

        Args:
            rollout: N episodes.
            rewards: float (N, T), of the steps.
            steps: bool (N, T), up to the end of each episode.
            learned: bool (N, T), the steps before which the value is learned.
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
        """Values (N, T) of the states before `steps`, as the network says now."""
        columns, values = rollout.columns(steps), torch.zeros_like(rollout.values)
        mine = share(self.accelerator, torch.nonzero(steps.any(1)).flatten())
        for rows in in_parts(mine, self.rows_at_once):
            values[rows] = self.network.values(
                rollout.input_ids[rows], rollout.attention_mask[rows], columns[rows], of
            ).to(values.dtype)
        return reduce(self.accelerator, values)
