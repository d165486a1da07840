"""The protocol of rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

Rewards = Sequence[float] | np.ndarray | Mapping[str, Sequence[float] | np.ndarray]


class RewardFunction(Protocol):
    """A function on batches of finished texts (keyword arguments as in TRL's reward functions).

    It may have an attribute ``fingerprint`` (str) that identifies the data and settings it depends on; results record
    it. It may have a method ``allowed_tokens(*, prompts, completions, references, tokenizer)`` that returns the tokens
    with which the N texts so far can still become good, bool (N, tokens); environments add it to their action masks.
    """

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Rewards:
        """Score N texts.

        Args:
            prompts: N prompt texts, as the policy saw them.
            completions: N texts written after them, without special tokens, leading space included.
            references: For each text the reference texts of its sample, which may be none.

        Returns:
            N floats, or a mapping from the name of a part to N floats; the reward is then the sum of the parts, and
            ``info["reward_parts"]`` shows each.
        """
        ...
