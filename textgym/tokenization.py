"""Text to token ids and back, for prompts, references and whatever a guide writes."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from textgym.hub import file_beside, load_pretrained
from textgym.storage import cache_dir, made_once
from textgym.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EOS, PAD = "<|endoftext|>", "<|pad|>"
VOCAB_SIZE = 8192
# Enough text for stable merges; more would only slow the first start.
TRAINING_ROWS = 20_000


def load_tokenizer(
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None, task: Task, source: str
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an environment.

    Args:
        tokenizer: A tokenizer, its hub id or path, or None for the one of the task; where it has none, a byte-level BPE
            of at most 8,192 tokens is trained on the task's train split and cached.
        task: The task.
        source: The data source ("mini", "hub" or a folder) to train on.

    Raises:
        ValueError: `tokenizer` is none of these, or has no end-of-sequence token.
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


def pretrained_tokenizer(
    path: str | os.PathLike, gguf_file: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from its hub id or folder, or from a GGUF file there.

    Its own Python code runs only with `trust_remote_code`.

    Raises:
        ValueError: There is no tokenizer.
    """
    from transformers import AutoTokenizer  # imports torch
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    wrong = f"tokenizer must be a hub id or a folder with a tokenizer, got {str(path)!r}"
    kind: Any = AutoTokenizer
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        if gguf_file is not None:
            options["gguf_file"] = gguf_file
        # These classes are what the tokenizer file says; AutoTokenizer would use the class of the model's family.
        elif get_tokenizer_config(str(path)).get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
            kind = PreTrainedTokenizerFast
        tokenizer = load_pretrained(kind, path, **options)
    except Exception as error:  # that of tokenizers is a bare one
        raise ValueError(f"{wrong}: {error}") from error
    # For a model without tokenizer, transformers makes one of nothing but the special tokens of its architecture.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{wrong}, which has none")
    return tokenizer


def _trained_tokenizer(task: Task, source: str) -> PreTrainedTokenizerBase:
    split = task.split("train", source)

    def texts(rows: int) -> list[str]:
        written = []
        for _, row in zip(range(rows), split.rows, strict=False):
            prompt = "".join(task.prompt_of(row))
            written += [prompt, *(as_continuation(prompt, reference) for reference in task.references_of(row))]
        return written

    # Tasks can write the same data as different texts, which a few rows show.
    layout = hashlib.sha256("\n".join(texts(8)).encode()).hexdigest()[:8]
    folder = cache_dir() / "tokenizers" / f"{task.name}-{split.fingerprint}-{layout}-{VOCAB_SIZE}"
    return made_once(
        folder,
        make=lambda: train_tokenizer(texts(TRAINING_ROWS)),
        keep=lambda tokenizer, new: tokenizer.save_pretrained(new),
        load=partial(load_pretrained, PreTrainedTokenizerFast),
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ``<|endoftext|>`` (0) as EOS and ``<|pad|>`` (1) as padding.

    It has at most `vocab_size` tokens; pairs that occur only once are not merged.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    empty = Tokenizer(models.BPE())
    empty.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    empty.decoder = decoders.ByteLevel()
    untrained = PreTrainedTokenizerFast(tokenizer_object=empty, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    return untrained.train_new_from_iterator(texts, vocab_size, min_frequency=2, show_progress=False)


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer of ``<|endoftext|>`` (0) as EOS and whole words, separated by white space (1, 2, ...)."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    whole = Tokenizer(models.WordLevel({word: token for token, word in enumerate((EOS, *words))}))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=whole, eos_token=EOS)


class _Vocabulary(NamedTuple):
    """Facts about a tokenizer's vocabulary that are looked up often."""

    size: int  # the largest id plus one
    longest: int  # characters of the longest token
    special: tuple[str, ...]  # names of the special tokens
    gaps: tuple[int, ...]  # ids below that are no token
    ordinary: np.ndarray  # bool (size,), tokens that are text in any context: neither special nor a byte
    # Whether texts are encoded and decoded to the same alone and after others, space included, except for bytes that
    # are part of a character; None for tokenizers that encode only words of their vocabulary.
    joins: bool | None
    whole: dict[int, bool]  # whether tokens looked up so far are of whole characters
    decoded: dict[tuple[int, ...], str]  # texts of the ends of some contexts


_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_VOCABULARIES: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, _Vocabulary]] = WeakKeyDictionary()


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> _Vocabulary:
    count, known = _VOCABULARIES.get(tokenizer, (-1, None))
    if known is None or count != len(tokenizer):  # tokens can be added to a tokenizer
        tokens = tokenizer.get_vocab()
        size = max(tokens.values()) + 1
        ordinary = np.zeros(size, bool)
        ordinary[list(tokens.values())] = True
        gaps = np.flatnonzero(~ordinary).tolist() if size > len(set(tokens.values())) else []
        apart = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ordinary[[id for id in apart if id < size]] = False
        ordinary[[id for token, id in tokens.items() if token.startswith("<0x") and _BYTE.fullmatch(token)]] = False
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        special = tuple(name for name in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if name)
        known = _Vocabulary(size, max(map(len, tokens)), special, tuple(gaps), ordinary, _joins(tokenizer), {}, {})
        _VOCABULARIES[tokenizer] = len(tokenizer), known
    return known


