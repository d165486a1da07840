"""What `learn` shows of its iterations: a bar, a line for each, or both."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

# Seconds between two lines in the place of a bar, where there is no terminal.
PAUSE = 30.0
# What a line has of a record, each with its format; what a record has not is left out.
SHOWN = {
    "reward": ".3f",
    "eval/reward": ".3f",
    "loss": ".3f",
    "validation_loss": ".3f",
    "kl": ".2f",
    "entropy": ".2f",
    "length": ".1f",
    "guide_tokens": ",.0f",
}


def can_draw(console: Console) -> bool:
    """Whether bars can be drawn: on a terminal, or in a notebook that has ipywidgets, without which rich only warns."""
    return console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)


def bars(console: Console, disable: bool = False) -> Progress:
    """Bars of tasks that have the field "status", a few words; what a name or status says is no markup."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}", markup=False),
    )
    return Progress(*columns, console=console, disable=disable or (console.is_jupyter and not can_draw(console)))


class Display:
    """A bar and lines on the terminal, in a notebook, or in a file.

    Args:
        name: The algorithm's name.
        lines: Whether every iteration has a line.
        bar: Whether there is a bar; without a terminal and outside of a notebook it is a line every half minute.
        console: Where to write; None for the standard output.
    """

    def __init__(self, name: str, *, lines: bool, bar: bool, console: Console | None = None) -> None:
        self.name, self.lines, self.bar = name, lines, bar
        self.console = console or Console(highlight=False)
        live = can_draw(self.console)
        self.progress = bars(self.console, disable=not (bar and live))
        self.task = self.progress.add_task(name, total=1.0, status="")
        self.rarely = bar and not live and not lines
        self.started = self.written = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.stop()

    def update(self, record: Mapping[str, Any], done: float, status: str) -> None:
        """Show an iteration.

        Args:
            record: The iteration's record.
            done: The share of the work that is done.
            status: A few words for the bar.
        """
        done = min(done, 1.0)
        self.progress.update(self.task, completed=done, status=status)
        now = time.monotonic()
        if self.lines or (self.rarely and (now - self.written >= PAUSE or done == 1.0)):
            self.written = now
            self.console.print(Text(self.line(record, done)), soft_wrap=True)

    def line(self, record: Mapping[str, Any], done: float) -> str:
        """An iteration in a line: the reward and what it cost, tokens a second, and the time that is left."""
        cells = [f"{self.name} {record['iteration']:>4}"]
        # The loss of a policy gradient says nothing, and not everybody has a guide.
        useless = {"loss"} if "reward" in record else set()
        useless |= set() if record.get("guide_tokens") else {"guide_tokens"}
        cells += [f"{name} {record[name]:{form}}" for name, form in SHOWN.items() if name in record.keys() - useless]
        tokens = record.get("policy_tokens", 0) + record.get("guide_tokens", 0)
        cells.append(f"tokens/s {tokens / max(record['seconds'], 1e-9):,.0f}")
        left = (time.monotonic() - self.started) * (1 - done) / max(done, 1e-9)
        cells.append(f"left {timedelta(seconds=round(left))}")
        return "  ".join(cells)
