"""Prefix-RFT: GRPO in whose groups one text continues a prefix of the guide, which is learned with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from agents.grpo import GRPO
from agents.guide_loss import Clipped, GuideLoss

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agents.curriculum import Curriculum


class PrefixRFT(GRPO):
    """Blending supervised and reinforcement fine-tuning with prefix sampling (Huang et al. 2025, arXiv 2507.01679).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | one text of a group: the guide's, ever shorter | policy to the end | none | body, part of the prefix | none |

    One text of a group of eight continues a prefix of the guide's text, whose length falls on a cosine from 0.95 to
    0.05 of it (`agents.curriculum.Mixed`). The fifth of the prefix's tokens at which the policy's entropy is highest
    carries the advantage of that text, as if the policy had written it (`agents.guide_loss.Clipped`).

    Raises:
        ValueError: As for `GroupPolicyGradient`.
    """

    name = "prefix-rft"

    group_size: int = 8
    """k, the number of texts of a group."""
    curriculum: Curriculum | Mapping[str, Any] | str | None = None
    """As for `PolicyGradient`; None for `agents.curriculum.Mixed` from 0.95 to 0.05."""
    guide_loss: GuideLoss | Mapping[str, Any] | str | None = Clipped()
    """As for `PolicyGradient`."""
    kl_coef: float = 0.0
    """Weight of the KL penalty."""
    scale: Literal["group", "batch", "none"] = "none"
    """As for `GRPO`; "none" as published (Dr. GRPO)."""
    length_norm: Literal["text", "batch", "horizon"] = "horizon"
    """As for `GRPO`; "horizon" as published (Dr. GRPO)."""

    def __post_init__(self) -> None:
        if self.curriculum is None:
            self.curriculum = {"name": "mixed", "high": 0.95, "low": 0.05}
        super().__post_init__()
