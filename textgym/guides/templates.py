"""The texts that a served model reads, and its answers without what they repeat."""

from __future__ import annotations

from string import Formatter
from typing import Any

COMPLETIONS_TEMPLATE = "{prompt}{prefix}"
CHAT_TEMPLATE = (
    {
        "role": "system",
        "content": "You are given the beginning of a text and write what comes next in it. Answer with that alone: "
        "nothing of what is already there, no comment, no quotation marks.",
    },
    {"role": "user", "content": "{prompt}{prefix}"},
)


def _fields(template: Any) -> set[str]:
    """Return the names in braces in a template.

    Raises:
        ValueError: It is no string, or has other fields than prompt and prefix.
    """
    if not isinstance(template, str):
        raise ValueError("not a string")
    parsed = [(name, spec, conversion) for _, name, spec, conversion in Formatter().parse(template) if name is not None]
    if any(name not in ("prompt", "prefix") or spec or conversion for name, spec, conversion in parsed):
        raise ValueError("other fields")
    return {name for name, _, _ in parsed}


def completions_template(template: Any) -> str:
    """Return the template of a base model, `COMPLETIONS_TEMPLATE` for None.

    Raises:
        ValueError: It is no string with the fields prompt and prefix that ends in the prefix.
    """
    template = COMPLETIONS_TEMPLATE if template is None else template
    try:
        fine = _fields(template) == {"prompt", "prefix"} and template.endswith("{prefix}")
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(
            "template must be a string with {prompt} that ends in {prefix}, other braces doubled, "
            f"for api='completions', got {template!r}"
        )
    return template


def chat_messages(template: Any) -> tuple[dict[str, str], ...]:
    """Return the messages of an instruct model, `CHAT_TEMPLATE` for None; a string is the user's message.

    Raises:
        ValueError: They are no messages with the fields prompt and prefix.
    """
    if template is None:
        template = CHAT_TEMPLATE
    elif isinstance(template, str):
        template = [{"role": "user", "content": template}]
    try:
        messages = tuple({"role": str(message["role"]), "content": message["content"]} for message in template)
        fine = set().union(*(_fields(message["content"]) for message in messages)) == {"prompt", "prefix"}
    except (LookupError, TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(
            "template must be a string or a sequence of messages with 'role' and 'content', with {prompt} and {prefix} "
            f"in it and other braces doubled, for api='chat', got {template!r}"
        )
    return messages


def without_echo(answer: str, *befores: str) -> str | None:
    """Return an answer without the repeated text at its start; None where it repeats none.

    A single word counts as repeated only where it is repeated as a whole word: "and so" does not repeat "a".

    Args:
        answer: The answer.
        *befores: Texts that it may repeat, the longest first.
    """
    begun = answer.lstrip()
    for before in befores:
        echo = before.strip()
        if not echo or not begun.startswith(echo):
            continue
        rest = begun[len(echo) :]
        if len(echo.split()) == 1 and echo[-1].isalnum() and rest[:1].isalnum():
            continue
        return rest.lstrip() if before[-1].isspace() else rest
    return None
