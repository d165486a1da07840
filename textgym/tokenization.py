"""Text to token ids and back, for prompts, references and whatever a guide writes."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from textgym.hub import file_beside
from textgym.storage import cache_dir, new_folder
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


def pretrained_tokenizer(path: str | os.PathLike, gguf_file: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path: Hub id or folder.
        gguf_file: The GGUF file there with model and tokenizer, if it is one.

    Raises:
        ValueError: There is no tokenizer.
    """
    from transformers import AutoTokenizer  # imports torch
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    kind: Any = AutoTokenizer
    try:
        if gguf_file is None:
            # These classes are what the tokenizer file says; AutoTokenizer would use the class of the model's family.
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
    # For a model without tokenizer, transformers makes one of nothing but the special tokens of its architecture.
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

    # Tasks can write the same data as different texts, which a few rows show.
    layout = hashlib.sha256("\n".join(texts(8)).encode()).hexdigest()[:8]
    folder = cache_dir() / "tokenizers" / f"{task.name}-{split.fingerprint}-{layout}-{VOCAB_SIZE}"
    if folder.is_dir():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer = train_tokenizer(texts(TRAINING_ROWS))
    # Where another process finishes first, its tokenizer is the same.
    with new_folder(folder, keep_existing=True) as temporary:
        tokenizer.save_pretrained(temporary)
    return tokenizer


