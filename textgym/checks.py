"""How arguments are checked: every error names the argument, what is allowed and what came."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from numbers import Real
from typing import Any

import numpy as np
import psutil

# A name, with or without an owner; anything else is a path.
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

# What other libraries call an argument.
_SYNONYMS = {
    "horizon": "max_new_tokens",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "max_completion_length": "max_new_tokens",
    "max_prompt_length": "max_prompt_tokens",
    "reward_function": "reward",
    "stop_strings": "stop",
    "dataset": "source",
    "expert": "guide",
    "teacher": "guide",
}


def check(name: str, value: Any, valid: bool, allowed: str) -> None:
    """Refuse a value that is not valid.

    Args:
        name: The argument's name.
        value: What came.
        valid: Whether it is valid.
        allowed: What is allowed, to be read after "must be".

    Raises:
        ValueError: `valid` is False.
    """
    if not valid:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def check_one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return a value that is one of those allowed, of the same type (so that 1 is not True).

    Raises:
        ValueError: It is none of them.
    """
    valid = any(value is option or (type(value) is type(option) and value == option) for option in allowed)
    check(name, value, valid, f"one of {list(allowed)}")
    return value


def check_arguments(owner: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Refuse keyword arguments that `owner` does not have, with the nearest one that it has.

    Raises:
        TypeError: "PPO has no argument 'lr'; did you mean learning_rate? (unexpected keyword argument 'lr')"
    """
    allowed = list(allowed)
    for name in given:
        if name not in allowed:
            nearest = nearest_name(name, allowed)
            meant = f"did you mean {nearest}?" if nearest else f"it has {', '.join(sorted(allowed))}"
            # With Python's own words, by which TorchRL knows that it can do without an argument.
            raise TypeError(f"{owner} has no argument {name!r}; {meant} (unexpected keyword argument {name!r})")


def nearest_name(name: str, allowed: Sequence[str]) -> str | None:
    """The name that was probably meant: another library's, the most alike, or one whose words begin so ("lr")."""
    known = [_SYNONYMS[name]] if _SYNONYMS.get(name) in allowed else []
    alike = get_close_matches(name, allowed, n=1)
    initials = [option for option in allowed if "".join(word[0] for word in option.split("_")) == name]
    parts = [option for option in allowed if name in option.split("_")]
    return next(iter([*known, *alike, *initials, *parts]), None)


def is_int(value: Any) -> bool:
    """Whether a value is an integer, of Python or NumPy, and no bool."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool | np.bool_)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of Python or NumPy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_int(name: str, value: Any, least: int = 1) -> int:
    """Return an integer that is not below `least`.

    Raises:
        ValueError: It is none.
    """
    check(name, value, is_int(value) and value >= least, f"an int >= {least}")
    return int(value)


def is_text(value: Any) -> bool:
    """Whether it is a string of whole characters: one with half a surrogate pair cannot be written as UTF-8."""
    try:
        str.encode(value)
    except (TypeError, UnicodeEncodeError):
        return False
    return True


def check_memory(what: str, needed: int) -> None:
    """Refuse what needs more memory than is free, before any of it is taken.

    Raises:
        ValueError: The message says how much `what` needs, and how much there is.
    """
    free = psutil.virtual_memory().available
    if needed > free:
        raise ValueError(f"{what} need {needed / 2**30:,.0f} GiB of memory, and {free / 2**30:,.0f} GiB are free")


def check_name(name: str, value: Any) -> str:
    """Return a name that can be part of a file's name, and leads to no other folder.

    Raises:
        ValueError: It is none.
    """
    valid = isinstance(value, str) and 0 < len(value.encode(errors="replace")) <= 100 and value.isprintable()
    valid = valid and value[0] != "." and not set(value) & {"/", "\\"}
    check(name, value, valid, "at most 100 printable characters without / and \\, the first of them no dot")
    return value


def check_place(name: str, path: str | os.PathLike, what: str) -> None:
    """Refuse a path at which there is nothing; what can be a hub id is not looked up.

    Args:
        name: The argument's name.
        path: A path or hub id.
        what: What should be there.

    Raises:
        ValueError: There is no such path, and it is no hub id.
    """
    if not os.path.exists(path) and not _HUB_ID.fullmatch(os.fspath(path)):
        raise ValueError(f"{name} must be the hub id or path of {what}, and there is nothing at {path!r}")


def check_texts(name: str, value: Any) -> tuple[str, ...]:
    """Return a sequence of strings that are not empty, as a tuple.

    Raises:
        ValueError: It is none.
    """
    valid = isinstance(value, Collection) and not isinstance(value, str)
    valid = valid and all(isinstance(text, str) and text for text in value)
    check(name, value, valid, "a sequence of strings that are not empty")
    return tuple(value)
