"""What a text is worth: the protocol every reward follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

Rewards = Sequence[float] | np.ndarray | Mapping[str, Sequence[float] | np.ndarray]


class RewardFunction(Protocol):
    """A function on batches of finished texts (keyword arguments as in TRL's reward functions).

    It may also carry a ``fingerprint`` attribute (str) that says what it was trained on; results record it. And it may
    have a method ``allowed_tokens(*, prompts, completions, references, tokenizer)`` that says which tokens can still
    lead to a good text: bool (N, tokens) for the N texts so far, which environments add to their action masks.
    """

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> Rewards:
        """Score N texts.

        Args:
            prompts: N prompt texts, as the policy saw them.
            completions: N texts written after them, without special tokens, leading space included.
            references: For each text its sample's reference texts (maybe none).

        Returns:
            N floats, or a mapping from the name of a part to N floats; the reward is then the sum of the parts, and
            ``info["reward_parts"]`` shows each.
        """
        ...
