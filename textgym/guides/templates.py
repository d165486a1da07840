"""The texts that a served model reads, and its answers without what they repeat."""

from __future__ import annotations

from collections.abc import Iterable
from string import Formatter
from typing import Any

from textgym.checks import check

COMPLETIONS_TEMPLATE = "{prompt}{prefix}"
CHAT_TEMPLATE = (
    {
        "role": "system",
        "content": "You are given the beginning of a text and write what comes next in it. Answer with that alone: "
        "nothing of what is already there, no comment, no quotation marks.",
    },
    {"role": "user", "content": "{prompt}{prefix}"},
)


def completions_template(template: Any) -> str:
    """Return the template of a base model, `COMPLETIONS_TEMPLATE` for None.

    Raises:
        ValueError: It is no string with the fields prompt and prefix that ends in the prefix.
    """
    template = COMPLETIONS_TEMPLATE if template is None else template
    allowed = "a string with {prompt} that ends in {prefix}, other braces doubled, for api='completions'"
    check("template", template, _has_fields([template]) and template.endswith("{prefix}"), allowed)
    return template


def chat_messages(template: Any) -> tuple[dict[str, str], ...]:
    """Return the messages of an instruct model, `CHAT_TEMPLATE` for None; a string is the user's message.

    Raises:
        ValueError: They are no messages with the fields prompt and prefix.
    """
    template = CHAT_TEMPLATE if template is None else template
    given = [{"role": "user", "content": template}] if isinstance(template, str) else template
    try:
        messages = tuple({"role": str(message["role"]), "content": message["content"]} for message in given)
    except (LookupError, TypeError):
        messages = ()
    allowed = (
        "a string or a sequence of messages with 'role' and 'content', with {prompt} and {prefix} in it and other "
        "braces doubled, for api='chat'"
    )
    check("template", template, _has_fields([message["content"] for message in messages]), allowed)
    return messages


def _has_fields(texts: Iterable[Any]) -> bool:
    """Return whether texts have the fields prompt and prefix, both and no others."""
    try:
        parsed = [field for text in texts for field in Formatter().parse(text) if field[1] is not None]
    except (TypeError, ValueError):
        return False
    return {name for _, name, *_ in parsed} == {"prompt", "prefix"} and not any(
        spec or conversion for *_, spec, conversion in parsed
    )


def without_echo(answer: str, *befores: str) -> str | None:
    """Return an answer without the text of `befores`, the longest first, that it repeats at its start; else None.

    A single word counts as repeated only where it is repeated as a whole word: "and so" does not repeat "a".
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
