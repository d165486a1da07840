"""When the guide takes part in an episode, as an immutable value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from textgym.checks import check, is_int, is_number

Length = int | tuple[int, int] | None


@dataclass(frozen=True)
class Guidance:
    """How often and where a guide takes part in an episode.

    An episode is ``prompt | prefix (guide) | body (policy) | completion (guide)``. A restart gives it a prefix, a
    hand-off gives it a completion.

    Attributes:
        restart_prob: Probability that an episode starts with a prefix, in [0, 1]; with ``guide="references"`` only
            where the task says to imitate the sample (in IMDB: positive reviews).
        restart_length: Tokens of the prefix. None is the published rule (arXiv 2306.11816): the guide writes a text of
            L tokens (EOS counted, at most T), of which the first t are kept, t uniform on {0..L-1}. An int fixes t; a
            pair (low, high) draws it uniformly, both ends included. Both are limited to L - 1, so that a prefix never
            ends the text.
        handoff_prob: Probability that a hand-off is scheduled for an episode, in [0, 1].
        handoff_length: Policy tokens before the hand-off. None draws uniformly on {1..T}, an int fixes it, a pair
            (low, high) draws uniformly, both ends included. 0 (an episode without policy tokens) needs a vector
            environment made with ``parking=True``.
        no_body_prob: Probability that an episode with a scheduled hand-off has no policy tokens, instead of
            `handoff_length` tokens; above 0 it needs ``parking=True``, too.

    Raises:
        ValueError: A probability is outside [0, 1], or a length has none of these forms.
    """

    restart_prob: float = 0.0
    restart_length: Length = None
    handoff_prob: float = 0.0
    handoff_length: Length = None
    no_body_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("restart_prob", "handoff_prob", "no_body_prob"):
            value = getattr(self, name)
            check(f"Guidance.{name}", value, is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
        for name in ("restart_length", "handoff_length"):
            value = getattr(self, name)
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
                object.__setattr__(self, name, value)
            pair = value if isinstance(value, tuple) else (value, value)
            valid = value is None or (len(pair) == 2 and all(map(is_int, pair)) and 0 <= pair[0] <= pair[1])
            check(f"Guidance.{name}", value, valid, "None, an int >= 0, or a pair (low, high) with 0 <= low <= high")

    @classmethod
    def of(cls, value: Guidance | Mapping[str, Any] | None) -> Guidance:
        """Return a `Guidance`, given itself, a mapping of its fields, or None for no guidance.

        Raises:
            ValueError: `value` is none of these, or has unknown keys.
        """
        if value is None:
            return cls()
        if isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise ValueError(f"guidance must be a Guidance, a mapping or None, got {type(value).__name__}: {value!r}")
        allowed = [field.name for field in fields(cls)]
        unknown = sorted(set(value) - set(allowed))
        if unknown:
            raise ValueError(f"guidance has unknown keys {unknown}; allowed are {allowed}")
        return cls(**value)

    @property
    def needs_guide(self) -> bool:
        """Whether any episode can call the guide."""
        return self.restart_prob > 0 or self.handoff_prob > 0

    @property
    def can_skip_body(self) -> bool:
        """Whether an episode can have no policy tokens."""
        return self.handoff_prob > 0 and (self.no_body_prob > 0 or self.handoff_bounds(1)[0] < 1)

    def restart_bounds(self, max_new_tokens: int) -> tuple[int, int]:
        """Return inclusive bounds of the length of a prefix, before the length of the guide's text is known."""
        low, high = _bounds(self.restart_length, (0, max_new_tokens - 1))
        return min(low, max_new_tokens - 1), min(high, max_new_tokens - 1)

    def handoff_bounds(self, max_new_tokens: int) -> tuple[int, int]:
        """Return inclusive bounds of the number of policy tokens before a hand-off."""
        return _bounds(self.handoff_length, (1, max_new_tokens))


def _bounds(length: Length, default: tuple[int, int]) -> tuple[int, int]:
    if length is None:
        return default
    return length if isinstance(length, tuple) else (length, length)
