"""Who writes which part of an episode, as one immutable value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

Length = int | tuple[int, int] | None


@dataclass(frozen=True)
class Guidance:
    """How often and where a guide takes part in an episode.

    An episode is ``prompt | prefix (guide) | body (policy) | completion (guide)``. Restarting gives it a prefix,
    handing off gives it a completion.

    Attributes:
        restart_prob: Probability that an episode starts from a guide-written prefix, in [0, 1].
        restart_length: Tokens of the prefix. ``None`` is the published rule (arXiv 2306.11816): let the guide write a
            text of L tokens (EOS counted, at most T) and keep the first t, t uniform on {0..L-1}. An int, or a pair
            (low, high) from which t is drawn uniformly, both ends included, is cut at L - 1, so that a prefix never
            ends the text.
        handoff_prob: Probability that an episode is scheduled to be handed to the guide, in [0, 1].
        handoff_length: Policy tokens before the guide completes the text. ``None`` draws uniformly on {1..T}, an int
            fixes it, a pair (low, high) draws uniformly, both ends included. 0 (an episode without policy tokens)
            needs a vector environment made with ``parking=True``.
        no_body_prob: Probability that an episode that is scheduled for a hand-off has no policy token at all, whatever
            `handoff_length` says; above 0 it needs ``parking=True`` too.

    Raises:
        ValueError: A probability outside [0, 1], or a length that is negative or not one of the forms above.
    """

    restart_prob: float = 0.0
    restart_length: Length = None
    handoff_prob: float = 0.0
    handoff_length: Length = None
    no_body_prob: float = 0.0

    def __post_init__(self) -> None:
        for name in ("restart_prob", "handoff_prob", "no_body_prob"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"Guidance.{name} must be a number in [0, 1], got {value!r}")
        for name in ("restart_length", "handoff_length"):
            value = getattr(self, name)
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
                object.__setattr__(self, name, value)
            bounds = (value,) if isinstance(value, int) else value
            if value is None:
                continue
            if (
                not isinstance(bounds, tuple)
                or len(bounds) not in (1, 2)
                or any(isinstance(bound, bool) or not isinstance(bound, int) or bound < 0 for bound in bounds)
                or (isinstance(value, tuple) and len(value) != 2)
                or bounds[0] > bounds[-1]
            ):
                raise ValueError(
                    f"Guidance.{name} must be None, an int >= 0, or a pair (low, high) with 0 <= low <= high, "
                    f"got {value!r}"
                )

    @classmethod
    def of(cls, value: Guidance | Mapping[str, Any] | None) -> Guidance:
        """Read a `Guidance` from itself, a mapping of its fields, or None (no guidance).

        Raises:
            ValueError: Neither of these, or a mapping with unknown keys.
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
        """Whether an episode can go by without a policy token."""
        return self.handoff_prob > 0 and (self.no_body_prob > 0 or self.handoff_bounds(1)[0] < 1)

    def restart_bounds(self, max_new_tokens: int) -> tuple[int, int]:
        """Inclusive bounds of the prefix length before the guide's own length is known."""
        if self.restart_length is None:
            return 0, max_new_tokens - 1
        low, high = (
            (self.restart_length, self.restart_length) if isinstance(self.restart_length, int) else self.restart_length
        )
        return min(low, max_new_tokens - 1), min(high, max_new_tokens - 1)

    def handoff_bounds(self, max_new_tokens: int) -> tuple[int, int]:
        """Inclusive bounds of the number of policy tokens before a hand-off."""
        if self.handoff_length is None:
            return 1, max_new_tokens
        low, high = (
            (self.handoff_length, self.handoff_length) if isinstance(self.handoff_length, int) else self.handoff_length
        )
        return low, high
