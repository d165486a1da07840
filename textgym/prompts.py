"""Prompts as a policy reads them: in a template, encoded and truncated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedTokenizerBase

from textgym.tokenization import encode_prompts, template_parts


class PromptEncoder:
    """Puts prompts into a template and encodes them.

    Args:
        tokenizer: The tokenizer.
        template: The text that the policy reads, with ``{prompt}`` for the prompt.
        chat: Whether that text is a user's message to a chat model.
        truncation_side: Which end of a long prompt's body is dropped.

    Attributes:
        template_tokens: Tokens of the template alone.

    Raises:
        ValueError: The template does not hold ``{prompt}`` exactly once, or the tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        chat: bool,
        truncation_side: Literal["left", "right"],
    ) -> None:
        self._tokenizer, self._chat, self._truncation_side = tokenizer, chat, truncation_side
        self._before, self._after = template_parts(tokenizer, template, chat)
        parts = [part for part in (self._before, self._after) if part]
        self.template_tokens = sum(len(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)

    def in_template(self, prompt: str) -> str:
        """The text that the policy reads in the place of a prompt."""
        return self._before + prompt + self._after

    def encode(self, prompts: Sequence[tuple[str, str, str]], max_prompt_tokens: int) -> list[tuple[str, list[int]]]:
        """Encode prompts in the template, in at most `max_prompt_tokens` (see `TextVectorEnv.encode_prompts`)."""
        encoded = encode_prompts(
            self._tokenizer,
            prompts,
            max_prompt_tokens,
            self._truncation_side,
            add_special_tokens=not self._chat,
            template=(self._before, self._after),
        )
        return [(text[len(self._before) : len(text) - len(self._after)], ids) for text, ids in encoded]
