"""PAV: GRPO with a reward for progress, by which a step makes it easier for a guide to succeed."""

from __future__ import annotations

from typing import Literal

import torch

from agents.algorithm import check_guide
from agents.grpo import GRPO
from agents.monte_carlo import progress
from agents.policy_gradient import Credit
from agents.rollout import Rollout
from textgym.checks import check
from textgym.guidance import Guidance


class PAV(GRPO):
    """Rewarding progress (Setlur et al. 2024, arXiv 2410.08146, equation 5), with the guide as prover.

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | none | policy to the end; the guide, K times, from states along it | none | body | none |

    Every episode is cut into steps of m decisions. A step from state s to s' makes progress ``V_g(s') - V_g(s)``.
    V_g(s) is the mean reward of K texts that the guide completes from s, and after the last step the episode's own
    reward. The advantage of the step's decisions is ``A + progress_coef (V_g(s') - V_g(s))``, with the advantage A of
    the text in its group. With a large `progress_coef` this is AggreVaTeD with Monte Carlo values, in the states of
    the policy's whole texts.

    The guide's further texts train nothing, and are in `num_guide_tokens`.

    Differs from the paper: values are means over completions, not those of a model that was trained to predict them; a
    step is a number of decisions, not a line of reasoning; the policy's own advantage is that of a group.

    Raises:
        ValueError: As for `GroupPolicyGradient`, or the environment has no guide that can complete texts.
    """

    name = "pav"

    progress_coef: float = 1.0
    """Weight of progress beside the advantage, both in units of the reward where `scale` is "none"."""
    rollouts_per_state: int = 4
    """K above."""
    tokens_per_step: int = 8
    """m above; 1 values every state."""
    scale: Literal["group", "batch", "none"] = "none"
    """As for `GRPO`; progress is not divided."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that the guide can complete texts."""
        super().check_hyperparameters()
        check("progress_coef", self.progress_coef, self.progress_coef >= 0, "at least 0")
        for name in ("rollouts_per_state", "tokens_per_step"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        check_guide(self.env, self.name, completes=True)

    def credit(self, rollout: Rollout, reference_log_probs: torch.Tensor) -> Credit:
        """Advantages in the group, and the progress of each step."""
        credit = super().credit(rollout, reference_log_probs)
        alone = Guidance(handoff_prob=1.0, no_body_prob=1.0)
        gains, _ = progress(self, rollout, self.tokens_per_step, self.rollouts_per_state, alone)
        self.play_record["progress"] = float(gains[rollout.decisions].abs().mean())
        credit.advantages = credit.advantages + self.progress_coef * gains
        return credit
