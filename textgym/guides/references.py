"""The dataset's reference texts as a guide that can only start an episode."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from textgym.guides.base import Author, Completion, GuideRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ReferenceGuide:
    """Completes a prompt with one of the references of its sample, chosen by the seed of the request.

    It cannot hand off: a reference does not continue a text that another author began.
    """

    author = Author.REFERENCE
    can_hand_off = False

    def complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Return one reference per request.

        Raises:
            ValueError: A request has no references, or has a prefix.
        """
        for request in requests:
            if not request.references:
                raise ValueError(
                    "guide='references' needs a reference for every sample, and the sample of prompt "
                    f"{request.prompt!r} has none"
                )
            if request.prefix_ids:
                raise ValueError("guide='references' can only restart an episode, it cannot complete a begun text")
        return [Completion(text=request.references[request.seed % len(request.references)]) for request in requests]