def _joins(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    texts = ["a", " a", "  a", "\n a", "a ", "."]
    try:
        letter, *ids = encode(tokenizer, ["x", *texts])
    except ValueError:  # a word has no token
        return None
    return decode(tokenizer, [*ids, *([*letter, *line] for line in ids)]) == [*texts, *("x" + text for text in texts)]


def _is_whole(tokenizer: PreTrainedTokenizerBase, token: int) -> bool:
    """Whether a token is of whole characters."""
    known = _vocabulary(tokenizer).whole
    if token not in known:
        text = decode(tokenizer, [[token]])[0]
        known[token] = bool(text) and "\ufffd" not in text
    return known[token]


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of token ids, which is the largest plus one: a vocabulary can have gaps."""
    return _vocabulary(tokenizer).size


def unused_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids below `vocabulary_size` that are no token."""
    return _vocabulary(tokenizer).gaps


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embedded: int) -> None:
    """Refuse a tokenizer that cannot belong to a model that embeds `embedded` tokens.

    Tokens that were added to its vocabulary may be more than that (Gemma 3's token for images, CodeLlama's for gaps, a
    padding token), if EOS is not one of them.

    Raises:
        ValueError: It cannot.
    """
    known = _vocabulary(tokenizer)
    if known.ordinary[embedded:].any() or (tokenizer.eos_token_id or 0) >= embedded:
        raise ValueError(
            f"the tokenizer has {known.size} tokens, but the model's vocabulary has only {embedded}: they do not "
            "belong together"
        )


def check_embedded(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, input_ids: Any, mask: Any) -> None:
    """Refuse texts (B, S), arrays or tensors that are valid where `mask` is nonzero, with tokens not in the model.

    Raises:
        ValueError: There is a token that the model does not embed.
    """
    embeddings: Any = model.get_input_embeddings()
    embedded = embeddings.weight.shape[0]
    if vocabulary_size(tokenizer) <= embedded:  # the usual case, in which nothing is looked at
        return
    beyond = input_ids[(mask != 0) & (input_ids >= embedded)]
    if len(beyond):
        token = int(beyond[0])
        raise ValueError(
            f"texts must hold only tokens that {type(model).__name__} embeds, of which there are {embedded}, got token "
            f"{token}, {tokenizer.convert_ids_to_tokens(token)!r}"
        )


