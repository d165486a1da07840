"""Language models of transformers as policies."""

from __future__ import annotations

import copy
import json
import math
import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.policy.interface import Continuation, Evaluation, Policy
from agents.policy.log_probs import log_prob_and_entropy
from agents.policy.lora import add_lora, has_adapters, merged, train_adapters, unwrapped
from textgym import seq2seq
from textgym.decoding import Decoding
from textgym.generation import sampler_class
from textgym.hub import file_beside
from textgym.model_checks import check_served
from textgym.models import fuse_activations, load_model
from textgym.packing import can_pack, compile_layers, head, read
from textgym.positions import check_positions, fix_positions, short_context, warn_of_short_factors
from textgym.precision import at_least_float32, autocast, check_autocast, fast_dtype
from textgym.sampling import TokenSampler
from textgym.storage import new_folder, readable, restore
from textgym.tokenization import (
    check_embedded,
    check_vocabulary,
    end_ids,
    eos_first,
    pretrained_tokenizer,
    unused_ids,
    vocabulary_size,
)

HEADS_FILE = "heads.safetensors"
POLICY_FILE = "policy.json"
# The head of each of the two value functions.
VALUE_HEADS: dict[Continuation, str] = {"policy": "value", "guide": "guide_value"}
# Entries of a block of logits (64 MiB in float32).
_LOGITS_AT_ONCE = 2**24


