"""UFT: GRPO from ever shorter prefixes of the guide, which are imitated as well."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agents.grpo import GRPO
from agents.guide_loss import GuideLoss, Likelihood

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agents.curriculum import Curriculum


class UFT(GRPO):
    """Unified fine-tuning (Liu et al. 2025, arXiv 2505.16984).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | the guide's, ever shorter, then none | policy to the end | none | body; likelihood of the prefix | none |

    ``L = L_GRPO - coef mean log pi`` with the mean over the tokens of the prefixes: `agents.curriculum.Cosine` says how
    long these are, `agents.guide_loss.Likelihood` has the weight, both as in the authors' code.

    Differs from the paper: the length of the schedule is that of `agents.curriculum.Cosine` unless another is given.

    Raises:
        ValueError: As for `GroupPolicyGradient`.
    """

    name = "uft"

    curriculum: Curriculum | Mapping[str, Any] | str | None = "cosine"
    """As for `PolicyGradient`."""
    guide_loss: GuideLoss | Mapping[str, Any] | str | None = Likelihood(coef=0.001)
    """As for `PolicyGradient`."""