def eos_first(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> tuple[int, ...]:
    """EOS, where the tokenizer has one, then other tokens that end a text, each once."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*eos, *token_ids]))


def end_ids(tokenizer: PreTrainedTokenizerBase, of_model: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a text of a model, EOS first; `of_model` is `eos_token_id` of its generation config.

    Every entry of a list counts. A single id counts only where the tokenizer has it as an added token, as every token
    that ends a text is: a config that nobody wrote names an arbitrary token of another vocabulary.
    """
    if isinstance(of_model, int):
        of_model = [of_model] if of_model in tokenizer.added_tokens_decoder else []
    size = vocabulary_size(tokenizer)
    return eos_first(tokenizer, [int(token) for token in of_model or () if 0 <= token < size])


def ends_beside(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text of the model in the tokenizer's folder (see `end_ids`).

    Raises:
        ValueError: The model's generation config cannot be read.
    """
    file = file_beside(tokenizer.name_or_path, "generation_config.json") if tokenizer.name_or_path else None
    if file is None:
        return end_ids(tokenizer, None)
    try:
        return end_ids(tokenizer, json.loads(Path(file).read_text()).get("eos_token_id"))
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file} must be a JSON object whose eos_token_id is a token id, a list of them or null: {error}"
        ) from error


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The added token with which the chat template closes an answer; None for none."""
    place = "\0"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": place}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template that shows no answers can raise anything
        return None
    _, _, after = text.rpartition(place)
    ids = encode(tokenizer, [after])[0] if place in text and after else []
    return next((id for id in ids if id in tokenizer.added_tokens_decoder and id != tokenizer.unk_token_id), None)


def template_parts(tokenizer: PreTrainedTokenizerBase, template: str, chat: bool) -> tuple[str, str]:
    """The texts that a template with ``{prompt}`` puts before and after a prompt.

    With `chat` the filled template is a user's message in the tokenizer's chat template, which the model answers next.

    Raises:
        ValueError: The template does not hold ``{prompt}`` once and no other field, or `chat` is True without a chat
            template that shows a user's message once.
    """
    place = "\0"
    try:
        text = template.format(prompt=place)
    except (AttributeError, IndexError, KeyError, ValueError):
        text = ""
    if text.count(place) != 1:
        raise ValueError(f"template must hold {{prompt}} once, and all other braces doubled, got {template!r}")
    if chat:
        if tokenizer.chat_template is None:
            raise ValueError("chat must be False for a tokenizer without a chat template")
        text = as_chat(tokenizer, text)
        if text.count(place) != 1:
            raise ValueError(f"chat must be False for a chat template that does not show a prompt once: {text!r}")
    before, _, after = text.partition(place)
    return before, after


def as_chat(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text that a chat model reads before it answers a user's message."""
    turn = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[tuple[str, str, str]],
    max_prompt_tokens: int,
    truncation_side: Literal["left", "right"] = "right",
    add_special_tokens: bool = True,
    template: tuple[str, str] | None = ("", ""),
) -> list[tuple[str, list[int]]]:
    """Encode prompts, dropping tokens of the body where one is too long.

    Each prompt is encoded whole, so that truncation never changes how the rest is split into tokens, and with the
    special tokens that the tokenizer puts around a text (BOS of Llama and Gemma, EOS of T5), with which models were
    trained; a prompt that already has a BOS gets no second one. Only the template means special tokens by their names:
    in a prompt "<|endoftext|>" is thirteen letters.

    Args:
        tokenizer: The tokenizer.
        prompts: Triples (before, body, after); only the body may be truncated.
        max_prompt_tokens: Most tokens of a prompt.
        truncation_side: Which end of the body is dropped.
        add_special_tokens: False for prompts that already hold them, as those of a chat do.
        template: The texts before and after every prompt; None for prompts that may name special tokens themselves.

    Returns:
        For each prompt the text that is left, the template's included, and its token ids.

    Raises:
        ValueError: A prompt that is too long without its body, that has no tokens at all, or that cannot be encoded.
    """
    if not prompts:
        return []
    names = () if template is None else _vocabulary(tokenizer).special
    opening, closing = template or ("", "")
    apart = [not tokenizer.is_fast or any(name in part for name in names for part in parts) for parts in prompts]
    if any(apart):
        how = (max_prompt_tokens, truncation_side, add_special_tokens, template)
        return [
            _encode_parts(tokenizer, parts, *how) if alone else encode_prompts(tokenizer, [parts], *how)[0]
            for parts, alone in zip(prompts, apart, strict=True)
        ]
    prompts = [(opening + before, body, after + closing) for before, body, after in prompts]
    texts = ["".join(parts) for parts in prompts]
    encoded = _tokenize(
        tokenizer,
        texts,
        "a prompt",
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    result = []
    for (before, body, _), text, ids, offsets, special in zip(
        prompts, texts, *(encoded[name] for name in ("input_ids", "offset_mapping", "special_tokens_mask")), strict=True
    ):
        if all(special):
            raise ValueError(f"a prompt must have at least one token, got {text!r}")
        if has_bos_twice(tokenizer, text, ids):
            ids, offsets, special = ids[1:], offsets[1:], special[1:]
        excess = len(ids) - max_prompt_tokens
        if excess > 0:
            start, end = len(before), len(before) + len(body)
            inside = [i for i, (low, high) in enumerate(offsets) if low >= start and high <= end and not special[i]]
            if len(inside) < excess:
                raise _too_long(max_prompt_tokens, len(ids) - len(inside), text)
            dropped = inside[-excess:] if truncation_side == "right" else inside[:excess]
            first, last = dropped[0], dropped[-1]
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
    template: tuple[str, str] | None,
) -> tuple[str, list[int]]:
    """Encode each part of a prompt alone.

    This is for tokenizers that do not say which characters a token covers, and for prompts in which the name of a
    special token stands.
    """
    start, end = template or ("", "")
    names = _vocabulary(tokenizer).special

    def encoded(*pieces: tuple[str, bool]) -> list[int]:
        """Encode texts that follow each other, each with whether it means the special tokens that it names."""
        if not any(name in text for name in names for text, means in pieces if not means):
            pieces = (("".join(text for text, _ in pieces), True),)
        lines = [encode(tokenizer, [text], literal=not means, what="a prompt")[0] for text, means in pieces]
        return [token for line in lines for token in line]

    own = template is None
    before, body, after = (
        encoded((start, True), (parts[0], own)),
        encoded((parts[1], own)),
        encoded((parts[2], own), (end, True)),
    )
    parts = (start + parts[0], parts[1], parts[2] + end)
    if not before + body + after:
        raise ValueError(f"a prompt must have at least one token, got {''.join(parts)!r}")
    letter = tokenizer("a", add_special_tokens=add_special_tokens, return_special_tokens_mask=True, verbose=False)
    ids, special = letter["input_ids"], letter["special_tokens_mask"]
    before = ids[: special.index(0)] + before
    if has_bos_twice(tokenizer, "".join(parts), before):
        before = before[1:]
    after = after + ids[len(ids) - special[::-1].index(0) :]
    room = max_prompt_tokens - len(before) - len(after)
    if room < 0:
        raise _too_long(max_prompt_tokens, len(before) + len(after), "".join(parts))
    if len(body) > room:
        body = body[:room] if truncation_side == "right" else body[len(body) - room :]
        parts = (parts[0], str(tokenizer.decode(body)), parts[2])
    return "".join(parts), before + body + after


def has_bos_twice(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> bool:
    """Whether a tokenizer put a BOS before a text that begins with one, as texts of a chat template do."""
    bos = tokenizer.bos_token
    once = bool(bos) and text.startswith(bos) and not text.startswith(2 * bos)
    return once and [*ids[:2]] == 2 * [tokenizer.bos_token_id]


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


class Context(NamedTuple):
    """Everything before new tokens: its token ids, and its text as readers of the new text see it."""

    ids: Sequence[int] = ()
    text: str = ""


NO_CONTEXT = Context()

# Characters and tokens of a context that a tokenizer looks at, and how many ends of contexts are kept decoded.
_LAST_CHARACTERS, _LAST_TOKENS, _DECODED_ENDS = 32, 4, 10_000
# Texts whose tokens, with some tokenizers, do not merge with the following text.
_ANCHORS = ("a", ".", "\n", "\u4e2d")


def encode_continuations(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], texts: Sequence[str], what: str = "a text"
) -> list[list[int]]:
    """Encode texts that continue prompts, without an EOS.

    A SentencePiece tokenizer adds or removes a space before a text that is encoded alone. Where decoding the tokens
    after the prompt shows that, the text is encoded after an anchor, whose tokens are then left out. A leading space is
    added where there is none (see `as_continuation`). The name of a special token is a text like any other: data and
    guides cannot end a text by writing "<|endoftext|>".

    Args:
        tokenizer: The tokenizer.
        prompts: N prompts.
        texts: N texts, one for each prompt.
        what: What a text is, in errors.

    Raises:
        ValueError: A text cannot be encoded.
    """
    if not texts:
        return []
    texts = [as_continuation(prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
    ids = encode(tokenizer, texts, literal=True, what=what)
    if _vocabulary(tokenizer).joins is not False:
        return ids
    ends = [prompt[-_LAST_CHARACTERS:] for prompt in prompts]
    contexts = [Context(line, end) for line, end in zip(encode(tokenizer, ends), ends, strict=True)]

    def lose_space(lines: Mapping[int, Sequence[int]]) -> set[int]:
        """Which texts would be read with other space at their start than they have, if these were their tokens."""
        starts = [line[: 2 * _LAST_TOKENS] for line in lines.values()]
        read = decode_continuations(tokenizer, [contexts[i] for i in lines], starts)
        return {i for i, start in zip(lines, read, strict=True) if _leading_space(start) != _leading_space(texts[i])}

    wrong = sorted(lose_space({i: ids[i] for i, end in enumerate(ends) if end}))
    for anchor in ("", *_ANCHORS):
        if not wrong:
            break
        anchors = [anchor or ends[i] for i in wrong]  # the end of its own prompt comes first
        before = encode(tokenizer, anchors, literal=True)
        both = encode(tokenizer, [anchor + texts[i] for anchor, i in zip(anchors, wrong, strict=True)], literal=True)
        after = {
            i: line[len(start) :]
            for i, start, line in zip(wrong, before, both, strict=True)
            if line[: len(start)] == start and len(line) > len(start)
        }
        lost = lose_space(after)
        for i in after.keys() - lost:
            ids[i] = after[i]
        wrong = [i for i in wrong if i not in after or i in lost]
    return ids


def _leading_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _end_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[int, ...]:
    """The last tokens of a context, from one that is decoded to the same whatever stands before it."""
    ordinary = _vocabulary(tokenizer).ordinary
    start = max(len(ids) - _LAST_TOKENS, 0)
    while start > 0 and not (ordinary[ids[start]] and _is_whole(tokenizer, ids[start])):
        start -= 1
    return tuple(ids[start:])


def decode_continuations(
    tokenizer: PreTrainedTokenizerBase, contexts: Sequence[Context], token_ids: Sequence[Sequence[int]]
) -> list[str]:
    """Decode n sequences of token ids that continue n contexts: the decoded whole less the decoded context.

    All new tokens are decoded here, for rewards, guides, stop strings, infos and renderings. Decoded alone,
    SentencePiece and WordPiece tokens lose the space before the first word.

    Returns:
        n texts without special tokens. Where the tokens of a context have lost the space at the end of its text (those
        of T5), the new text begins without one. Bytes that end inside a character become U+FFFD; a character that
        begins in the context and ends in the new tokens belongs to the new text.
    """
    if not len(token_ids):
        return []
    known = _vocabulary(tokenizer)
    if known.joins and all(not ids or _is_whole(tokenizer, ids[-1]) for ids, _ in contexts):
        return decode(tokenizer, [list(ids) for ids in token_ids])
    ends = [_end_of(tokenizer, ids) for ids, _ in contexts]
    if len(known.decoded) > _DECODED_ENDS:
        known.decoded.clear()
    new = [end for end in dict.fromkeys(ends) if end not in known.decoded]
    known.decoded.update(zip(new, decode(tokenizer, [list(end) for end in new]), strict=True))
    wholes = decode(tokenizer, [[*end, *ids] for end, ids in zip(ends, token_ids, strict=True)])
    texts = []
    for (_, shown), end, ids, whole in zip(contexts, ends, token_ids, wholes, strict=True):
        before = known.decoded[end]
        complete = before.rstrip("\ufffd")
        if whole.startswith(before):
            text = whole[len(before) :]
        elif whole.startswith(complete):
            text = whole[len(complete) :]
        else:  # single bytes spoil all bytes before them while they make no character
            letter = encode(tokenizer, ["a"])[0]
            alone, begun = decode(tokenizer, [letter, [*letter, *ids]])
            text = begun[len(alone) :]
        lost = before and before == before.rstrip() and shown != shown.rstrip()
        texts.append(text.lstrip() if lost else text)
    return texts


def decode_by_author(
    tokenizer: PreTrainedTokenizerBase, context: Context, token_ids: Sequence[int], authors: Sequence[int] | np.ndarray
) -> list[tuple[int, str]]:
    """Split T tokens by their authors' codes into stretches of one each; returns pairs of author and decoded text.

    Each stretch is decoded as a continuation of everything before it, of which `context` is before all of them.
    """
    written_by, stretches, contexts = [], [], [context]
    for author, pairs in groupby(zip(authors, token_ids, strict=True), key=lambda pair: int(pair[0])):
        written_by.append(author)
        stretches.append([token for _, token in pairs])
        contexts.append(Context([*contexts[-1].ids, *stretches[-1]], ""))
    texts = decode_continuations(tokenizer, contexts[:-1], stretches)
    return list(zip(written_by, texts, strict=True))


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], literal: bool = False, what: str = "a text"
) -> list[list[int]]:
    """Encode texts as they stand, without special tokens around them (see `encode_continuations` for continuations).

    Args:
        tokenizer: The tokenizer.
        texts: N texts.
        literal: Whether the name of a special token in a text is no token, but letters.
        what: What a text is, in errors.

    Raises:
        ValueError: A text is not Unicode, has a word without a token where there is none for unknown words, or has the
            name of a special token which the tokenizer cannot read literally.
    """
    names = _vocabulary(tokenizer).special if literal else ()
    meant = [name for name in names if any(name in text for text in texts)]
    if not meant:
        return _tokenize(tokenizer, texts, what, add_special_tokens=False)["input_ids"]
    ids = _tokenize(tokenizer, texts, what, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    wrong = {tokenizer.convert_tokens_to_ids(name) for name in meant} - {tokenizer.unk_token_id}
    if any(not wrong.isdisjoint(line) for line in ids):
        kind = type(tokenizer).__name__
        raise ValueError(
            f"{what} must not hold {meant}, names of special tokens that this {kind} cannot read as letters"
        )
    return ids


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], what: str, **how: Any) -> Any:
    try:
        return tokenizer(list(texts), verbose=False, **how)
    except Exception as error:  # tokenizers raise it where a word has no token, and TypeError for lone surrogates
        culprit = texts[0]
        for text in texts:
            try:
                tokenizer(text, verbose=False, **how)
            except Exception:
                culprit = text
                break
        raise ValueError(f"{what} must be one that the tokenizer can encode, got {culprit[:200]!r}: {error}") from error


def beginning(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> str:
    """Return enough of the start of a text for its first `count` tokens, however long it is."""
    # With some more, because the last tokens can depend on what follows.
    return text[: (count + 16) * _vocabulary(tokenizer).longest]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    """Decode whole texts without special tokens (see `decode_continuations` for continuations)."""
    if not ids:
        return []
    methods = attrgetter("_decode", "decode", "batch_decode")
    if tokenizer.is_fast and methods(type(tokenizer)) == methods(PreTrainedTokenizerFast):
        # These do the same for each text, after looking at the type of every id.
        decode_one = tokenizer.backend_tokenizer.decode
        return [decode_one(line, skip_special_tokens=True) for line in ids]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopCriteria:
    """Decides where a text ends: after EOS or another token that ends it, or before a string.

    Args:
        tokenizer: The tokenizer.
        stop: Strings before which a text ends. The name of a special token, such as "<|im_end|>", means that token.
        more_ids: Tokens that end a text in addition to EOS.
        chat: Whether the token that closes an answer in the chat template ends a text, too.

    Attributes:
        token_ids: The tokens that end a text, EOS first.
        tokens: bool (V,), which these are.
        closing_token: The token to end a text with: with `chat` the one that closes an answer, else the first that
            `stop` names, else EOS. The first two come before EOS, which a model may never have seen there.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str] = (),
        more_ids: Sequence[int] = (),
        chat: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab() if stop else {}
        # Texts are decoded without special tokens, so their names are never in one.
        special = {*tokenizer.all_special_ids}
        named = {text: vocabulary[text] for text in stop if vocabulary.get(text) in special}
        closing = end_of_turn(tokenizer) if chat else None
        own = [*([] if closing is None else [closing]), *named.values()]
        self.closing_token: Any = own[0] if own else tokenizer.eos_token_id
        self.token_ids = eos_first(tokenizer, [*more_ids, *own])
        self.tokens = np.zeros(vocabulary_size(tokenizer), bool)
        self.tokens[list(self.token_ids)] = True
        self._strings = tuple(text for text in stop if text not in named)
        # Whether a token can complete a string (-1: not known yet), so that few texts are decoded while they grow.
        self._near = np.full(len(self.tokens), -1, np.int8)

    def with_tokens(self, token_ids: Sequence[int]) -> StopCriteria:
        """The same criteria with further tokens that end a text."""
        more = copy.copy(self)
        more.token_ids = eos_first(self._tokenizer, [*self.token_ids, *token_ids])
        more.tokens = self.tokens.copy()
        more.tokens[list(more.token_ids)] = True
        return more

    def reached(
        self, tokens: np.ndarray, written: Callable[[int], list[int]], context: Callable[[int], Context] | None = None
    ) -> np.ndarray:
        """Which texts ended with their last token.

        Args:
            tokens: (n,) integers, each text's last token.
            written: Returns all tokens of text i, the last included; it is called for few texts.
            context: Returns the context of text i; None for no contexts.

        Returns:
            bool (n,).
        """
        ended = self.tokens[tokens]
        if self._strings:
            near = np.flatnonzero(self._can_complete(tokens) & ~ended)
            contexts = [NO_CONTEXT if context is None else context(i) for i in near.tolist()]
            ended[near] = self._hold_strings(contexts, [written(i) for i in near.tolist()])
        return ended

    def cut(self, ids: Sequence[int], begun: Sequence[int] = (), context: Context = NO_CONTEXT) -> list[int] | None:
        """Cut token ids after the one with which the text, `begun` before them, ends; None where it does not end."""
        array = np.asarray(ids, np.int64)
        near = self.tokens[array] | self._can_complete(array)
        for length in (np.flatnonzero(near) + 1).tolist():
            if self.tokens[array[length - 1]] or self._hold_strings([context], [[*begun, *ids[:length]]])[0]:
                return list(ids[:length])
        return None

    def texts(self, token_ids: Sequence[Sequence[int]], contexts: Sequence[Context] | None = None) -> list[str]:
        """Decode token ids that were cut where the text ends (see `cut`), without the token or string that ends it."""
        contexts = [NO_CONTEXT] * len(token_ids) if contexts is None else contexts
        kept = [list(ids[:-1]) if len(ids) and self.tokens[ids[-1]] else list(ids) for ids in token_ids]
        return [
            text[: min((text.index(string) for string in self._strings if string in text), default=None)]
            for text in decode_continuations(self._tokenizer, contexts, kept)
        ]

    def _can_complete(self, tokens: np.ndarray) -> np.ndarray:
        """Whether tokens (n,) hold the last character of a string, or bytes that can be part of it."""
        if not self._strings:
            return np.zeros(tokens.shape, bool)
        new = np.unique(tokens[self._near[tokens] < 0]).tolist()
        # Twice, because at the beginning of a text some tokens lose a leading space.
        texts = decode(self._tokenizer, [[token, token] for token in new])
        last = {string[-1] for string in self._strings} | {"\ufffd"}
        self._near[new] = [not last.isdisjoint(text) for text in texts]
        return self._near[tokens] > 0

    def _hold_strings(self, contexts: Sequence[Context], token_ids: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the text of token ids holds a string, for each of n."""
        texts = decode_continuations(self._tokenizer, contexts, token_ids)
        return [any(string in text for string in self._strings) for text in texts]


Ends = StopCriteria  # its old name
