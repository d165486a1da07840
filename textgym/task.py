"""A task is data: what is asked, what would be a good answer, how long it may be, what it is worth."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from textgym.metrics import NAMES
from textgym.rewards.base import RewardFunction

if TYPE_CHECKING:
    import datasets
    from transformers import PreTrainedTokenizerBase

Row = Mapping[str, Any]
SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """One split of a task's data.

    Attributes:
        rows: The samples; ``rows[i]`` is a mapping of column to value.
        fingerprint: 16 hex digits that change when any sample does.
    """

    rows: Sequence[Row] | datasets.Dataset
    fingerprint: str

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, rows: Sequence[Row] | datasets.Dataset) -> Split:
        """Wrap rows, with a fingerprint of their content."""
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return cls(rows, digest.hexdigest()[:16])


@dataclass(frozen=True)
class Task:
    """What an environment asks for.

    Attributes:
        name: Short name, used in file names and tables.
        data: A function ``(split, source) -> Split`` or rows for it; or a mapping from split name to rows (a
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
        metrics: Names in `textgym.metrics.NAMES`, of what stands beside the reward in an evaluation.
        demonstration: Which rows supervised learning imitates (None: all).
        tokenizer: The tokenizer, made on first use; None: a byte-level BPE trained on the train split.

    Raises:
        ValueError: There is no such metric.
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
    metrics: tuple[str, ...] = ()
    demonstration: Callable[[Row], bool] | None = None
    tokenizer: Callable[[], PreTrainedTokenizerBase] | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.metrics) - set(NAMES))
        if unknown:
            raise ValueError(f"metrics must be of {list(NAMES)}, got {unknown}")

    def split(self, name: SplitName, source: str) -> Split:
        """Load a split.

        Args:
            name: "train", "validation" or "test".
            source: "mini", "hub" or a folder.

        Raises:
            ValueError: The split's name is not one of these, or the task has no such split.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {list(SPLITS)}, got {name!r}")
        if callable(self.data):
            rows = self.data(name, source)
        elif isinstance(self.data, Mapping):
            if name not in self.data:
                raise ValueError(f"split must be one of {sorted(self.data)} for task {self.name!r}, got {name!r}")
            rows = self.data[name]
        else:
            rows = self.data
        return rows if isinstance(rows, Split) else Split.of(rows)

    def prompt_of(self, row: Row) -> tuple[str, str, str]:
        """The prompt of a row as (before, body, after).

        Raises:
            ValueError: A column that the format string names is null, or what a function returns is no prompt.
        """
        if isinstance(self.prompt, str):
            columns = [re.split(r"[.[]", name)[0] for _, name, _, _ in Formatter().parse(self.prompt) if name]
            missing = [column for column in columns if row.get(column, "") is None]
            if missing:
                raise ValueError(f"prompt of task {self.name!r} needs text in column {missing[0]!r}, got null in {row}")
        prompt: Any = self.prompt.format(**row) if isinstance(self.prompt, str) else self.prompt(row)
        if not isinstance(prompt, str) and not (
            isinstance(prompt, tuple) and len(prompt) == 3 and all(isinstance(part, str) for part in prompt)
        ):
            raise ValueError(
                f"prompt of task {self.name!r} must be a string or a triple of strings, got {prompt!r} for {row}"
            )
        return ("", prompt, "") if isinstance(prompt, str) else prompt

    def imitates(self, row: Row) -> bool:
        """Whether the references of a row are worth imitating."""
        return self.demonstration is None or self.demonstration(row)

    def references_of(self, row: Row) -> tuple[str, ...]:
        """The reference texts of a row; null is no reference.

        Raises:
            ValueError: Something else than text.
        """
        value = row[self.references] if isinstance(self.references, str) else self.references(row)
        if value is None or isinstance(value, str):
            value = [value]
        if not isinstance(value, Iterable) or not all(text is None or isinstance(text, str) for text in value):
            raise ValueError(f"references of task {self.name!r} must be text or texts, got {value!r} in {row}")
        return tuple(text for text in value if text is not None)
