"""HPT: GRPO where a group has successes, imitation of the guide where it has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from agents.algorithm import check_guide
from agents.grpo import GRPO
from agents.guide_loss import GuideLoss, Likelihood
from textgym.checks import check

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agents.rollout import Rollout


class HPT(GRPO):
    """Hybrid post-training (Lv et al. 2025, arXiv 2509.04419), a switch between imitation and reinforcement.

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | in failed groups one text: the guide's | policy to the end | none | body, or likelihood of the prefix | none |

    A group whose share of successes is at most `gate` has failed: the guide's text takes the place of its first text,
    is learned by maximum likelihood, and the group has no policy gradient. All other groups are GRPO's.

    Differs from the paper: the last token of the guide's text is the policy's own, and not learned. The mean of the
    likelihood is over the guide's tokens of a minibatch, that of GRPO over all its texts.

    Raises:
        ValueError: As for `GroupPolicyGradient`, or `dead_groups` is not "keep".
    """

    name = "hpt"

    guide_loss: GuideLoss | Mapping[str, Any] | str | None = Likelihood()
    """As for `PolicyGradient`."""
    gate: float = 0.0
    """The share of successes up to which a group is imitation's."""

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that there is a guide."""
        super().check_hyperparameters()
        check("gate", self.gate, 0 <= self.gate < 1, "in [0, 1)")
        check(
            "dead_groups", self.dead_groups, self.dead_groups == "keep", f'"keep" for {self.name}, which imitates them'
        )
        check_guide(self.env, self.name)

    def play(self) -> Rollout:
        """Play groups, then let the guide's text take the place of the first text of each that failed."""
        rollout = super().play()
        successes = (rollout.rewards >= self.success).view(-1, self.group_size).float().mean(1)
        self.failed = successes <= self.gate
        self.play_record["imitated_groups"] = float(self.failed.float().mean())
        rows = torch.nonzero(self.failed).flatten() * self.group_size
        if len(rows):
            whole = self.replay_from(rollout, rows, 1.0, attempt=0, group_size=1)
            self.last_rollout = rollout = rollout.with_rows(rows, whole)
        return rollout

    def relative(self, rollout: Rollout, returns: torch.Tensor, leave_one_out: bool) -> torch.Tensor:
        """Failed groups have no advantage."""
        return super().relative(rollout, returns, leave_one_out).masked_fill(self.failed[:, None], 0)

    def guide_tokens(self, rollout: Rollout) -> torch.Tensor:
        """Only failed groups imitate."""
        return super().guide_tokens(rollout) & self.failed.repeat_interleave(self.group_size)[:, None]
