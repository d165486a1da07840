"""The options of a reset, with one entry per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from textgym.checks import check, check_int, is_int

NAMES = ("index", "prompt", "references", "prefix", "guidance", "reset_mask", "idle", "group_size")


@dataclass(frozen=True)
class ResetOptions:
    """Options with an entry for each row, None where a row has none (see `TextVectorEnv.reset`).

    Attributes:
        mask: bool (N,), the rows to reset.
        idle: bool (N,), the rows among them that get no sample.
        group_size: Rows jk..jk+k-1 follow the options of row jk.
        index: N samples.
        prompt: N texts.
        references: N tuples of texts.
        prefix: N texts or sequences of token ids.
    """

    mask: np.ndarray
    idle: np.ndarray
    group_size: int
    index: list[int | None]
    prompt: list[str | None]
    references: list[tuple[str, ...] | None]
    prefix: list[str | Sequence[int] | None]

    @classmethod
    def read(cls, options: Mapping[str, Any] | None, num_envs: int) -> ResetOptions:
        """Read the argument `options` of a reset of N rows.

        Raises:
            ValueError: An unknown option, or a value that is not allowed.
        """
        if not isinstance(options, Mapping | None):
            raise ValueError(f"options must be a mapping or None, got {type(options).__name__}: {options!r}")
        options = options or {}
        unknown = sorted(map(str, set(options) - set(NAMES)))
        if unknown:
            raise ValueError(f"options has unknown keys {unknown}; allowed are {list(NAMES)}")
        group_size = check_int("options['group_size']", options.get("group_size", 1))
        check("options['group_size']", group_size, num_envs % group_size == 0, f"a divisor of num_envs={num_envs}")
        prompt = options.get("prompt")
        idle = options.get("idle")
        mask = _mask("reset_mask", options.get("reset_mask"), num_envs, group_size)
        check("options['reset_mask']", mask, bool(mask.any()), "True for at least one row")
        read = cls(
            mask=mask,
            idle=np.zeros(num_envs, bool) if idle is None else _mask("idle", idle, num_envs, group_size),
            group_size=group_size,
            index=_per_row("index", options.get("index"), num_envs, is_int, "an int"),
            prompt=_per_row("prompt", prompt, num_envs, _is_text, "a str"),
            references=_references(options.get("references"), num_envs, prompt is None or isinstance(prompt, str)),
            prefix=_prefixes(options.get("prefix"), num_envs),
        )
        for row in np.flatnonzero(read.mask)[::group_size]:
            if read.prompt[row] is not None and read.index[row] is not None:
                raise ValueError("options['prompt'] and options['index'] exclude each other")
            if read.references[row] is not None and read.prompt[row] is None:
                raise ValueError("options['references'] belongs to options['prompt'], which is missing")
        return read


def _mask(name: str, value: Any, num_envs: int, group_size: int) -> np.ndarray:
    mask: np.ndarray = np.ones(num_envs, bool) if value is None else np.asarray(value)
    if mask.shape != (num_envs,) or mask.dtype != np.bool_:
        raise ValueError(
            f"options[{name!r}] must be a bool array of shape ({num_envs},), got {mask.dtype} {mask.shape}: {mask}"
        )
    groups = mask.reshape(-1, group_size)
    whole = bool((groups.any(1) == groups.all(1)).all())
    check(f"options[{name!r}]", mask, whole, f"True for whole groups of group_size={group_size} rows")
    return mask


def _entries(name: str, value: Any, num_envs: int, allowed: str) -> list[Any]:
    listed = isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)
    check(f"options[{name!r}]", value, listed, allowed)
    if len(value) != num_envs:
        raise ValueError(f"options[{name!r}] must have one entry per row ({num_envs}), got {len(value)}")
    return list(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _per_row(name: str, value: Any, num_envs: int, is_kind: Callable[[Any], bool], form: str) -> list[Any]:
    if value is None or is_kind(value):
        return [value] * num_envs
    allowed = f"{form} or a sequence with one (or None) per row"
    entries = _entries(name, value, num_envs, allowed)
    valid = all(entry is None or is_kind(entry) for entry in entries)
    check(f"options[{name!r}]", value, valid, allowed)
    return entries


def _references(value: Any, num_envs: int, one_prompt: bool) -> list[Any]:
    """One sequence of texts belongs to one prompt for all rows; several prompts take one sequence each."""
    allowed = "a sequence of texts, or one such sequence (or None) per row"
    if value is None:
        return [None] * num_envs
    if isinstance(value, Sequence) and one_prompt and all(isinstance(entry, str) for entry in value):
        check("options['references']", value, not isinstance(value, str), allowed)
        return [tuple(value)] * num_envs
    entries = _entries("references", value, num_envs, allowed)
    for entry in entries:
        listed = entry is None or (isinstance(entry, Sequence) and not isinstance(entry, str | bytes))
        check("options['references']", value, listed and all(map(_is_text, entry or ())), allowed)
    return [None if entry is None else tuple(entry) for entry in entries]


def _prefixes(value: Any, num_envs: int) -> list[Any]:
    if value is None or isinstance(value, str):
        return [value] * num_envs
    allowed = "a text, token ids, or a sequence with one of these (or None) per row"
    if isinstance(value, Sequence | np.ndarray) and len(value) and all(map(is_int, value)):
        return [value] * num_envs
    entries = _entries("prefix", value, num_envs, allowed)
    for entry in entries:
        ids = isinstance(entry, Sequence | np.ndarray) and not isinstance(entry, bytes)
        valid = entry is None or isinstance(entry, str) or (ids and all(map(is_int, entry)))
        check("options['prefix']", value, valid, allowed)
    return entries
