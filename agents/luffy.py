"""LUFFY: GRPO in whose groups one text is the guide's, which is learned off-policy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from agents.grpo import GRPO
from agents.guide_loss import GuideLoss, Shaped

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agents.curriculum import Curriculum


class LUFFY(GRPO):
    """Learning to reason under off-policy guidance (Yan et al. 2025, arXiv 2504.14945).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | one text of a group: the guide's | policy to the end | none | body and prefix | none |

    One text of a group of eight is the guide's; the baseline is the mean of all eight, and advantages are not divided
    by a deviation. The guide's tokens have the loss ``-A p / (p + 0.1)`` (`agents.guide_loss.Shaped`), the policy's own
    that of GRPO.

    Differs from the paper: the last token of the guide's text is left to the policy, as its own decision; no bonus for
    entropy.

    Raises:
        ValueError: As for `GroupPolicyGradient`.
    """

    name = "luffy"

    group_size: int = 8
    """k, the number of texts of a group."""
    curriculum: Curriculum | Mapping[str, Any] | str | None = "mixed"
    """As for `PolicyGradient`."""
    guide_loss: GuideLoss | Mapping[str, Any] | str | None = Shaped()
    """As for `PolicyGradient`."""
    kl_coef: float = 0.0
    """Weight of the KL penalty; none as published."""
    scale: Literal["group", "batch", "none"] = "none"
    """As for `GRPO`."""
    length_norm: Literal["text", "batch", "horizon"] = "horizon"
    """As for `GRPO`."""