class LanguageModelPolicy(Policy):
    """A language model of transformers with linear heads on its last hidden state.

    Two heads are value functions, of the states that the policy continues and of those that the guide completes,
    initially zero. A third, optional one is the gate of the hand-off: with ``z = w h + b`` the policy hands off with
    probability sigmoid(z), and otherwise chooses a token as the language model does, so that
    ``log pi(token) = log p(token) + log sigmoid(-z)``.

    Dropout is always off: the module stays in evaluation mode, because the ratio of probabilities under two dropout
    masks would be noise.

    A mixture of experts is trained as any other model: the auxiliary loss that balances its routers, which
    ``config.output_router_logits`` adds, is not used. The positions of a LongRoPE model are fixed for `context_length`
    (see `textgym.positions`), in the model itself. The tokenizer can have more tokens than the model has embeddings
    (Gemma 3's has one for images): these are never chosen, and a text that holds one is refused.

    With adapters (LoRA) only these and the heads are trained, and copies (the reference policy, a separate critic, a
    guide made of the model) share the frozen weights.

    Args:
        model: The language model, of transformers or in a `peft.PeftModel`.
        tokenizer: Its tokenizer.
        decoding: How `predict`, `generate` and `sampler` choose tokens unless told otherwise. The hand-off is drawn
            before the token and is never truncated.
        handoff_prob: Initial probability, in every state, of the action that asks the guide to complete the text; None
            for a policy without this action.
        autocast: Type of matrix products, whatever the type of the weights; "auto" is bfloat16 where the device is
            fast in it, None the type of the weights. Heads, log-probabilities, losses and optimiser steps stay in
            float32.
        compile: Whether to compile the layers of a causal model with `torch.compile`. Compiling takes about a minute,
            and some seconds in the next process.

    Raises:
        ValueError: A model of the other kind, or one that is not supported (`textgym.model_checks.check_served`);
            the tokenizer has no EOS token, or does not belong to the model; a `handoff_prob` outside of (0, 1); a
            wrong `autocast`.
    """

    encodes_prompts: ClassVar[bool]
    # How the model under adapters is loaded.
    quantization: str | None = None
    gguf_file: str | None = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding | None = None,
        handoff_prob: float | None = None,
        autocast: torch.dtype | Literal["auto"] | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        model = unwrapped(model)
        if model.config.is_encoder_decoder != self.encodes_prompts:
            other = CausalLMPolicy if self.encodes_prompts else Seq2SeqPolicy
            raise ValueError(
                f"model is a {type(model).__name__}, which {type(self).__name__} cannot use: make it a {other.__name__}"
            )
        rows, width = model.get_output_embeddings().weight.shape
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an eos_token: it is the action that ends a text")
        check_vocabulary(tokenizer, rows)
        if handoff_prob is not None and not 0 < handoff_prob < 1:
            raise ValueError(f"handoff_prob must be None or in (0, 1), got {handoff_prob!r}")
        check_autocast("autocast", autocast)
        fuse_activations(model)
        self.model, self.autocast, self.compiled = model, autocast, compile
        self.can_hand_off = handoff_prob is not None
        biases = dict.fromkeys(VALUE_HEADS.values(), 0.0)
        if handoff_prob is not None:
            biases["handoff"] = math.log(handoff_prob / (1 - handoff_prob))
        self.heads = nn.ModuleDict()
        for name, bias in biases.items():
            head = nn.Linear(width, 1, device=model.device, dtype=torch.promote_types(model.dtype, torch.float32))
            nn.init.zeros_(head.weight)
            nn.init.constant_(head.bias, bias)
            self.heads[name] = head
        self.tokenizer = tokenizer
        self.decoding = decoding or Decoding()
        self.eval()
        check_served(model)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode: dropout is off in training too."""
        return super().train(False)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
        decoding: Decoding | None = None,
        device: str | torch.device = "auto",
        dtype: torch.dtype | Literal["auto"] | None = None,
        handoff_prob: float | None = None,
        compile: bool | None = None,
        lora: Mapping[str, Any] | None = None,
        quantization: Literal["4bit"] | None = None,
        gguf_file: str | None = None,
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a `CausalLMPolicy` or a `Seq2SeqPolicy`, whichever the model is, with what was saved of the policy.

        Args:
            path: Hub id or folder with safetensors weights, or with PEFT adapters, whose training continues.
            tokenizer: The tokenizer, or its hub id or folder; None: the one saved with the model.
            decoding: None: the one saved with the policy, else plain sampling.
            device: "auto" is CUDA where there is one, else CPU.
            dtype: Type of the model's weights, in which it also computes; the heads have it too, or float32 where it is
                a half precision. "auto" is float32 for the weights, with ``autocast="auto"``. None: weights and
                autocast as saved with the policy, else float32.
            handoff_prob: Adds the hand-off, with this initial probability, to a policy that was saved without it.
            compile: Whether to compile the model's layers; None: as saved with the policy, else not.
            lora: Adds adapters to the model and freezes the rest; arguments of `peft.LoraConfig`, such as
                ``{"r": 8, "lora_alpha": 64}``.
            quantization: "4bit" keeps the model's linear layers in 4 bits, by bitsandbytes; such a model is trained by
                adapters only. None: as saved with the policy, else not.
            gguf_file: A GGUF file at `path` to load the model from; the policy is saved like any other.
            trust_remote_code: Whether Python code of the model's folder or repository may run.

        Raises:
            ImportError: What adapters, quantised weights or GGUF files need is not installed.
            ValueError: There is no model with safetensors weights or no tokenizer at `path`, or they do not fit; a
                quantised model without adapters; `lora` for a model that has adapters.
        """
        restore(path)
        settings: dict[str, Any] = {}
        file = file_beside(path, POLICY_FILE)
        if file is not None:
            with readable(file):
                settings = json.loads(Path(file).read_text(encoding="utf-8"))
                saved_decoding = Decoding(**settings["decoding"])
        saved_dtype = getattr(torch, settings.get("dtype", "float32"))
        weights = torch.float32 if dtype == "auto" else dtype or saved_dtype
        quantization = settings.get("quantization") if quantization is None else quantization
        packed = settings.get("gguf_file") if gguf_file is None else gguf_file
        model = load_model(
            path,
            device=device,
            dtype=weights,
            quantization=quantization,
            gguf_file=packed,
            trust_remote_code=trust_remote_code,
        )
        if lora is not None:
            add_lora(model, path, lora)
        elif has_adapters(model):
            train_adapters(model, file_beside(path, "adapter_model.safetensors"))
        elif quantization is not None:
            raise ValueError(f"quantization={quantization!r} needs lora: quantised weights cannot be trained")
        if tokenizer is None:
            tokenizer = pretrained_tokenizer(path, gguf_file, trust_remote_code=trust_remote_code)
        elif not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = pretrained_tokenizer(tokenizer, trust_remote_code=trust_remote_code)
        if decoding is None and settings:
            decoding = saved_decoding
        file = file_beside(path, HEADS_FILE)
        saved: dict[str, Tensor] = {}
        if file is not None:
            with readable(file):
                saved = load_file(file, device=str(model.device))
        if "handoff.weight" in saved and handoff_prob is None:
            handoff_prob = 0.5  # any value: the head is loaded below
        autocast: Any = settings.get("autocast") if dtype is None else "auto" if dtype == "auto" else None
        autocast = getattr(torch, autocast) if autocast not in (None, "auto") else autocast
        compile = settings.get("compile", False) if compile is None else compile
        kind: Any = cls
        if cls is LanguageModelPolicy:
            kind = Seq2SeqPolicy if model.config.is_encoder_decoder else CausalLMPolicy
        policy = kind(model, tokenizer, decoding, handoff_prob, autocast, compile)
        policy.prompt_columns, policy.context_length = settings.get("prompt_columns"), settings.get("context_length")
        policy.add_end_tokens(settings.get("end_token_ids", ()))
        policy.quantization, policy.gguf_file = quantization, packed if has_adapters(model) else None
        if saved:
            with readable(str(file)):
                policy.heads.load_state_dict({**policy.heads.state_dict(), **saved})
        return policy

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a folder that transformers' `AutoModel...` and `AutoTokenizer` open too, replacing what is there.

        Of a model with adapters only these are written, in PEFT's format, with the name of their base model.

        Raises:
            ValueError: The adapters are on a model that was made in memory, which cannot be loaded again.
        """
        if has_adapters(self.model) and not self.model.name_or_path:
            raise ValueError(
                "policy cannot be saved: its adapters are on a model that was loaded from nowhere; save that model "
                "first, and load it from there with lora={...}"
            )
        with new_folder(folder) as new:
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            save_file(self.heads.state_dict(), new / HEADS_FILE)
            settings = {
                "decoding": asdict(self.decoding),
                "dtype": str(self.model.dtype).removeprefix("torch."),
                "autocast": None if self.autocast is None else str(self.autocast).removeprefix("torch."),
                "compile": self.compiled,
                "prompt_columns": self.prompt_columns,
                "context_length": self.context_length,
                "end_token_ids": self.end_token_ids,
                "quantization": self.quantization,
                "gguf_file": self.gguf_file,
            }
            (new / POLICY_FILE).write_text(json.dumps(settings, indent=2) + "\n")

    def sampler(
        self,
        observation: Mapping[str, Any],
        *,
        seeds: np.ndarray,
        max_new_tokens: int | np.ndarray,
        prefix_lengths: Any = None,
        decoding: Decoding | None = None,
        values: bool = True,
        entropies: bool = False,
    ) -> TokenSampler:
        """Return a sampler that writes a batch of texts (see `Actor.sampler`).

        Raises:
            ValueError: A text could be longer than the model has positions; a decoding with beams, with values,
                entropies or a policy that can hand off.
        """
        new = int(np.max(max_new_tokens - np.asarray(0 if prefix_lengths is None else prefix_lengths), initial=0))
        self._prepare(observation["input_ids"], observation["attention_mask"], new)
        decoding = decoding or self.decoding
        return sampler_class(decoding)(
            self.model,
            observation["input_ids"],
            observation["attention_mask"],
            decoding=decoding,
            seeds=seeds,
            eos_token_id=self.end_token_ids,
            prefix_lengths=prefix_lengths,
            max_new_tokens=max_new_tokens,
            value_head=self.heads["value"] if values else None,
            handoff_head=self.heads["handoff"] if self.can_hand_off else None,
            vocab_size=vocabulary_size(self.tokenizer),
            unused_ids=unused_ids(self.tokenizer),
            dtype=self._dtype,
            entropies=entropies,
        )

    def evaluate_actions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        columns: Tensor,
        handoffs: Tensor | None = None,
        states_only: Tensor | None = None,
        values_of: Continuation | None = "policy",
    ) -> Evaluation:
        """Evaluate decisions in one pass that computes logits only where needed (see `Policy.evaluate_actions`).

        Raises:
            ValueError: A column without a valid token (unless it is a hand-off's), or with none before it; a hand-off
                of a policy that has none; a text longer than the model has positions.
        """
        rows, entries = (columns >= 0).nonzero(as_tuple=True)
        chosen = columns[rows, entries]
        handed = None if handoffs is None else handoffs[rows, entries]
        if handed is not None and not self.can_hand_off and handed.any():
            raise ValueError("handoffs holds a hand-off, which this policy does not have: make it with handoff_prob")
        at = chosen.clamp(max=attention_mask.shape[1] - 1)
        valid = attention_mask[rows, at] != 0
        if not (valid if handed is None else valid | handed).all():
            raise ValueError("columns must hold -1 or columns of valid tokens that have a valid token before them")
        hidden, tokens = self._read(input_ids, attention_mask, rows, chosen), input_ids[rows, at]
        decided = None if states_only is None else (~states_only[rows, entries]).nonzero().squeeze(1)
        if decided is None or len(decided) == len(rows):
            log_probs, entropy = self._evaluate_tokens(hidden, tokens)
        else:
            log_probs, entropy = (
                part.new_zeros(len(rows)).index_put((decided,), part)
                for part in self._evaluate_tokens(hidden.index_select(0, decided), tokens[decided])
            )
        hidden = at_least_float32(hidden)
        if self.can_hand_off:
            gate = self.heads["handoff"](hidden).squeeze(-1)
            hand_off, go_on = logsigmoid(gate), logsigmoid(-gate)
            log_probs = log_probs + go_on
            if handed is not None:
                log_probs = torch.where(handed, hand_off, log_probs)
            # H = -q log q - (1 - q) log (1 - q) + (1 - q) H(tokens), with q the probability of the hand-off
            entropy = go_on.exp() * (entropy - go_on) - hand_off.exp() * hand_off
            if states_only is not None:
                log_probs, entropy = (part.masked_fill(states_only[rows, entries], 0) for part in (log_probs, entropy))
        values = hidden.new_zeros(len(rows)) if values_of is None else self._values(hidden, values_of)
        return Evaluation(*(_spread(part, columns, rows, entries) for part in (log_probs, entropy, values)))

    def values(self, input_ids: Tensor, attention_mask: Tensor, columns: Tensor, of: Continuation = "policy") -> Tensor:
        """Values of states in one pass without logits (see `Policy.values`).

        Raises:
            ValueError: A column with no valid token before it; a text longer than the model has positions.
        """
        rows, entries = (columns >= 0).nonzero(as_tuple=True)
        hidden = at_least_float32(self._read(input_ids, attention_mask, rows, columns[rows, entries]))
        return _spread(self._values(hidden, of), columns, rows, entries)

    def _values(self, hidden: Tensor, of: Continuation) -> Tensor:
        """Values (n,) of hidden states (n, d)."""
        return self.heads[VALUE_HEADS[of]](hidden).squeeze(-1)

    @abstractmethod
    def _read(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The hidden states (n, d) after all valid tokens of `rows` (n,) in the columns before `columns` (n,)."""

    def _evaluate_tokens(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens (n,) and entropies, given hidden states (n, d), in blocks."""

        def evaluate(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            with autocast(self.device, self._dtype):
                logits = head(self.model, hidden)
            return log_prob_and_entropy(at_least_float32(logits), tokens)

        part = max(1, _LOGITS_AT_ONCE // self.model.get_output_embeddings().weight.shape[0])
        if len(tokens) <= part:
            return evaluate(hidden, tokens)
        # Blocks are recomputed in the backward pass, so that memory does not grow with tokens times vocabulary.
        parts = [
            checkpoint(evaluate, *pair, use_reentrant=False)
            for pair in zip(hidden.split(part), tokens.split(part), strict=True)
        ]
        log_probs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_probs, entropy

    @torch.no_grad()
    def shift_values(self, of: Continuation, shift: float) -> None:
        """Move the bias of a value head (see `Policy.shift_values`)."""
        self.heads[VALUE_HEADS[of]].get_parameter("bias").add_(shift)

    def copy_values(self, to: Continuation) -> None:
        """Copy the other value head (see `Policy.copy_values`)."""
        other = VALUE_HEADS["guide" if to == "policy" else "policy"]
        self.heads[VALUE_HEADS[to]].load_state_dict(self.heads[other].state_dict())

    def merged(self) -> Self:
        """The same policy with its adapters added to the weights of a copy of the model, for use without PEFT."""
        twin = self._twin(merged(self.model))
        twin.heads, twin.can_hand_off = copy.deepcopy(self.heads), self.can_hand_off
        return twin

    def without_handoff(self) -> Self:
        """The same policy without the hand-off, which shares its weights."""
        if not self.can_hand_off:
            return self
        alone = self._twin(self.model)
        for name in alone.heads:
            alone.heads[name] = self.heads[name]
        return alone

    def _twin(self, model: PreTrainedModel) -> Self:
        """The same policy with another model, new heads and no hand-off."""
        twin = type(self)(model, self.tokenizer, self.decoding, None, self.autocast, self.compiled)
        twin.prompt_columns, twin.context_length = self.prompt_columns, self.context_length
        twin.add_end_tokens(self.end_token_ids)
        return twin

    @property
    def _dtype(self) -> torch.dtype | None:
        return fast_dtype(self.device) if self.autocast == "auto" else self.autocast

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """EOS, those of the model's generation config (see `textgym.tokenization.end_ids`), and those added."""
        config = self.model.generation_config
        of_model = end_ids(self.tokenizer, None if config is None else config.eos_token_id)
        return eos_first(self.tokenizer, [*of_model, *self._more_end_ids])

    def _prepare(self, input_ids: Any, attention_mask: Any, new: int = 0) -> None:
        """Prepare the model for reading texts, (B, S) each, and writing up to `new` more tokens.

        Raises:
            ValueError: A token without an embedding.
        """
        check_embedded(self.tokenizer, self.model, input_ids, attention_mask)
        if short_context(self.model) is not None:
            fix_positions(self.model, self.context_length)
            warn_of_short_factors(self.model, int((attention_mask != 0).sum(1).max()) + new, self.context_length)
        # At every use, since a copy of a compiled model is not compiled.
        if self.compiled and can_pack(self.model):
            compile_layers(self.model)


class CausalLMPolicy(LanguageModelPolicy):
    """A causal language model of transformers as a policy; see `LanguageModelPolicy`.

    Texts are read as packed tokens (`textgym.packing`): padding costs nothing, and tokens with which several rows of a
    batch begin are computed once.
    """

    encodes_prompts = False

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse texts of more tokens than the model has positions (see `Actor.check_length`)."""
        check_positions(self.model, prompt_tokens + new_tokens)

    def _read(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        valid = attention_mask.bool()
        before = torch.nn.functional.pad(valid.cumsum(1), (1, 0))[rows, columns]
        if not (before > 0).all():
            raise ValueError("columns must hold -1 or columns of valid tokens that have a valid token before them")
        self._prepare(input_ids, valid)
        check_positions(self.model, int(valid.sum(1).max()))
        with autocast(self.device, self._dtype):
            return read(self.model, left_packed(input_ids, valid), rows, before)


class Seq2SeqPolicy(LanguageModelPolicy):
    """A sequence-to-sequence language model of transformers as a policy; see `LanguageModelPolicy`.

    The encoder reads each distinct prompt of a batch once; the decoder writes the new tokens, which begin after
    `prompt_columns` columns (in `sampler`, after the tokens that are no part of a prefix).
    """

    encodes_prompts = True

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse prompts or texts of more tokens than the model has positions (see `Actor.check_length`)."""
        check_positions(self.model, max(prompt_tokens, len(seq2seq.decoder_start(self.model)) + new_tokens))

    def _read(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if self.prompt_columns is None:
            raise ValueError(
                "prompt_columns must be set before texts are evaluated, because the encoder reads the prompt alone: "
                "policy.prompt_columns = env.max_prompt_tokens (algorithms do that)"
            )
        self._prepare(input_ids, attention_mask)
        # Padding is embedded too, and its token may have no embedding.
        input_ids = input_ids.masked_fill(attention_mask == 0, 0)
        prompt, new = (
            (input_ids[:, part], attention_mask[:, part].bool())
            for part in (slice(self.prompt_columns), slice(self.prompt_columns, None))
        )
        lengths = prompt[1].sum(1)
        if not (lengths[rows] > 0).all() or not (columns >= self.prompt_columns).all():
            raise ValueError(
                f"columns must hold -1 or columns from {self.prompt_columns} (prompt_columns) on, in rows with a prompt"
            )
        before = torch.nn.functional.pad(new[1].cumsum(1), (1, 0))[rows, columns - self.prompt_columns]
        longest = len(seq2seq.decoder_start(self.model)) + new[1].sum(1).max()
        check_positions(self.model, int(max(lengths.max(), longest)))
        with autocast(self.device, self._dtype):
            return seq2seq.read(self.model, left_packed(*prompt), lengths.clamp(min=1), left_packed(*new), rows, before)


def left_packed(input_ids: Tensor, valid: Tensor) -> Tensor:
    """Move every row's valid tokens, in order, to the left end; (n, S) to (n, S)."""
    return input_ids.gather(1, (~valid).to(torch.int8).argsort(dim=1, stable=True))


def _spread(values: Tensor, columns: Tensor, rows: Tensor, entries: Tensor) -> Tensor:
    """Put the values of the entries of `columns` that are not -1 in their places, zero elsewhere."""
    return values.new_zeros(columns.shape).index_put((rows, entries), values)
