"""Text to token ids and back, for prompts, references and whatever a guide writes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from textgym.data.sources import cache_dir
from textgym.task import Task

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 8192
# Enough text for stable merges; more only makes the first start slower.
TRAINING_ROWS = 20_000


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None, task: Task, source: str
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an environment.

    Args:
        tokenizer: A tokenizer, its hub id or path, or None for the task's own; where it has none, a byte-level BPE of
            at most 8,192 tokens trained on the task's train split and kept in the cache folder.
        task: The task.
        source: The data source ("mini", "hub" or a folder) to train on.

    Raises:
        ValueError: Not one of these, or a tokenizer without an end-of-sequence token.
    """
    if tokenizer is None:
        loaded = _trained_tokenizer(task, source) if task.tokenizer is None else task.tokenizer()
    elif isinstance(tokenizer, PreTrainedTokenizerBase):
        loaded = tokenizer
    elif isinstance(tokenizer, str | os.PathLike):
        loaded = pretrained_tokenizer(tokenizer)
    else:
        raise ValueError(
            "tokenizer must be None, a hub id or path, or a PreTrainedTokenizerBase, "
            f"got {type(tokenizer).__name__}: {tokenizer!r}"
        )
    if loaded.eos_token_id is None:
        raise ValueError("tokenizer must have an eos_token: it is the action that ends a text")
    return loaded


