"""MENTOR: GRPO in whose groups some texts are the guide's where the policy is uncertain."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from agents.algorithm import check_guide
from agents.curriculum import Plan, cosine
from agents.grpo import EPSILON, GRPO
from agents.guide_loss import Clipped, GuideLoss
from agents.phase import Phase
from agents.policy_gradient import Credit
from agents.rollout import Rollout
from textgym.checks import check
from textgym.guidance import Guidance

if TYPE_CHECKING:
    from collections.abc import Mapping

# As in the authors' code: nats that no distribution has, so that the guide is hardly ever asked.
FIRST_THRESHOLD = 999.0
# For a policy that was certain of everything, so that it is helped again where it no longer is.
SMALLEST_THRESHOLD = 1e-6


class MENTOR(GRPO):
    """Mixed-policy expert navigation for token-level optimization of reasoning (Jiang et al. 2025, arXiv 2510.04140).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | policy to the end; in some texts of a group the guide writes uncertain tokens | none | every token | none |

    In `guided_texts` of a group's k texts a token is the guide's with probability min(1, H / threshold), where H is the
    entropy of the policy there: a token of ``pi + min(1, H / threshold) (pi_g - pi)``. The threshold is a quantile of
    the entropies in the other texts of the iteration before; in the first one the guide is hardly ever asked.

    These texts have the advantage ``w max(0, r - m)``, m the mean reward of the others of the group, whose advantages
    are those of GRPO among themselves. All tokens have the clipped surrogate, the guide's as if the policy had written
    them. The weight w falls on a cosine from 1 to 0 over `iterations`, after which no text is guided.

    Records have the mean reward of the texts that are not guided, "reward_alone", the threshold, "entropy_threshold",
    and w, "guided_weight".

    Differs from the paper: the guide is asked for single tokens and need not tell probabilities, where the authors mix
    distributions; entropies are those of the policy that played, not of the passes that trained.

    Raises:
        ValueError: As for `GroupPolicyGradient`, or the environment has no guide that can complete texts, or texts that
            are handed off by the policy's choice.
    """

    name = "mentor"

    group_size: int = 8
    """k, the number of texts of a group."""
    guided_texts: int = 4
    """How many of them the guide takes part in."""
    quantile: float = 0.95
    """Which quantile of the policy's entropies is the threshold; 0.95 as in the authors' code."""
    iterations: int = 120
    """Iterations in which w falls to 0; 120 as in the authors' code."""
    guide_loss: GuideLoss | Mapping[str, Any] | str | None = Clipped(share=1.0)
    """As for `PolicyGradient`; its `clip_range` is that of the guide's tokens."""
    baseline: Literal["group", "start", "unguided"] = "unguided"
    """As for `GroupPolicyGradient`; no other, and no `curriculum`, `beta` or `dead_groups` that give prefixes."""
    kl_coef: float = 0.0
    """Weight of the KL penalty."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that there is a guide that can write in the middle of a text."""
        super().check_hyperparameters()
        allowed = f"in {{1..group_size - 2 = {self.group_size - 2}}}, so that two texts are without the guide"
        check("guided_texts", self.guided_texts, 1 <= self.guided_texts <= self.group_size - 2, allowed)
        check("quantile", self.quantile, 0 <= self.quantile <= 1, "in [0, 1]")
        check("iterations", self.iterations, self.iterations >= 1, "at least 1")
        # Prefixes would be a second way to help, whose texts are no baseline either.
        for name, value in (("baseline", "unguided"), ("dead_groups", "keep"), ("curriculum", None), ("beta", 0)):
            check(name, getattr(self, name), getattr(self, name) == value, f"{value!r} for {self.name}")
        check_guide(self.env, self.name, completes=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.threshold = FIRST_THRESHOLD

    @property
    def weight(self) -> float:
        """W above, in this iteration."""
        return cosine(1.0, 0.0, self.iteration / self.iterations)

    @property
    def phase(self) -> Phase:
        """The guide takes part in the first texts of each group."""
        alone = Guidance()
        if not self.weight:
            return Phase(guidance=alone)
        mixed = Guidance(handoff_prob=1.0, handoff_entropy=self.threshold, handoff_tokens=1)
        rest = self.group_size - self.guided_texts
        return Phase(guidance=(mixed,) * self.guided_texts + (alone,) * rest)

    def plan(self) -> Plan:
        """Samples without prefixes: under a plan each text of a group has guidance and random numbers of its own."""
        groups = self.episodes_per_iteration // self.group_size
        samples = np.random.default_rng([self.seed, self.iteration, 3]).integers(len(self.env.data), size=groups)
        return Plan(samples, np.zeros((groups, self.group_size)), [None] * groups)

    def helped(self, rollout: Rollout) -> torch.Tensor:
        """The texts that the guide may take part in, asked or not: whether it was says something about the text."""
        member = torch.arange(len(rollout), device=rollout.rewards.device) % self.group_size
        return (member < self.guided_texts) & (self.weight > 0)

    def iterate(self) -> dict[str, Any]:
        """An iteration of GRPO; its entropies are the next one's threshold."""
        record = super().iterate()
        rollout = self.last_rollout
        alone = ~self.helped(rollout)
        record["reward_alone"] = float(rollout.rewards[alone].mean())
        record |= {"entropy_threshold": self.threshold, "guided_weight": self.weight}
        entropies = rollout.entropies[alone[:, None] & rollout.body].cpu().numpy()
        if self.weight and len(entropies):
            self.threshold = max(float(np.quantile(entropies, self.quantile)), SMALLEST_THRESHOLD)
        return record

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """GRPO's advantages among the texts without the guide, those of the others weighted."""
        returns = self.group_returns(rollout, reference_log_probs)
        helped = self.helped(rollout).view_as(returns)
        advantages = self.relative(rollout, returns, leave_one_out=False)
        if self.scale != "none":
            # Of the texts without the guide, whose mean is the baseline.
            over = [1] if self.scale == "group" else [0, 1]
            squares = advantages.masked_fill(helped, 0).square().sum(over, keepdim=True)
            deviation = (squares / ((~helped).sum(over, keepdim=True) - 1)).sqrt()
            advantages = torch.where(helped, advantages, advantages / (deviation + EPSILON))
        advantages = torch.where(helped, self.weight * advantages, advantages)
        return Credit.without_critic(rollout, reference_log_probs, advantages.flatten())

    def training_state(self) -> dict[str, Any]:
        """Add the threshold."""
        return {**super().training_state(), "threshold": self.threshold}

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a `training_state`."""
        super().load_training_state(state)
        self.threshold = state["threshold"]