def train_tokenizer(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with ``<|endoftext|>`` (0) as EOS and ``<|pad|>`` (1) as padding.

    Args:
        texts: The texts to train on.
        vocab_size: Most tokens; pairs that occur only once are not merged.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    empty = Tokenizer(models.BPE())
    empty.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    empty.decoder = decoders.ByteLevel()
    untrained = PreTrainedTokenizerFast(tokenizer_object=empty, bos_token=EOS, eos_token=EOS, pad_token=PAD)
    return untrained.train_new_from_iterator(texts, vocab_size, min_frequency=2, show_progress=False)


class _Vocabulary(NamedTuple):
    """What is looked up often of a tokenizer's vocabulary.

    Attributes:
        size: The largest id plus one.
        gaps: The ids below that are no token.
        ordinary: bool (size,), tokens that are text whatever stands around them: neither special nor a byte.
        joins: Whether texts are encoded and decoded to the same alone and after others, space included, up to where
            single bytes make a character; None where texts cannot be encoded, but for words of the vocabulary.
        whole: Tokens known to be of whole characters, or known not to.
        decoded: Texts of the ends of contexts, as many as are worth keeping.
    """

    size: int
    gaps: tuple[int, ...]
    ordinary: np.ndarray
    joins: bool | None
    whole: dict[int, bool]
    decoded: dict[tuple[int, ...], str]


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
        known = _Vocabulary(size, tuple(gaps), ordinary, _joins(tokenizer), {}, {})
        _VOCABULARIES[tokenizer] = len(tokenizer), known
    return known


def _joins(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    texts = ["a", " a", "  a", "\n a", "a ", "."]
    try:
        letter, *ids = tokenizer(["x", *texts], add_special_tokens=False, verbose=False)["input_ids"]
    except Exception:  # tokenizers raise it where a word has no token
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
    """How many token ids there are, which is the largest plus one: a vocabulary can have gaps."""
    return _vocabulary(tokenizer).size


def unused_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids below `vocabulary_size` that are no token."""
    return _vocabulary(tokenizer).gaps


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, embedded: int) -> None:
    """Refuse a tokenizer that cannot belong to a model.

    Args:
        tokenizer: The tokenizer. Tokens that were added to its vocabulary may be more than the model embeds (Gemma 3's
            token for images, CodeLlama's for gaps, a padding token of one's own), if EOS is not among these.
        embedded: Tokens that the model embeds.

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
    """Refuse texts with tokens that a model does not embed.

    Args:
        tokenizer: The tokenizer of the texts.
        model: The model.
        input_ids: (B, S) integers, an array or a tensor.
        mask: (B, S), nonzero where `input_ids` is valid.

    Raises:
        ValueError: There is such a token; the message names it.
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


def end_ids(tokenizer: PreTrainedTokenizerBase, of_model: int | Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's EOS first, where it has one, then those of the model.

    Args:
        tokenizer: The tokenizer.
        of_model: `eos_token_id` of the model's generation config. Every entry of a list counts. A single id counts only
            where the tokenizer has it as an added token, as it has every end: a config that nobody wrote names an
            arbitrary token of a vocabulary that is not its own.
    """
    if isinstance(of_model, int):
        of_model = [of_model] if of_model in tokenizer.added_tokens_decoder else []
    first = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = vocabulary_size(tokenizer)
    return tuple(dict.fromkeys([*first, *(int(token) for token in of_model or () if 0 <= token < size)]))


def ends_beside(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a text of the model beside which a tokenizer lies (see `end_ids`).

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
    """The token with which the chat template closes an answer, one of those added to the vocabulary; None for none."""
    place = "\0"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": place}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # whatever a template of somebody else's raises: it is about questions alone
        return None
    _, _, after = text.rpartition(place)
    ids = tokenizer(after, add_special_tokens=False, verbose=False)["input_ids"] if place in text and after else []
    return next((id for id in ids if id in tokenizer.added_tokens_decoder and id != tokenizer.unk_token_id), None)


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
    with; a BOS that a prompt holds already is not put there again.

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
        if has_bos_twice(tokenizer, text, ids):
            ids, offsets, special = ids[1:], offsets[1:], special[1:]
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
    """Whether a tokenizer put a BOS before the one with which a text begins, as one from a chat template does."""
    bos = tokenizer.bos_token
    return (
        bool(bos)
        and text.startswith(bos)
        and not text.startswith(2 * bos)
        and [*ids[:2]] == 2 * [tokenizer.bos_token_id]
    )


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
    """What stands before new tokens.

    Attributes:
        ids: Its token ids.
        text: Its text, as whoever reads the new text is shown it.
    """

    ids: Sequence[int] = ()
    text: str = ""


NO_CONTEXT = Context()

# Characters and tokens of a context that a tokenizer looks at, and how many ends of contexts are kept decoded.
_LAST_CHARACTERS, _LAST_TOKENS, _DECODED_ENDS = 32, 4, 10_000
# Texts that encode to tokens which, with one tokenizer or another, do not merge with what follows.
_ANCHORS = ("a", ".", "\n", "\u4e2d")


def encode_continuation(tokenizer: PreTrainedTokenizerBase, prompt: str, texts: Sequence[str]) -> list[list[int]]:
    """Encode texts that continue a prompt, without an EOS.

    A SentencePiece tokenizer puts a space before a text that is encoded alone, or takes one away. Where decoding the
    tokens after the prompt shows that, the text is encoded after something else, of which the tokens are then left out.

    Args:
        tokenizer: The tokenizer.
        prompt: The text before each of them.
        texts: Continuations; a leading space is added where there is none (see `as_continuation`).
    """
    if not texts:
        return []
    texts = [as_continuation(prompt, text) for text in texts]
    end = prompt[-_LAST_CHARACTERS:]

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]

    def loses_space(texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each text would be read with other space at its start than it has."""
        read = decode_continuations(tokenizer, [context] * len(ids), [line[: 2 * _LAST_TOKENS] for line in ids])
        return [_leading_space(text) != _leading_space(line) for text, line in zip(texts, read, strict=True)]

    ids = encode(texts)
    if not end or _vocabulary(tokenizer).joins is not False:
        return ids
    context = Context(encode([end])[0], end)
    wrong = [i for i, lost in enumerate(loses_space(texts, ids)) if lost]
    for anchor in (end, *_ANCHORS):
        if not wrong:
            break
        before = encode([anchor])[0]
        tried = encode([anchor + texts[i] for i in wrong])
        after = [line[len(before) :] if line[: len(before)] == before else None for line in tried]
        good = {i: line for i, line in zip(wrong, after, strict=True) if line}
        for (i, line), lost in zip(
            good.items(), loses_space([texts[i] for i in good], list(good.values())), strict=True
        ):
            if not lost:
                ids[i] = line
                wrong.remove(i)
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
    """What token ids add to the text of their contexts: the decoded whole less the decoded context.

    This is the one way from new tokens to text, for rewards, guides, stop strings, infos and renderings. Decoded alone,
    SentencePiece and WordPiece tokens lose the space before the first word.

    Args:
        tokenizer: The tokenizer.
        contexts: n contexts.
        token_ids: n sequences of the ids that follow them.

    Returns:
        n texts without special tokens. Where the tokens of a context have lost the space at the end of its text (T5's
        do), the new text begins without one. Bytes that end inside a character become U+FFFD; a character that begins
        in the context and is completed by the new tokens belongs to the new text.
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
            letter = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
            alone, begun = decode(tokenizer, [letter, [*letter, *ids]])
            text = begun[len(alone) :]
        lost = before and before == before.rstrip() and shown != shown.rstrip()
        texts.append(text.lstrip() if lost else text)
    return texts


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[list[int]]) -> list[str]:
    """Decode whole texts without special tokens (see `decode_continuations` for what continues one)."""
    if not ids:
        return []
    kind, usual = type(tokenizer), PreTrainedTokenizerFast
    if tokenizer.is_fast and (kind._decode, kind.decode, kind.batch_decode) == (
        usual._decode,
        usual.decode,
        usual.batch_decode,
    ):  # which do this for each text, after looking at the type of every id
        decode_one = tokenizer.backend_tokenizer.decode
        return [decode_one(line, skip_special_tokens=True) for line in ids]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Ends:
    """Where a text ends: after EOS or another token that ends it, or before a string.

    Args:
        tokenizer: The tokenizer.
        stop: Strings before which a text ends. The name of a special token, such as "<|im_end|>", means that token.
        more_ids: Tokens that end a text beside EOS.

    Attributes:
        token_ids: The tokens that end a text whatever stands before them.
        tokens: bool (V,), which these are.
        named: Those of them that `stop` names.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), more_ids: Sequence[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        vocabulary = tokenizer.get_vocab() if stop else {}
        # Texts are decoded without special tokens, so their names are never in one.
        special = {*tokenizer.all_special_ids}
        named = {text: vocabulary[text] for text in stop if vocabulary.get(text) in special}
        self.named = tuple(named.values())
        self.tokens = np.zeros(vocabulary_size(tokenizer), bool)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.token_ids = tuple(dict.fromkeys([*eos, *more_ids, *self.named]))
        self.tokens[list(self.token_ids)] = True
        self._strings = tuple(text for text in stop if text not in named)
        # Whether a token can complete a string (-1: not known yet), so that few texts are decoded while they grow.
        self._near = np.full(len(self.tokens), -1, np.int8)

    def reached(
        self, tokens: np.ndarray, written: Callable[[int], list[int]], context: Callable[[int], Context] | None = None
    ) -> np.ndarray:
        """Which texts ended with their last token.

        Args:
            tokens: (n,) integers, each text's last token.
            written: All tokens of text i, the last included; asked for few.
            context: What stands before text i; None for nothing.

        Returns:
            bool (n,).
        """
        ended = self.tokens[tokens]
        if self._strings:
            near = np.flatnonzero(self._can_complete(tokens) & ~ended)
            contexts = [NO_CONTEXT if context is None else context(i) for i in near.tolist()]
            ended[near] = self._hold_one(contexts, [written(i) for i in near.tolist()])
        return ended

    def cut(self, ids: Sequence[int], begun: Sequence[int] = (), context: Context = NO_CONTEXT) -> list[int] | None:
        """What of `ids` is written until the text ends, its end included; None where it does not end.

        Args:
            ids: Token ids.
            begun: What of the text is written already.
            context: What stands before the text.
        """
        array = np.asarray(ids, np.int64)
        near = self.tokens[array] | self._can_complete(array)
        for length in (np.flatnonzero(near) + 1).tolist():
            if self.tokens[array[length - 1]] or self._hold_one([context], [[*begun, *ids[:length]]])[0]:
                return list(ids[:length])
        return None

    def texts(self, token_ids: Sequence[Sequence[int]], contexts: Sequence[Context] | None = None) -> list[str]:
        """The texts of token ids that go no further than their ends, without these; None: nothing stands before."""
        contexts = [NO_CONTEXT] * len(token_ids) if contexts is None else contexts
        kept = [list(ids[:-1]) if len(ids) and self.tokens[ids[-1]] else list(ids) for ids in token_ids]
        return [
            text[: min(self._starts(text), default=None)]
            for text in decode_continuations(self._tokenizer, contexts, kept)
        ]

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

    def _hold_one(self, contexts: Sequence[Context], token_ids: Sequence[Sequence[int]]) -> list[bool]:
        """Whether the text of token ids holds a string, for each of n."""
        texts = decode_continuations(self._tokenizer, contexts, token_ids)
        return [any(string in text for string in self._strings) for text in texts]

    def _starts(self, text: str) -> list[int]:
        return [text.index(string) for string in self._strings if string in text]
