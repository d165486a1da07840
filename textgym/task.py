"""A task is data: prompts, references, limits on lengths, and a reward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from textgym.checks import check, check_name, check_one_of
from textgym.data.splits import SPLITS, Row, Split, SplitName
from textgym.metrics import Metric, check_metrics
from textgym.rewards.base import RewardFunction

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Task:
    """What an environment asks for.

    Attributes:
        name: Short name, used in file names and tables.
        data: A function ``(split, source) -> Split`` or rows; or a mapping from split name to rows (a
            `datasets.Dataset` or a list of mappings); or rows alone, which serve as every split.
        prompt: The prompt of a row: a format string over its columns ("Q: {question} A:"), or a function of the row
            that returns a string, or a triple (before, body, after) of which only the body may be truncated (a plain
            string is all body).
        references: The reference texts of a row: a column's name (a string or a list of strings), or a function of
            the row.
        max_prompt_tokens: P, columns kept for the prompt.
        max_new_tokens: T, the horizon: most tokens of an episode, EOS included.
        truncation_side: Which end of the body is dropped when the prompt is too long.
        reward: The reward, or the name of one in `rewards`.
        rewards: Rewards by name: functions of the data source, called when the environment first needs the reward.
        metrics: What an evaluation measures in addition to the reward: names in `textgym.metrics.NAMES`, or metrics
            (see `textgym.metrics.Metric`).
        demonstration: Which rows supervised learning imitates (None: all).
        tokenizer: Returns the tokenizer, called on first use; None: a byte-level BPE trained on the train split.

    Raises:
        ValueError: `name` cannot be part of a file's name, or an entry of `metrics` is neither a known name nor a
            metric.
    """

    name: str
    data: Callable[[SplitName, str], Any] | Mapping[str, Any] | Sequence[Row] | datasets.Dataset
    prompt: str | Callable[[Row], str | tuple[str, str, str]]
    references: str | Callable[[Row], Sequence[str]]
    max_prompt_tokens: int
    max_new_tokens: int
    reward: str | RewardFunction
    rewards: Mapping[str, Callable[[str], RewardFunction]] = field(default_factory=dict)
    truncation_side: Literal["left", "right"] = "right"
    metrics: tuple[str | Metric, ...] = ()
    demonstration: Callable[[Row], bool] | None = None
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None

    def __post_init__(self) -> None:
        check_name("name", self.name)
        check_metrics(self.metrics)

    def split(self, name: SplitName, source: str) -> Split:
        """Load a split.

        Args:
            name: "train", "validation" or "test".
            source: "mini", "hub" or a folder.

        Raises:
            ValueError: The split's name is not one of these, or the task has no such split.
        """
        check_one_of("split", name, SPLITS)
        rows: Any = self.data
        if callable(rows):
            rows = rows(name, source)
        elif isinstance(rows, Mapping):
            check("split", name, name in rows, f"one of {sorted(rows)} for task {self.name!r}")
            rows = rows[name]
        return rows if isinstance(rows, Split) else Split.of(rows)

    def prompt_of(self, row: Row) -> tuple[str, str, str]:
        """Return the prompt of a row as (before, body, after).

        Raises:
            ValueError: A column that the format string names is null, or a function returns no prompt.
        """
        if isinstance(self.prompt, str):
            columns = [re.split(r"[.[]", name)[0] for _, name, _, _ in Formatter().parse(self.prompt) if name]
            missing = [column for column in columns if row.get(column, "") is None]
            if missing:
                raise ValueError(f"prompt of task {self.name!r} needs text in column {missing[0]!r}, got null in {row}")
        prompt: Any = self.prompt.format(**row) if isinstance(self.prompt, str) else self.prompt(row)
        if isinstance(prompt, str):
            return "", prompt, ""
        if not (isinstance(prompt, tuple) and len(prompt) == 3 and all(isinstance(part, str) for part in prompt)):
            raise ValueError(
                f"prompt of task {self.name!r} must be a string or a triple of strings, got {prompt!r} for {row}"
            )
        return prompt

    def imitates(self, row: Row) -> bool:
        """Return whether supervised learning imitates the references of a row."""
        return self.demonstration is None or self.demonstration(row)

    def references_of(self, row: Row) -> tuple[str, ...]:
        """Return the reference texts of a row, without nulls.

        Raises:
            ValueError: A reference is not text.
        """
        value = row[self.references] if isinstance(self.references, str) else self.references(row)
        if value is None or isinstance(value, str):
            value = [value]
        if not isinstance(value, Iterable) or not all(text is None or isinstance(text, str) for text in value):
            raise ValueError(f"references of task {self.name!r} must be text or texts, got {value!r} in {row}")
        return tuple(text for text in value if text is not None)
