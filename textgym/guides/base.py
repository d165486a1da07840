"""The one protocol between an environment and whatever helps it write."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Author(IntEnum):
    """Who wrote a token; the code used in ``info["authors"]``."""

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
        prompt_ids: What the policy reads, in the environment's vocabulary, without padding: the prompt in the template.
        prefix: Text of the tokens already written after the prompt.
        prefix_ids: Their ids in the environment's vocabulary.
        max_new_tokens: Most tokens to write, EOS included, counted in the environment's vocabulary.
        seed: Seed of everything random in this completion, whatever else is in the batch.
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
    """What a guide wrote, as text or as token ids of the environment's vocabulary (ids win where both are given).

    Attributes:
        text: The continuation's text. It is encoded as a continuation of the prompt (a leading space is added where
            neither side has one).
        token_ids: The continuation's ids. They may end with EOS.
        finished: Whether the guide ended the text. An EOS is then appended where there is room for it.
    """

    text: str | None = None
    token_ids: Sequence[int] | None = None
    finished: bool = True


@runtime_checkable
class Guide(Protocol):
    """Anything that completes text.

    A guide must give the same completion for the same request, alone or in any batch, and must survive
    `copy.deepcopy` and `pickle`.

    Attributes:
        author: Code written into ``info["authors"]`` for its tokens.
        can_hand_off: Whether it can complete a text that somebody else began.
    """

    author: Author
    can_hand_off: bool

    def complete(
        self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase
    ) -> Sequence[Completion | str | Sequence[int]]:
        """Continue every request.

        Args:
            requests: N requests.
            tokenizer: The environment's tokenizer.

        Returns:
            N completions, in order. A plain string is a finished text, a plain sequence of ints is token ids, finished
            if it ends with EOS.
        """
        ...


class CallableGuide:
    """A function on batches as a guide.

    Args:
        function: Takes a list of `GuideRequest`, returns one `Completion`, string or sequence of token ids for each.
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


def load_guide(guide: Guide | Callable | str | os.PathLike | None) -> Guide | None:
    """Turn the environment's `guide` argument into a guide.

    Args:
        guide: None; "references" for the dataset's own reference texts; any other string is the hub id or path of a
            language model; a `Guide`; or a function on a list of `GuideRequest`.

    Raises:
        ValueError: Anything else.
    """
    if guide is None or isinstance(guide, Guide):
        return guide
    if guide == "references":
        from textgym.guides.references import ReferenceGuide

        return ReferenceGuide()
    if isinstance(guide, str | os.PathLike):
        from textgym.guides.local import LocalGuide

        return LocalGuide(guide)
    if callable(guide):
        return CallableGuide(guide)
    raise ValueError(
        "guide must be None, 'references', the hub id or path of a language model, a Guide "
        f"or a function on a list of GuideRequest, got {type(guide).__name__}: {guide!r}"
    )
