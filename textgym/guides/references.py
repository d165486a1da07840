"""The dataset's reference texts as a guide that can only start an episode."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from textgym.guides.base import Author, Completion, GuideRequest


class ReferenceGuide:
    """Continues a prompt with one of its sample's references, chosen by the request's seed.

    It cannot hand off: a reference does not continue what somebody else began.
    """

    author = Author.REFERENCE
    can_hand_off = False

    def complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Return one reference a request.

        Raises:
            ValueError: A request without references, or one that already has a prefix.
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
