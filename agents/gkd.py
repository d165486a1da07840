"""GKD: the guide's own texts are imitated, and the policy's own are judged token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from agents.algorithm import check_guide
from agents.guide_loss import GuideLoss, Likelihood
from agents.on_policy_distillation import OnPolicyDistillation

if TYPE_CHECKING:
    from collections.abc import Mapping

    from agents.curriculum import Curriculum


class GKD(OnPolicyDistillation):
    """Generalized knowledge distillation, GKD (Agarwal et al. 2024, arXiv 2306.13649, algorithm 1).

    | prefix | body | completion | policy gradient on | critic learns |
    |---|---|---|---|---|
    | some texts: the guide's | policy to the end | none | body, and likelihood of the prefix | none |

    A mix of two kinds of text: those of the policy lower the reverse KL to the guide, as in `OnPolicyDistillation`;
    those of the guide are learned by maximum likelihood, which lowers the forward KL. The share of the guide's texts,
    1 - lambda in the paper, is `guided` of ``curriculum={"name": "mixed", "guided": 0.5}``.

    Differs from the paper: its divergence is a sum over the vocabulary and the same for both kinds of text, and here it
    is estimated from the tokens that were drawn. Each kind has the mean over its own tokens, so that the weight of one
    against the other is the `coef` of the guide's loss, not the share. The last token of a guide's text is the policy's
    own decision, which the guide judges.

    Raises:
        ValueError: As for `OnPolicyDistillation`, or the guide cannot write.
    """

    name = "gkd"

    curriculum: Curriculum | Mapping[str, Any] | str | None = None
    """As for `PolicyGradient`; None for `agents.curriculum.Mixed` with half of the texts the guide's."""
    guide_loss: GuideLoss | Mapping[str, Any] | str | None = Likelihood()
    """As for `PolicyGradient`."""

    def __post_init__(self) -> None:
        if self.curriculum is None:
            self.curriculum = {"name": "mixed", "guided": 0.5}
        super().__post_init__()

    def check_hyperparameters(self) -> None:
        """Check the arguments, and that the guide can write as well as score."""
        check_guide(self.env, self.name)
        super().check_hyperparameters()
