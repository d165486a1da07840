"""When the guide takes part in an episode, as an immutable value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import inf, nan
from typing import Any, TypeVar

from textgym.checks import check, is_int, is_number

Length = int | tuple[int, int] | None
Fraction = float | tuple[float, float] | None
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Guidance:
    """How often and where a guide takes part in an episode.

    An episode is ``prompt | prefix (guide) | body (policy) | completion (guide)``. A restart gives it a prefix, a
    hand-off gives it a completion; after a hand-off of bounded length the policy goes on, so that body and completion
    can alternate.

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
        restart_fraction: Part of the guide's text that is the prefix, instead of a `restart_length`: a number f in
            [0, 1] reveals the first floor(f L) of the L tokens, at most L - 1; a pair (low, high) draws f uniformly.
            The guide then writes one whole text for each sample, which is kept: every later prefix of the sample is cut
            from it.
        text_seed: Seed of these texts. The text of a sample depends on it and the sample, not on the environment's
            seed: environments with the same guide see the same texts.
        handoff_rate: Probability of a hand-off after each of the policy's tokens, instead of a `handoff_length`; after
            a bounded hand-off the next one is scheduled in the same way. None for a single one.
        handoff_entropy: Lets the guide write where the policy is uncertain, instead of a `handoff_length`: before each
            of the policy's tokens it is asked with probability min(1, H / `handoff_entropy`), H the entropy in nats of
            the policy's distribution of that token (MENTOR, arXiv 2510.04140). `step` is then told the entropies, by
            whoever calls it on the unwrapped environment; `agents.rollout.collect` does. None for a schedule that does
            not look at the policy.
        handoff_tokens: Most tokens that the guide writes at a hand-off, scheduled or chosen, before the policy goes on;
            where the guide ends the text within them the episode is over. None lets it complete the text.

    Raises:
        ValueError: A probability is outside [0, 1], or a length has none of these forms.
    """

    restart_prob: float = 0.0
    restart_length: Length = None
    handoff_prob: float = 0.0
    handoff_length: Length = None
    no_body_prob: float = 0.0
    restart_fraction: Fraction = None
    text_seed: int = 0
    handoff_rate: float | None = None
    handoff_entropy: float | None = None
    handoff_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("restart_prob", "handoff_prob", "no_body_prob"):
            value = getattr(self, name)
            check(f"Guidance.{name}", value, is_number(value) and 0 <= value <= 1, "a number in [0, 1]")
        for name in ("restart_length", "restart_fraction", "handoff_length"):
            value = getattr(self, name)
            if isinstance(value, list):  # JSON has no tuples
                value = tuple(value)
                object.__setattr__(self, name, value)
            pair = value if isinstance(value, tuple) else (value, value)
            fraction = name == "restart_fraction"
            is_kind, most, what = (is_number, 1, "a number in [0, 1]") if fraction else (is_int, inf, "an int >= 0")
            ordered = value is None or (len(pair) == 2 and all(map(is_kind, pair)) and 0 <= pair[0] <= pair[1] <= most)
            check(f"Guidance.{name}", value, ordered, f"None, {what}, or a pair (low, high) of such with low <= high")
        if self.restart_length is not None and self.restart_fraction is not None:
            raise ValueError(
                "Guidance.restart_length and Guidance.restart_fraction exclude each other, got "
                f"{self.restart_length!r} and {self.restart_fraction!r}"
            )
        rate, tokens = self.handoff_rate, self.handoff_tokens
        valid = rate is None or (is_number(rate) and 0 < rate <= 1)
        check("Guidance.handoff_rate", rate, valid, "None or a number in (0, 1]")
        check(
            "Guidance.handoff_tokens", tokens, tokens is None or (is_int(tokens) and tokens >= 1), "None or an int >= 1"
        )
        entropy = self.handoff_entropy
        valid = entropy is None or (is_number(entropy) and entropy > 0)
        check("Guidance.handoff_entropy", entropy, valid, "None or a number above 0, in nats")
        given = {
            name: value
            for name in ("handoff_length", "handoff_rate", "handoff_entropy")
            if (value := getattr(self, name)) is not None
        }
        if len(given) > 1:
            raise ValueError(
                f"{' and '.join(f'Guidance.{name}' for name in given)} exclude each other, got "
                f"{' and '.join(map(repr, given.values()))}"
            )
        if entropy is not None and self.no_body_prob:
            raise ValueError(f"Guidance.no_body_prob must be 0 with a handoff_entropy, got {self.no_body_prob!r}")
        check("Guidance.text_seed", self.text_seed, is_int(self.text_seed) and self.text_seed >= 0, "an int >= 0")

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

    def with_prefix(self, fraction: float, text_seed: int) -> Guidance:
        """The same hand-offs, and always a prefix: a fraction of the guide's kept text; none for a fraction of 0."""
        return replace(
            self,
            restart_prob=float(fraction > 0),
            restart_length=None,
            restart_fraction=float(fraction),
            text_seed=text_seed,
        )

    @property
    def needs_guide(self) -> bool:
        """Whether any episode can call the guide."""
        return self.restart_prob > 0 or self.handoff_prob > 0

    @property
    def writes_whole_texts(self) -> bool:
        """Whether every hand-off is of an episode without prefix and body: the guide writes the text from its start."""
        return self.restart_prob == 0 and self.no_body_prob == 1 and self.handoff_tokens is None

    @property
    def can_skip_body(self) -> bool:
        """Whether an episode can have no policy tokens."""
        return self.handoff_prob > 0 and (self.no_body_prob > 0 or self.handoff_bounds(1)[0] < 1)

    def restart_bounds(self, max_new_tokens: int) -> tuple[int, int]:
        """Return inclusive bounds of the length of a prefix, before the length of the guide's text is known."""
        low, high = _bounds(self.restart_length, (0, max_new_tokens - 1))
        return min(low, max_new_tokens - 1), min(high, max_new_tokens - 1)

    def fraction_bounds(self) -> tuple[float, float]:
        """Return bounds of the revealed fraction of the guide's text; NaN where the prefix has a length instead."""
        return _bounds(self.restart_fraction, (nan, nan))

    def handoff_bounds(self, max_new_tokens: int) -> tuple[int, int]:
        """Return inclusive bounds of the number of policy tokens before a hand-off."""
        return _bounds(self.handoff_length, (1, max_new_tokens))


def _bounds(value: Number | tuple[Number, Number] | None, default: tuple[Number, Number]) -> tuple[Number, Number]:
    if value is None:
        return default
    return value if isinstance(value, tuple) else (value, value)
