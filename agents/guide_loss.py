"""What a policy learns from the tokens of its episodes that a guide wrote: prefixes, completions after a hand-off."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from agents.arguments import by_name
from textgym.checks import check, is_number


@dataclass(frozen=True)
class GuideLoss:
    """A loss on the guide's tokens, which algorithms add to their own as ``guide_loss``.

    Attributes:
        name: What the loss is called in arguments and checkpoints.
        credited: Whether it reads the advantages of the texts in which the tokens stand; it then needs an algorithm
            with groups, and every token weighs as much as a decision does. Else it is a mean over the guide's tokens.
        compares: Whether it reads the policy's probabilities before the update, which takes a forward pass.
        coef: Its weight.
    """

    name: str = field(init=False)
    credited: ClassVar[bool] = False
    compares: ClassVar[bool] = False
    coef: float = 1.0

    def __post_init__(self) -> None:
        check("guide_loss coef", self.coef, is_number(self.coef) and self.coef >= 0, "a number of at least 0")

    @classmethod
    def of(cls, value: GuideLoss | Mapping[str, Any] | str) -> GuideLoss:
        """A loss, given one, its name, or a mapping of its name and settings.

        Raises:
            TypeError: A setting that it does not have.
            ValueError: There is none of this name, or a setting is wrong.
        """
        return by_name("guide_loss", value, cls)

    def __call__(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The loss of each token.

        Args:
            log_probs: float (B, T), of the guide's tokens under the current policy.
            old_log_probs: float (B, T), before the update; zero unless `compares`.
            advantages: float (B, T), of the text in which each token stands; zero unless `credited`.

        Returns:
            float (B, T); only entries at the guide's tokens are read.
        """
        raise NotImplementedError(f"{type(self).__name__} must define __call__")

    def chosen(self, tokens: Tensor, entropy: Tensor) -> Tensor:
        """Which of the guide's tokens are learned: by default all.

        Args:
            tokens: bool (N, T), where the guide wrote.
            entropy: float (N, T), of the policy there before the update, in nats; zero unless `compares`.
        """
        return tokens


@dataclass(frozen=True)
class Likelihood(GuideLoss):
    """Imitation: ``-log pi`` (UFT, Liu et al. 2025, arXiv 2505.16984, with coef = 0.001)."""

    name: str = field(default="likelihood", init=False)

    def __call__(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The negative log-likelihood."""
        return -log_probs


@dataclass(frozen=True)
class Uncertain(GuideLoss):
    """Imitation where the policy is undecided: ``-p (1 - p) log pi``, the weight without a gradient.

    The phi of CHORD (Zhang et al. 2025, arXiv 2508.11408): neither what the policy knows nor what is far from all it
    would write is learned.
    """

    name: str = field(default="uncertain", init=False)

    def __call__(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The weighted negative log-likelihood."""
        probs = log_probs.detach().exp()
        return -probs * (1 - probs) * log_probs


@dataclass(frozen=True)
class Shaped(GuideLoss):
    """The guide's tokens as off-policy actions: ``-A p / (p + gamma)`` (LUFFY, Yan et al. 2025, arXiv 2504.14945).

    The guide's own probability of its tokens is taken as 1, so that p is the importance ratio. Shaped, its gradient is
    largest where p is near gamma, and the rare tokens count that p alone would pass over.

    Attributes:
        gamma: The probability at which half of the advantage is reached; 0.1 as in the authors' code.
    """

    name: str = field(default="shaped", init=False)
    credited: ClassVar[bool] = True
    gamma: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check("guide_loss gamma", self.gamma, is_number(self.gamma) and self.gamma > 0, "a number above 0")

    def __call__(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The shaped ratio times the advantage, negated."""
        probs = log_probs.exp()
        return -advantages * probs / (probs + self.gamma)


@dataclass(frozen=True)
class Clipped(GuideLoss):
    """The guide's tokens as if the policy had written them, at the most uncertain ones (Prefix-RFT, arXiv 2507.01679).

    ``-min(rho A, clip(rho, 1 - c, 1 + c) A)`` with rho the ratio to the policy before the update, on the share of each
    text's guide tokens at which the policy's entropy is highest.

    Attributes:
        clip_range: c.
        share: Part of a text's guide tokens that is learned, at least one; 0.2 as published.
    """

    name: str = field(default="clipped", init=False)
    credited: ClassVar[bool] = True
    compares: ClassVar[bool] = True
    clip_range: float = 0.2
    share: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        clip_range, share = self.clip_range, self.share
        check("guide_loss clip_range", clip_range, is_number(clip_range) and clip_range > 0, "a number above 0")
        check("guide_loss share", share, is_number(share) and 0 < share <= 1, "a number in (0, 1]")

    def __call__(self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor) -> Tensor:
        """The clipped surrogate."""
        ratio = (log_probs - old_log_probs).exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return -torch.minimum(ratio * advantages, clipped * advantages)

    def chosen(self, tokens: Tensor, entropy: Tensor) -> Tensor:
        """The tokens of highest entropy, the earlier ones of equals."""
        order = entropy.masked_fill(~tokens, -torch.inf).argsort(dim=1, descending=True, stable=True)
        count = (self.share * tokens.sum(1, keepdim=True)).ceil()
        return tokens & (order.argsort(dim=1) < count)
