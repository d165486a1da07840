"""A phase: who writes the episodes of an iteration, and how their decisions are credited."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from agents.advantages import policy_advantages
from agents.policy.interface import Continuation

if TYPE_CHECKING:
    from agents.rollout import Rollout
    from textgym.guidance import Guidance

#: Takes rewards and values, float (N, T), steps and decisions, bool (N, T), gamma and lambda; returns advantages of the
#: decisions and returns of the steps, float (N, T).
Estimator = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Phase:
    """Who writes the episodes of an iteration, and how their decisions are credited.

    `PPO` follows a phase of its own every iteration: by default this one, in which the policy writes everything.
    `agents.ppo_plus_plus.restart` and `agents.aggrevated.imitate` make others; `LOLS` and `D2LOLS` change between them.

    Attributes:
        guidance: Who starts and who completes episodes: one `Guidance`, or one per row; None as the environment was
            made.
        continuation: Who writes the rest of a text after the policy's last decision, and so whose value function is
            learned, on the steps that it wrote.
        advantages: How advantages and returns are estimated from rewards and values.
    """

    guidance: Guidance | tuple[Guidance, ...] | None = None
    continuation: Continuation = "policy"
    advantages: Estimator = policy_advantages

    def learned(self, rollout: Rollout) -> Tensor:
        """Bool (N, T): the steps before which the value function is learned."""
        return rollout.decisions if self.continuation == "policy" else rollout.completion