def pretrained_tokenizer(path: str | os.PathLike, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: Hub id or folder.
        gguf_file: The GGUF file there that holds the model and its tokenizer, where it is one.

    Raises:
        ValueError: There is none.
    """
    from transformers import AutoTokenizer  # imports torch
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    kind: Any = AutoTokenizer
    try:
        if gguf_file is None:
            # One that says it is no more than its file: AutoTokenizer would make it one of the model's family.
            declared = get_tokenizer_config(str(path)).get("tokenizer_class")
            if declared in ("PreTrainedTokenizerFast", "TokenizersBackend"):
                kind = PreTrainedTokenizerFast
            tokenizer = kind.from_pretrained(str(path), trust_remote_code=False)
        else:
            tokenizer = kind.from_pretrained(str(path), gguf_file=gguf_file, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer must be a hub id or a folder with a tokenizer, got {str(path)!r}: {error}"
        ) from error
    # Where only a model lies, transformers makes a tokenizer of nothing but the special tokens of its architecture.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"tokenizer must be a hub id or a folder with a tokenizer, got {str(path)!r}, which has none")
    return tokenizer


def _trained_tokenizer(task: Task, source: str) -> PreTrainedTokenizerBase:
    split = task.split("train", source)

    def texts(rows: int) -> list[str]:
        written = []
        for _, row in zip(range(rows), split.rows, strict=False):
            prompt = "".join(task.prompt_of(row))
            written += [prompt, *(as_continuation(prompt, reference) for reference in task.references_of(row))]
        return written

    # The same data can be laid out in other ways, which a few rows show.
    layout = hashlib.sha256("\n".join(texts(8)).encode()).hexdigest()[:8]
    folder = cache_dir() / "tokenizers" / f"{task.name}-{split.fingerprint}-{layout}-{VOCAB_SIZE}"
    if folder.is_dir():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = train_tokenizer(texts(TRAINING_ROWS))
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent))
    tokenizer.save_pretrained(temporary)
    try:
        temporary.rename(folder)
    except OSError:  # another process was quicker; what it wrote is the same
        shutil.rmtree(temporary)
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ``<|endoftext|>`` (0) as EOS and ``<|pad|>`` (1) as padding.

    Args:
        texts: The text to learn merges from.
        vocab_size: Most tokens; merges seen only once are never made.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    bpe = tokenizers.Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=PAD)


def template_parts(tokenizer: PreTrainedTokenizerBase, template: str, chat: bool) -> tuple[str, str]:
    """What a template puts before and after a prompt.

    Args:
        tokenizer: The tokenizer, whose chat template is used with `chat`.
        template: A text with ``{prompt}``.
        chat: Whether the filled template is what a user says to a chat model, whose answer comes next.

    Raises:
        ValueError: The template does not hold ``{prompt}`` once and nothing else to fill in, or `chat` is True without
            a chat template that shows what a user says once.
    """
    place = "\0"
    try:
        text = template.format(prompt=place)
    except (AttributeError, IndexError, KeyError, ValueError):
        text = ""
    if text.count(place) != 1:
        raise ValueError(f"template must hold {{prompt}} once, and braces of its own doubled, got {template!r}")
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("chat must be False for a tokenizer without a chat template")
        text = as_chat(tokenizer, text)
        if text.count(place) != 1:
            raise ValueError(f"chat must be False for a chat template that does not show a prompt once: {text!r}")
    before, _, after = text.partition(place)
    return before, after


def as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """What a chat model reads when a user says `text`, up to where its answer begins."""
    turn = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, str, str]],
    max_prompt_tokens: int,
    truncation_side: Literal["left", "right"] = "right",
    add_special_tokens: bool = True,
) -> list[tuple[str, list[int]]]:
    """Encode prompts, dropping tokens of the body where one is too long.

    Each prompt is encoded whole, so that truncation never changes how the rest is split into tokens, and with the
    special tokens that the tokenizer puts around a text (Llama's and Gemma's BOS, T5's EOS), which models were trained
    with.

    Args:
        tokenizer: The tokenizer.
        prompts: Triples (before, body, after); only the body may be truncated.
        max_prompt_tokens: Most tokens of a prompt.
        truncation_side: Which end of the body is dropped.
        add_special_tokens: False where the prompts hold them already, as those of a chat do.

    Returns:
        For each prompt the text that is left and its token ids.

    Raises:
        ValueError: A prompt that is too long without its body, or that has no tokens at all.
    """
    if not tokenizer.is_fast:
        arguments = (max_prompt_tokens, truncation_side, add_special_tokens)
        return [_encode_parts(tokenizer, parts, *arguments) for parts in prompts]
    texts = ["".join(parts) for parts in prompts]
    encoded = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    result = []
    for (before, body, _), text, ids, offsets, special in zip(
        prompts, texts, *(encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask")), strict=True
    ):
        if all(special):
            raise ValueError(f"a prompt must have at least one token, got {text!r}")
        excess = len(ids) - max_prompt_tokens
        if excess > 0:
            start, end = len(before), len(before) + len(body)
            inside = [i for i, (low, high) in enumerate(offsets) if low >= start and high <= end and not special[i]]
            if len(inside) < excess:
                raise _too_long(max_prompt_tokens, len(ids) - len(inside), text)
            first, last = (
                (inside[-excess], inside[-1]) if truncation_side == "right" else (inside[0], inside[excess - 1])
            )
            ids = ids[:first] + ids[last + 1 :]
            # A token that is partly of the part before or after the body stays, and so does its text.
            text = text[: max(start, offsets[first - 1][1] if first else 0)] + text[offsets[last][1] :]
        result.append((text, ids))
    return result


def _encode_parts(
    tokenizer: PreTrainedTokenizerBase,
    parts: tuple[str, str, str],
    max_prompt_tokens: int,
    truncation_side: str,
    add_special_tokens: bool,
) -> tuple[str, list[int]]:
    """For tokenizers that do not tell which characters a token covers: each part is encoded on its own."""
    before, body, after = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in parts)
    if not before + body + after:
        raise ValueError(f"a prompt must have at least one token, got {''.join(parts)!r}")
    letter = tokenizer("a", add_special_tokens=add_special_tokens, return_special_tokens_mask=True, verbose=False)
    ids, special = letter["input_ids"], letter["special_tokens_mask"]
    before = ids[: special.index(0)] + before
    after = after + ids[len(ids) - special[::-1].index(0) :]
    room = max_prompt_tokens - len(before) - len(after)
    if room < 0:
        raise _too_long(max_prompt_tokens, len(before) + len(after), "".join(parts))
    if len(body) > room:
        body = body[:room] if truncation_side == "right" else body[len(body) - room :]
        parts = (parts[0], str(tokenizer.decode(body)), parts[2])
    return "".join(parts), before + body + after


def _too_long(max_prompt_tokens: int, needed: int, text: str) -> ValueError:
    return ValueError(
        f"max_prompt_tokens={max_prompt_tokens} is too small: this prompt needs at least {needed} tokens for the parts "
        f"that are never truncated: {text[:200]!r}"
    )


def as_continuation(prompt: str, text: str) -> str:
    """`text` with a leading space where neither it nor the end of `prompt` has one."""
    if prompt and text and not prompt[-1].isspace() and not text[0].isspace():
        return " " + text
    return text


def encode_continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts that continue a prompt, without an EOS.

    Args:
        tokenizer: The tokenizer.
        prompt: The text before each of them.
        texts: Continuations; a leading space is added where there is none (see `as_continuation`).
    """
    if not texts:
        return []
    return tokenizer([as_continuation(prompt, text) for text in texts], add_special_tokens=False, verbose=False)[
        "input_ids"
    ]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    """Decode token ids without special tokens; bytes that end inside a character become U+FFFD."""
    if not ids:
        return []
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Ends:
    """Where a text ends: after EOS or another token that ends it, or before a string.

    Args:
        tokenizer: The tokenizer.
        stop: Strings before which a text ends. The name of a special token, such as "<|im_end|>", means that token.

    Attributes:
        tokens: bool (V,), the tokens that end a text whatever stands before them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self.tokens = np.zeros(len(tokenizer), bool)
        self.tokens[tokenizer.eos_token_id] = True
        self._strings: tuple[str, ...] = ()
        vocabulary = tokenizer.get_vocab() if stop else {}
        for string in stop:
            if string in vocabulary and not decode(tokenizer, [[vocabulary[string]]])[0]:
                self.tokens[vocabulary[string]] = True  # texts are decoded without it
            else:
                self._strings = (*self._strings, string)
        # Whether a token can complete a string (-1: not known yet), so that few texts are decoded while they grow.
        self._near = np.full(len(tokenizer), -1, np.int8)

    def reached(self, tokens: np.ndarray, written: Callable[[int], list[int]]) -> np.ndarray:
        """Which texts ended with their last token.

        Args:
            tokens: (n,) integers, each text's last token.
            written: All tokens of text i, the last included; asked for few.

        Returns:
            bool (n,).
        """
        ended = self.tokens[tokens]
        if self._strings:
            near = np.flatnonzero(self._can_complete(tokens) & ~ended)
            ended[near] = [
                self._holds_one(text) for text in decode(self._tokenizer, [written(i) for i in near.tolist()])
            ]
        return ended

    def cut(self, ids: Sequence[int], begun: Sequence[int] = ()) -> list[int] | None:
        """What of `ids` is written after `begun` until the text ends, its end included; None where it does not end."""
        array = np.asarray(ids, np.int64)
        near = self.tokens[array] | self._can_complete(array)
        for length in (np.flatnonzero(near) + 1).tolist():
            if self.tokens[array[length - 1]] or self._holds_one(decode(self._tokenizer, [[*begun, *ids[:length]]])[0]):
                return list(ids[:length])
        return None

    def texts(self, token_ids: Sequence[Sequence[int]]) -> list[str]:
        """The texts of token ids that go no further than their ends, without these."""
        kept = [list(ids[:-1]) if len(ids) and self.tokens[ids[-1]] else list(ids) for ids in token_ids]
        return [text[: min(self._starts(text), default=None)] for text in decode(self._tokenizer, kept)]

    def _can_complete(self, tokens: np.ndarray) -> np.ndarray:
        """Whether tokens (n,) hold the last character of a string, or bytes that can be part of it."""
        if not self._strings:
            return np.zeros(tokens.shape, bool)
        new = np.unique(tokens[self._near[tokens] < 0]).tolist()
        # After a letter, because decoded alone some tokens lose a leading space.
        letter = self._tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"] if new else []
        (start, *texts) = decode(self._tokenizer, [letter, *([*letter, token] for token in new)])
        last = {string[-1] for string in self._strings} | {"\ufffd"}
        self._near[new] = [not last.isdisjoint(text[len(start) :]) for text in texts]
        return self._near[tokens] > 0

    def _holds_one(self, text: str) -> bool:
        return any(string in text for string in self._strings)

    def _starts(self, text: str) -> list[int]:
        return [text.index(string) for string in self._strings if string in text]
