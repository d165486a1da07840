"""The protocol of guides, and its requests and completions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from transformers import PreTrainedTokenizerBase


class Author(IntEnum):
    """The author of a token, as in ``info["authors"]``."""

    NONE = -1
    POLICY = 0
    GUIDE = 1
    REFERENCE = 2
    USER = 3


@dataclass(frozen=True)
class GuideRequest:
    """One text to continue.

    Attributes:
        prompt: The task's prompt after truncation, without the template of the environment.
        prompt_ids: The prompt in the template, as the policy reads it: ids of the environment's vocabulary, unpadded.
        prefix: The text after the prompt so far.
        prefix_ids: Its ids in the environment's vocabulary.
        max_new_tokens: Most tokens of the completion, EOS included, counted in the environment's vocabulary.
        seed: Seed of all random choices in this completion; it does not depend on the batch.
        references: The sample's reference texts.
    """

    prompt: str
    prompt_ids: tuple[int, ...]
    prefix: str
    prefix_ids: tuple[int, ...]
    max_new_tokens: int
    seed: int
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Completion:
    """A completion, as text or as token ids of the environment's vocabulary (ids are used where both are given).

    Attributes:
        text: The text, which is encoded as a continuation of the prompt (with a space between them where neither has
            one).
        token_ids: The ids, which may end with EOS.
        finished: Whether the guide ended the text. EOS is then appended where there is room for it.
    """

    text: str | None = None
    token_ids: Sequence[int] | None = None
    finished: bool = True


@runtime_checkable
class Guide(Protocol):
    """Completes texts.

    A guide must return the same completion for the same request, alone or in any batch, and must support
    `copy.deepcopy` and `pickle`.

    Attributes:
        author: The author of its tokens in ``info["authors"]``.
        can_hand_off: Whether it can complete a text that another author began. Without, it can still write the whole
            text of an episode.
    """

    author: Author
    can_hand_off: bool

    def complete(
        self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Completion | str | Sequence[int]]:
        """Complete every request.

        Args:
            requests: N requests.
            tokenizer: The environment's tokenizer.

        Returns:
            N completions, in order. A string is a finished text; a sequence of ints is token ids, finished if the last
            is EOS.
        """
        ...


@runtime_checkable
class ScoringGuide(Guide, Protocol):
    """A guide that also says how likely given tokens are.

    It reads the very tokens that the policy reads and wrote, so its vocabulary is the environment's.
    """

    def score(
        self,
        requests: Sequence[GuideRequest],
        continuations: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[np.ndarray]:
        """Log-probabilities of given continuations, under the untruncated softmax at temperature 1.

        Args:
            requests: N requests, which say what is continued; their `max_new_tokens` and `seed` have no effect. With
                none, only the guide's ability to score is checked.
            continuations: N sequences of token ids of the environment's vocabulary, EOS included where it was written.
            tokenizer: The environment's tokenizer.

        Returns:
            For each request float32 (L,) in nats, of the L tokens of its continuation, each given all before it.

        Raises:
            ValueError: The guide cannot score: it has another vocabulary, or reads texts in another form.
        """
        ...


class CallableGuide:
    """A function on batches as a guide.

    Args:
        function: Takes a list of `GuideRequest` and returns a `Completion`, string or sequence of token ids for each.
    """

    author = Author.GUIDE
    can_hand_off = True

    def __init__(self, function: Callable[[Sequence[GuideRequest]], Sequence[Any]]) -> None:
        self.function = function

    def complete(
        self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Completion | str | Sequence[int]]:
        """Call the function."""
        return self.function(requests)
