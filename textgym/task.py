"""A task is data: prompts, references, limits on lengths, and a reward."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Number
from string import Formatter
from typing import TYPE_CHECKING, Any, Literal

from textgym.checks import check, check_int, check_name, check_one_of, is_text
from textgym.data.splits import SPLITS, Row, Split, SplitName
from textgym.metrics import Metric, check_metrics
from textgym.rewards import check_reward
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
        ValueError: `name` cannot be part of a file's name; an entry of `metrics` is neither a known name nor a metric;
            a format string that names no columns; another argument of a wrong type.
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
        if isinstance(self.prompt, str):
            try:
                fields = [name for _, name, _, _ in Formatter().parse(self.prompt) if name is not None]
            except ValueError:
                fields = [""]
            valid = all(re.match(r"[^\W\d]", name) for name in fields)
            check("prompt", self.prompt, valid, "a format string over names of columns, with other braces doubled")
        else:
            check("prompt", self.prompt, callable(self.prompt), "a format string or a function of a row")
        of_rows = isinstance(self.references, str) or callable(self.references)
        check("references", self.references, of_rows, "the name of a column or a function of a row")
        for name in ("max_prompt_tokens", "max_new_tokens"):
            check_int(name, getattr(self, name))
        check_one_of("truncation_side", self.truncation_side, ("left", "right"))
        check_reward(self.reward, self.rewards)
        check("reward", self.reward, self.reward is not None, "a function, or the name of one in rewards")

    def split(self, name: SplitName, source: str) -> Split:
        """Load a split.

        Args:
            name: "train", "validation" or "test".
            source: "mini", "hub" or a folder.

        Raises:
            ValueError: The split's name is not one of these, or the task has no such split; the data are no rows.
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
            ValueError: What the format string names is missing, null or neither text nor a number, or a function
                returns no prompt.
        """
        if isinstance(self.prompt, str):
            for _, field_name, _, conversion in Formatter().parse(self.prompt):
                if field_name is not None and conversion is None:
                    self._check_field(field_name, row)
        prompt: Any = self.prompt.format(**row) if isinstance(self.prompt, str) else self.prompt(row)
        if isinstance(prompt, str):
            prompt = "", prompt, ""
        if not (isinstance(prompt, tuple) and len(prompt) == 3 and all(isinstance(part, str) for part in prompt)):
            raise ValueError(
                f"prompt of task {self.name!r} must be a string or a triple of strings, got {prompt!r} for {row}"
            )
        self._check_unicode("prompt", prompt)
        return prompt

    def _check_field(self, field_name: str, row: Row) -> None:
        column = re.split(r"[.[]", field_name)[0]
        if column not in row:
            raise ValueError(f"prompt of task {self.name!r} needs column {column!r}, the data have {sorted(row)}")
        try:
            value, _ = Formatter().get_field(field_name, (), row)
        except (AttributeError, IndexError, KeyError, TypeError):
            value = None
        # A list would be written as Python writes it, and a null as "None" or "nan".
        if not isinstance(value, str | Number) or value != value:
            raise ValueError(
                f"prompt of task {self.name!r} needs text or a number in column {field_name!r}, got "
                f"{'null' if value is None or value != value else f'{type(value).__name__} {value!r}'} in {row}"
            )

    def imitates(self, row: Row) -> bool:
        """Return whether supervised learning imitates the references of a row."""
        return self.demonstration is None or self.demonstration(row)

    def references_of(self, row: Row) -> tuple[str, ...]:
        """Return the reference texts of a row, without nulls.

        Raises:
            ValueError: There is no such column, or a reference is not text.
        """
        if isinstance(self.references, str) and self.references not in row:
            raise ValueError(
                f"references of task {self.name!r} need column {self.references!r}, the data have {sorted(row)}"
            )
        value = row[self.references] if isinstance(self.references, str) else self.references(row)
        if value is None or isinstance(value, str):
            value = [value]
        if not isinstance(value, Iterable) or not all(text is None or isinstance(text, str) for text in value):
            raise ValueError(f"references of task {self.name!r} must be text or texts, got {value!r} in {row}")
        texts = tuple(text for text in value if text is not None)
        self._check_unicode("references", texts)
        return texts

    def _check_unicode(self, what: str, texts: Sequence[str]) -> None:
        for text in texts:
            if not is_text(text):
                raise ValueError(f"{what} of task {self.name!r} must be Unicode, got half a character in {text!r}")
