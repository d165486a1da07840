"""What a guide may use, and what it has used."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import Any, Literal

from textgym.checks import check, is_int, is_number


class BudgetExceeded(RuntimeError):
    """A guide needs more than its `Budget` allows."""


@dataclass(frozen=True)
class Usage:
    """What a guide has used in this process.

    Attributes:
        calls: Requests sent to the server, retries included.
        cache_hits: Completions read from the cache instead.
        failures: Calls without a completion: refused, timed out or answered with an error.
        prompt_tokens: Tokens read, as the server counts them. Where its count cannot be true or does not come (with a
            call that timed out, say, which may cost as much), about as many as were sent.
        completion_tokens: Tokens written, likewise; else as many as were asked for. Calls that the server refuses
            with an error have none.
        seconds: Wall-clock time in `HTTPGuide.complete`.
        cost: Cost of these tokens at the prices of the budget.
    """

    calls: int = 0
    cache_hits: int = 0
    failures: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0


@dataclass(frozen=True)
class Budget:
    """Limits on what a guide uses.

    No call begins once a limit is reached. Calls under way are finished, so tokens and cost can exceed their limits by
    the use of `concurrency` calls; `calls` is never exceeded. Completions from the cache are free.

    Attributes:
        calls: Most requests to the server, retries included.
        tokens: Most tokens, read and written ones together.
        cost: Highest cost, in the unit of `prices`.
        prices: Cost of one prompt token and of one completion token.
        when_spent: "error" raises `BudgetExceeded` when a limit is reached. "unguided" continues without the guide: an
            episode that was to restart begins at its prompt, and a text that is handed off ends there, without EOS.
            Which episodes are guided then depends on earlier use, so a run repeats only with the same budget and cache.

    Raises:
        ValueError: A limit or price is negative, or there is a limit of cost without prices.
    """

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)
    when_spent: Literal["error", "unguided"] = "error"

    def __post_init__(self) -> None:
        for name, value in (("calls", self.calls), ("tokens", self.tokens)):
            check(f"Budget.{name}", value, value is None or (is_int(value) and value >= 0), "None or an int >= 0")
        cost, prices = self.cost, self.prices
        check("Budget.cost", cost, cost is None or is_amount(cost), "None or a finite number >= 0")
        two = isinstance(prices, tuple) and len(prices) == 2 and all(map(is_amount, prices))
        check("Budget.prices", prices, two, "two finite numbers >= 0, of a prompt and of a completion token")
        if cost is not None and not any(prices):
            raise ValueError(f"Budget.cost={cost!r} needs Budget.prices")
        check("Budget.when_spent", self.when_spent, self.when_spent in ("error", "unguided"), '"error" or "unguided"')

    def spent(self, usage: Usage) -> str | None:
        """Return which limit `usage` has reached, for an error; None for none."""
        tokens = usage.prompt_tokens + usage.completion_tokens
        limits = {"calls": (usage.calls, self.calls), "tokens": (tokens, self.tokens), "cost": (usage.cost, self.cost)}
        for name, (value, limit) in limits.items():
            if limit is not None and value >= limit:
                return f"{value:g} of {limit:g} {name}" if name == "cost" else f"{value:,} of {limit:,} {name}"
        return None


class Ledger:
    """A `Usage` to which the threads and copies of a guide add."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.usage = Usage()

    def add(self, **amounts: float) -> None:
        """Add to the fields of `usage`."""
        with self.lock:
            before = self.usage
            self.usage = replace(before, **{name: getattr(before, name) + more for name, more in amounts.items()})

    def begin(self, budget: Budget) -> bool:
        """Count a call and return True where the budget allows it.

        Raises:
            BudgetExceeded: It does not, and `budget.when_spent` is "error".
        """
        with self.lock:
            spent = budget.spent(self.usage)
            if spent is None:
                self.usage = replace(self.usage, calls=self.usage.calls + 1)
        if spent is not None and budget.when_spent == "error":
            raise BudgetExceeded(f"the guide's budget is spent: {spent}")
        return spent is None


def is_amount(value: Any) -> bool:
    """Return whether a value is a finite number >= 0."""
    return is_number(value) and 0 <= value < math.inf
