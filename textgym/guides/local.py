"""A language model of transformers as a guide, in this process."""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import numpy as np

from textgym.checks import check_int, check_texts
from textgym.decoding import Decoding
from textgym.guides.base import Author, Completion, GuideRequest
from textgym.tokenization import (
    Context,
    StopCriteria,
    as_chat,
    check_embedded,
    check_vocabulary,
    encode,
    encode_continuations,
    end_ids,
    has_bos_twice,
    pretrained_tokenizer,
    unused_ids,
    vocabulary_size,
)

# torch is imported for the first completion, so that `gym.make` with a guide is quick.
if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Most tokens of the guide per token of the environment.
_MOST_TOKENS_FOR_ONE = 16
# Loaded models by path and settings, while a guide uses them. Their weights never change, so guides share them.
_LOADED: WeakValueDictionary[tuple, Any] = WeakValueDictionary()


class LocalGuide:
    """Continues texts with a language model whose weights never change.

    With the vocabulary of the environment, the guide reads the token ids that the policy reads and returns token ids,
    and it can score them.
    With another vocabulary, or with a template of its own, it reads prompt and prefix as text, without the template of
    the environment, and returns text.

    Args:
        model: Hub id or folder of a language model, causal or sequence-to-sequence, with safetensors weights, loaded
            for the first completion; or a model, which the guide copies (frozen weights, such as the base of adapters,
            are shared).
        tokenizer: The guide's tokenizer, or its hub id or folder. None: the one of the hub id or folder of the model;
            the environment's for a model given as an object.
        decoding: How tokens are chosen. None is the guide decoding that Chang et al. 2023 publish for IMDB, top-p 0.92
            of the top 50 tokens.
        device: "auto" is CUDA where there is one, else CPU.
        batch_size: Most texts in one pass.
        dtype: Data type of matrix products; "auto" is bfloat16 where the device is fast in it, None the type of the
            weights.
        template: The text that the model reads, with ``{prompt}`` for the prompt: an instruction, or examples before
            it.
        chat: Whether that is a user's message to a chat model, in the chat template of its tokenizer. The completion is
            then the answer, of which the prefix is the start.
        stop: Strings before which a text ends. It also ends at EOS, at the tokens in the model's generation config and,
            with `chat`, at the token that closes an answer. The name of a special token means that token.
        quantization: As for `textgym.models.load_model`.
        gguf_file: As for `textgym.models.load_model`.

    Raises:
        ValueError: An argument is not allowed, or, when they are loaded, model or tokenizer cannot be found or do not
            belong together.
    """

    author = Author.GUIDE
    can_hand_off = True

    def __init__(
        self,
        model: str | os.PathLike | PreTrainedModel,
        *,
        tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
        decoding: Decoding | None = None,
        device: str | torch.device = "auto",
        batch_size: int = 256,
        dtype: torch.dtype | Literal["auto"] | None = None,
        template: str = "{prompt}",
        chat: bool = False,
        stop: Sequence[str] = (),
        quantization: Literal["4bit"] | None = None,
        gguf_file: str | None = None,
    ) -> None:
        if "{prompt}" not in template:
            raise ValueError(f"template must hold {{prompt}}, got {template!r}")
        if dtype is not None:
            from textgym.precision import check_autocast

            check_autocast("dtype", dtype)
        self.path = str(model) if isinstance(model, str | os.PathLike) else None
        self.tokenizer, self.device = tokenizer, device
        self.decoding = decoding or Decoding(top_p=0.92, top_k=50)
        self.batch_size = check_int("batch_size", batch_size)
        self.dtype, self.quantization, self.gguf_file = dtype, quantization, gguf_file
        self.template, self.chat, self.stop = template, chat, check_texts("stop", stop)
        self._model: Any = None if self.path is not None else _frozen_copy(model, device)
        self._own_tokenizer: Any = None
        self._compared: tuple[Any, bool] = (None, False)
        self._ends: tuple[Any, Any] = (None, None)
        self._fingerprint: str | None = None

    def complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Continue every request (see `Guide.complete`), in ids where the vocabularies are the same, else in text.

        Raises:
            ValueError: The model or its tokenizer cannot be loaded, or a text is too long for the model.
        """
        if not requests:
            return []
        own = self._load_for(tokenizer)
        if not self._asks and self._same_vocabulary(own, tokenizer):
            return self._complete_ids(requests, own, tokenizer)
        return self._complete_texts(requests, own, tokenizer)

    def score(
        self,
        requests: Sequence[GuideRequest],
        continuations: Sequence[Sequence[int]],
        tokenizer: PreTrainedTokenizerBase,
    ) -> list[np.ndarray]:
        """Log-probabilities of continuations in one pass over each batch of texts (see `ScoringGuide.score`).

        Raises:
            ValueError: The guide has another vocabulary, or a template, chat or stop of its own; the model or its
                tokenizer cannot be loaded, or a text is too long for the model.
        """
        from textgym.scoring import log_probs

        own = self._load_for(tokenizer)
        if self._asks or not self._same_vocabulary(own, tokenizer):
            why = "has a template, chat or stop of its own" if self._asks else "has another vocabulary"
            raise ValueError(
                f"guide must read the tokens that the policy reads to score them, and this one {why}: it needs a model "
                "with the environment's tokenizer, and templates are the environment's"
            )
        for request, ids in zip(requests, continuations, strict=True):
            whole = np.array([*request.prompt_ids, *request.prefix_ids, *ids])
            check_embedded(own, self._model, whole, np.ones_like(whole))
        return log_probs(
            self._model,
            [request.prompt_ids for request in requests],
            [request.prefix_ids for request in requests],
            continuations,
            batch_size=self.batch_size,
            dtype=self._products,
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change with the weights, decoding and template; the first access loads the model."""
        self._load()
        if self._fingerprint is None:
            more = [*([] if self.dtype is None else [self.dtype]), *([self._asks] if self._asks else [])]
            self._fingerprint = fingerprint_of(self._model, self.decoding, *more)
        return self._fingerprint

    @property
    def _asks(self) -> tuple[Any, ...]:
        """The arguments that make the guide read and write text; empty where it can read and write token ids."""
        plain = self.template == "{prompt}" and not self.chat and not self.stop
        return () if plain else (self.template, self.chat, self.stop)

    def _complete_ids(
        self, requests: Sequence[GuideRequest], own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
    ) -> list[Completion]:
        contexts = [(request.prompt_ids, request.prefix_ids) for request in requests]
        ends = self._ends_of(own).tokens
        completions = []
        for ids in self._write(contexts, requests, [request.max_new_tokens for request in requests], own):
            finished = bool(ids) and bool(ends[ids[-1]])
            if finished:  # EOS becomes the environment's, which appends its own in the place of another end token
                ids = [*ids[:-1], *([tokenizer.eos_token_id] if ids[-1] == own.eos_token_id else [])]
            completions.append(Completion(token_ids=ids, finished=finished))
        return completions

    def _complete_texts(
        self, requests: Sequence[GuideRequest], own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase
    ) -> list[Completion]:
        from textgym.seq2seq import decoder_start

        ends = self._ends_of(own)
        positions = getattr(self._model.config.get_text_config(decoder=True), "max_position_embeddings", None) or np.inf
        asked = [self.template.format(prompt=request.prompt) for request in requests]
        if self._model.config.is_encoder_decoder:
            prompts = own(asked, verbose=False)["input_ids"]
            begun = encode_continuations(own, asked, [request.prefix for request in requests])
            contexts = list(zip(prompts, begun, strict=True))
            positions -= len(decoder_start(self._model))
        else:
            # Prompt and prefix are read as one text.
            begun = [
                _encode_answer(own, text, request.prefix) if self.chat else _encode_context(own, text + request.prefix)
                for text, request in zip(asked, requests, strict=True)
            ]
            contexts = [(ids, []) for ids in begun]
        before = [
            Context([*prompt, *written], text + request.prefix)
            for (prompt, written), text, request in zip(contexts, asked, requests, strict=True)
        ]
        # Bounded, because a model without a maximum of positions can write padding or other non-text for ever.
        room = [
            min(positions - len(ids), _MOST_TOKENS_FOR_ONE * request.max_new_tokens)
            for ids, request in zip(begun, requests, strict=True)
        ]
        # A token of the environment can be several of the guide. A text that is too short is generated again with twice
        # as many tokens; it begins with the same ones, since they depend only on the seed of the request.
        limits = [int(min(max(1, request.max_new_tokens), left)) for request, left in zip(requests, room, strict=True)]
        completions: list[Completion] = [Completion(text="", finished=False)] * len(requests)
        waiting = [index for index, request in enumerate(requests) if request.max_new_tokens > 0]
        while waiting:
            written = self._write(
                [contexts[i] for i in waiting],
                [requests[i] for i in waiting],
                [limits[i] for i in waiting],
                own,
            )
            again = []
            for i, ids in zip(waiting, written, strict=True):
                written_to_end = ends.cut(ids, context=before[i])
                finished = written_to_end is not None
                (text,) = ends.texts([ids if written_to_end is None else written_to_end], [before[i]])
                completions[i] = Completion(text=text, finished=finished)
                length = len(encode(tokenizer, [text])[0])
                if not finished and length < requests[i].max_new_tokens and limits[i] < room[i]:
                    again.append(i)
                    limits[i] = int(min(2 * limits[i], room[i]))
            waiting = again
        return completions

    def _write(
        self,
        contexts: Sequence[tuple[Sequence[int], Sequence[int]]],
        requests: Sequence[GuideRequest],
        limits: Sequence[int],
        own: PreTrainedTokenizerBase,
    ) -> list[list[int]]:
        """Generate at most `limits` tokens after each context, a pair of prompt and prefix in the guide's tokens."""
        from textgym.generation import generate

        whole = [np.array([*prompt, *prefix], np.int64) for prompt, prefix in contexts]
        mask = np.arange(max(map(len, whole))) < np.array([len(ids) for ids in whole])[:, None]
        input_ids = np.zeros(mask.shape, np.int64)
        input_ids[mask] = np.concatenate(whole)
        check_embedded(own, self._model, input_ids, mask)
        if self._model.config.is_encoder_decoder:
            prefix_lengths = np.array([len(prefix) for _, prefix in contexts])
        else:  # the length in tokens of the environment, since the prefix is part of the prompt here
            prefix_lengths = np.array([len(request.prefix_ids) for request in requests])
        return generate(
            self._model,
            input_ids,
            mask,
            decoding=self.decoding,
            seeds=np.array([request.seed & 0xFFFFFFFFFFFFFFFF for request in requests], np.uint64),
            eos_token_id=self._ends_of(own).token_ids,
            prefix_lengths=prefix_lengths,
            max_new_tokens=prefix_lengths + np.asarray(limits),
            batch_size=self.batch_size,
            vocab_size=vocabulary_size(own),
            unused_ids=unused_ids(own),
            dtype=self._products,
        )

    @property
    def _products(self) -> torch.dtype | None:
        """The data type of matrix products."""
        from textgym.precision import fast_dtype

        return fast_dtype(self._model.device) if self.dtype == "auto" else self.dtype

    def _ends_of(self, own: PreTrainedTokenizerBase) -> StopCriteria:
        """Where what the model writes ends, in tokens of its own."""
        if self._ends[0] is not own:
            config = self._model.generation_config
            ids = end_ids(own, None if config is None else config.eos_token_id)
            self._ends = own, StopCriteria(own, self.stop, ids, self.chat)
        return self._ends[1]

    def _load_for(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
        """Load what is not loaded, and return the guide's own tokenizer."""
        self._load()
        own = self._own_tokenizer or tokenizer
        try:
            check_vocabulary(own, self._model.get_input_embeddings().weight.shape[0])
        except ValueError as error:
            raise ValueError(
                f"guide: {error}; pass LocalGuide(model, tokenizer=...) the tokenizer that belongs to it"
            ) from error
        if self.chat and own.chat_template is None:
            raise ValueError("chat must be False for a tokenizer without a chat template")
        return own

    def _load(self) -> None:
        from textgym.model_checks import check_served
        from textgym.models import load_model, resolve_device

        if self._model is None and self.path is not None:
            how: dict[str, Any] = {"quantization": self.quantization, "gguf_file": self.gguf_file}
            key = (self.path, _modified(self.path), str(resolve_device(self.device)), *how.values())
            self._model = _LOADED.get(key)
            if self._model is None:
                model = load_model(self.path, device=self.device, **how).requires_grad_(False)
                check_served(model)
                self._model = _LOADED[key] = model
        if self._own_tokenizer is None:
            if self.tokenizer is None and self.path is not None:
                self._own_tokenizer = pretrained_tokenizer(self.path, self.gguf_file)
            else:
                own = self.tokenizer
                self._own_tokenizer = pretrained_tokenizer(own) if isinstance(own, str | os.PathLike) else own

    def _same_vocabulary(self, own: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> bool:
        if own is other:
            return True
        if self._compared[0] is not other:
            self._compared = (other, own.get_vocab() == other.get_vocab())
        return self._compared[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalGuide:
        """Share the model, whose weights never change."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        """Leave out everything that can be loaded again."""
        state = {**self.__dict__, "_own_tokenizer": None, "_compared": (None, False), "_ends": (None, None)}
        return state if self.path is None else {**state, "_model": None}


def fingerprint_of(model: PreTrainedModel, *more: Any) -> str:
    """Return 16 hex digits that change with the weights of `model` and the `repr` of `more`."""
    import torch

    digest = hashlib.sha256(repr(more).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        # As bytes, because numpy has no bfloat16.
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _frozen_copy(model: Any, device: str | torch.device) -> PreTrainedModel:
    from transformers import PreTrainedModel

    from textgym.model_checks import check_served
    from textgym.models import fuse_activations, resolve_device

    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        raise ValueError(
            "model must be a hub id, a path or a language model of transformers, "
            f"got {type(model).__name__}: {str(model)[:200]}"
        )
    shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
    moves = device != "auto" and resolve_device(device) != model.device
    frozen: Any = copy.deepcopy(model, {} if moves else shared)
    if moves:
        frozen.to(resolve_device(device))
    fuse_activations(frozen)
    check_served(frozen.eval(), None if moves else model)
    return frozen.requires_grad_(False)


def _modified(path: str) -> tuple[int, ...]:
    """Return the modification times of the weights in a folder, which change when another model is saved there."""
    files = [*Path(path).glob("*.safetensors"), *Path(path).glob("*.gguf")]
    return tuple(sorted(file.stat().st_mtime_ns for file in files))


def _encode_context(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Encode a text to be continued, with the special tokens that the model expects before it."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    if has_bos_twice(tokenizer, text, ids):
        ids = ids[1:]
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        ids = ids[:-1]
    return ids


def _encode_answer(tokenizer: PreTrainedTokenizerBase, text: str, prefix: str) -> list[int]:
    """Encode a user's message to a chat model and the beginning of the answer."""
    return encode(tokenizer, [as_chat(tokenizer, text) + prefix.lstrip()])[0]
