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

    Each iteration of `PPO` has a phase: by default this one, in which the policy writes everything.
    `agents.ppo_plus_plus.restart` and `agents.aggrevated.imitate` make others; `LOLS` and `D2LOLS` alternate them.

    Attributes:
        guidance: Who starts and who completes episodes: one `Guidance`, or one per row; None for the
            environment's own guidance.
        continuation: Who writes the rest of a text after the policy's last decision. This author's value function is
            learned, on the steps that it wrote.
        advantages: How advantages and returns are estimated from rewards and values.
    """

    guidance: Guidance | tuple[Guidance, ...] | None = None
    continuation: Continuation = "policy"
    advantages: Estimator = policy_advantages

    def learned(self, rollout: Rollout) -> Tensor:
        """Bool (N, T): the steps before which the state's value is learned."""
        return rollout.decisions if self.continuation == "policy" else rollout.completion
