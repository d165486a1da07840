"""What an algorithm needs from whoever writes, and the language models of transformers as that."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agents.lora import add_lora, has_adapters, merged, train_adapters, unwrapped
from textgym import seq2seq
from textgym.decoding import (
    Decoding,
    Sampler,
    at_least_float32,
    load_model,
    sampler_class,
    write,
)
from textgym.hub import file_beside
from textgym.packing import (
    autocast,
    can_pack,
    check_autocast,
    check_served,
    compile_layers,
    fast_dtype,
    fuse_activations,
    head,
    read,
)
from textgym.positions import check_positions, fix_positions, short_context, warn_of_short_factors
from textgym.tokenization import (
    Context,
    check_embedded,
    check_vocabulary,
    decode_continuations,
    encode_prompts,
    end_ids,
    pretrained_tokenizer,
    unused_ids,
    vocabulary_size,
)

HEADS_FILE = "heads.safetensors"
POLICY_FILE = "policy.json"
# Entries of a block of logits (64 MiB in float32).
_LOGITS_AT_ONCE = 2**24


class Evaluation(NamedTuple):
    """How a policy judges decisions that are already taken; every entry is zero where there is none.

    Attributes:
        log_probs: (B, A) float32, log-probabilities of the decisions under the untruncated softmax at temperature 1.
        entropy: (B, A) float32, entropies in nats of the distributions they were drawn from.
        values: (B, A) float32, values of the states before the decisions if the policy goes on.
        guide_values: (B, A) float32, values of these states if the guide goes on; a critic of its own.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor
    guide_values: Tensor


class Policy(nn.Module, ABC):
    """Base class of everything that `agents` can train: a network that writes texts and judges them.

    A network of your own implements the abstract methods below; its trainable parameters are those of the module. It
    is a policy of any architecture as long as `sampler` and `evaluate` speak of the same distribution: the
    log-probabilities that sampling records must be those `evaluate` returns for the same decisions. Dropout must be off
    in both.

    Attributes:
        tokenizer: The tokenizer of its tokens; environments are made with it.
        decoding: How `predict`, `generate` and `sampler` choose tokens unless told otherwise.
        can_hand_off: Whether it has an action beyond the tokens, the environment's ``vocab_size``, by which it asks the
            guide to finish. Environments made with ``handoff=True`` need such a policy, others one without.
        prompt_columns: P, how many columns of an observation are the prompt's, for policies that read prompts apart
            from what follows them; None for unknown. Algorithms set it to what their environment has.
        context_length: P + T, most tokens of a text, for policies whose positions depend on it (see
            `textgym.positions`); None for unknown. Algorithms set it to what their environment has.
    """

    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    can_hand_off: bool = False
    prompt_columns: int | None = None
    context_length: int | None = None
    _more_end_ids: tuple[int, ...] = ()

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, EOS first."""
        return tuple(dict.fromkeys([self.tokenizer.eos_token_id, *self._more_end_ids]))

    def add_end_tokens(self, token_ids: Sequence[int]) -> None:
        """Let further tokens end a text, as algorithms do with those that end an episode of their environment."""
        self._more_end_ids = tuple(dict.fromkeys([*self._more_end_ids, *token_ids]))

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def __init__(self) -> None:
        super().__init__()
        self.set_seed(0)

    def set_seed(self, seed: int) -> None:
        """Seed the draws of `predict`."""
        self._generator = np.random.default_rng(seed)

    def copy(self) -> Self:
        """A policy of its own that begins equal to this one, and shares the weights that are frozen."""
        return copy.deepcopy(self, {id(weight): weight for weight in self.parameters() if not weight.requires_grad})

    def predict(
        self,
        observation: Mapping[str, np.ndarray],
        state: np.ndarray | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Choose the next action for observations, as in Stable-Baselines3; nothing is cached between calls.

        Args:
            observation: "input_ids" and "attention_mask", each (P+T,) or batched (N, P+T); valid tokens of a row can
                have padding on both sides. Rows without any token (idle rows) get EOS.
            state: What the last call returned as state, or None. It counts the tokens this policy has chosen in each
                row's episode, for `decoding.min_new_tokens`, where `prompt_columns` does not say what is new.
            episode_start: (N,) bool, rows whose episode has just begun.
            deterministic: Take the most probable action.

        Returns:
            Actions, int64 () or (N,), and the state for the next call.

        Raises:
            ValueError: `decoding` searches with beams, and `deterministic` is False.
        """
        if self.decoding.num_beams > 1 and not deterministic:
            raise ValueError("decoding must have num_beams=1 to predict single tokens, or pass deterministic=True")
        ids = np.asarray(observation["input_ids"])
        batched = {name: np.atleast_2d(np.asarray(array)) for name, array in observation.items()}
        written = np.zeros(len(batched["input_ids"]), np.int64) if state is None else np.asarray(state, np.int64)
        if episode_start is not None:
            written = np.where(episode_start, 0, written)
        if self.prompt_columns is not None:
            written = (batched["attention_mask"][:, self.prompt_columns :] != 0).sum(1)
        actions = np.full(len(written), self.tokenizer.eos_token_id, np.int64)
        greedy = Decoding(greedy=True, min_new_tokens=self.decoding.min_new_tokens)
        sampler = self.sampler(
            batched,
            seeds=self._generator.integers(2**63, size=len(written)),
            prefix_lengths=written,
            max_new_tokens=written + 1,
            decoding=greedy if deterministic else self.decoding,
            values=False,
        )
        if len(sampler.rows):
            actions[sampler.rows] = sampler.sample().tokens.cpu().numpy()
        return actions.reshape(ids.shape[:-1]), written + 1

    @abstractmethod
    def sampler(
        self,
        observation: Mapping[str, Any],
        *,
        seeds: np.ndarray,
        max_new_tokens: int | np.ndarray,
        prefix_lengths: Any = None,
        decoding: Decoding | None = None,
        values: bool = True,
    ) -> Sampler:
        """Begin to write a batch of texts.

        Args:
            observation: "input_ids" and "attention_mask", each (N, P+T).
            seeds: (N,) integers; token h of a text must depend on its own row's seed, state and h alone.
            max_new_tokens: Most new tokens of a text, prefix included: an int, or (N,) integers.
            prefix_lengths: (N,) new tokens that the observation already holds; None for none.
            decoding: How tokens are chosen; None for the policy's own `decoding`.
            values: Whether the samples carry values.

        Returns:
            An object with the attribute `rows` and the methods `sample` and `keep` of `textgym.decoding.Sampler`.
        """

    @abstractmethod
    def evaluate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        columns: Tensor,
        handoffs: Tensor | None = None,
        states_only: Tensor | None = None,
    ) -> Evaluation:
        """Judge decisions that are already taken. Gradients flow into all results.

        Args:
            input_ids: (B, S) int64; valid tokens of a row can have padding on both sides.
            attention_mask: (B, S), nonzero where valid.
            columns: (B, A) int64, the columns of the tokens to judge, each given all valid tokens before it; -1 for
                none.
            handoffs: (B, A) bool, where the decision was the hand-off instead, in the state made of the valid tokens
                before that column, whatever stands there; None for nowhere.
            states_only: (B, A) bool, where only the state is to be judged, not the decision: log-probability and
                entropy are zero there; None for nowhere.
        """

    @abstractmethod
    def values(self, input_ids: Tensor, attention_mask: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Judge states alone. Gradients flow into both results.

        Args:
            input_ids: (B, S) int64; valid tokens of a row can have padding on both sides.
            attention_mask: (B, S), nonzero where valid.
            columns: (B, A) int64 in {1..S}: each names the state made of all valid tokens in the columns before it, so
                that S is the state after the whole text; -1 for none.

        Returns:
            Values if the policy goes on, and values if the guide does: (B, A) float32 each, zero where there is no
            column.
        """

    @abstractmethod
    def shift_values(self, of_policy: float = 0.0, of_guide: float = 0.0) -> None:
        """Add constants to what the two critics say of every state.

        Args:
            of_policy: Added to the values if the policy goes on.
            of_guide: Added to the values if the guide goes on.
        """

    @abstractmethod
    def copy_values(self, to: Literal["policy", "guide"]) -> None:
        """Let one of the two critics say what the other says of every state.

        Args:
            to: The critic that changes: of the policy's values, or of the guide's.
        """

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, decoding: Decoding | None = None, seed: int = 0
    ) -> list[str]:
        """Continue texts.

        Args:
            prompts: N texts.
            max_new_tokens: Most tokens of a continuation.
            decoding: How tokens are chosen; None for the policy's own `decoding`.
            seed: The continuations of equal prompts and seeds are equal.

        Returns:
            N continuations, without special tokens; each is what to put after its prompt, with the space between.

        Raises:
            ValueError: A prompt without a token, or one that is too long for the policy.
        """
        if not prompts:
            return []
        encoded = [ids for _, ids in encode_prompts(self.tokenizer, [("", text, "") for text in prompts], sys.maxsize)]
        mask = np.arange(max(map(len, encoded))) < np.array([len(ids) for ids in encoded])[:, None]
        input_ids = np.full(mask.shape, self.tokenizer.eos_token_id, np.int64)
        input_ids[mask] = np.concatenate(encoded)
        sampler = self.sampler(
            {"input_ids": input_ids, "attention_mask": mask},
            seeds=np.random.default_rng(seed).integers(2**63, size=len(prompts)),
            max_new_tokens=max_new_tokens,
            decoding=decoding,
            values=False,
        )
        written = write(sampler, np.full(len(prompts), max_new_tokens), self.end_token_ids)
        texts = decode_continuations(self.tokenizer, list(map(Context, encoded, prompts)), written)
        if self.tokenizer.is_fast and self.tokenizer.backend_tokenizer.decoder is None:
            return [text.removeprefix(" ") for text in texts]  # what only joins words is no part of a text
        return texts

    @abstractmethod
    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the policy into a folder: weights as safetensors, tokenizer, and whatever else it needs."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, path: str | os.PathLike, *, device: str | torch.device = "auto", **arguments: Any) -> Any:
        """Read what `save_pretrained` wrote."""


class LanguageModelPolicy(Policy):
    """A language model of transformers with linear heads on its last hidden state.

    Two heads are critics, of what the policy and of what the guide would make of a state; they begin at zero. A third,
    optional one is the gate of the hand-off: with ``z = w h + b`` the policy hands off with probability sigmoid(z), and
    otherwise chooses a token as the language model does, so that ``log pi(token) = log p(token) + log sigmoid(-z)``.
    Dropout is always off: the module stays in evaluation mode, since probability ratios of two dropout masks would be
    noise.

    This is the base of `CausalLMPolicy` and `Seq2SeqPolicy`; its `from_pretrained` makes whichever the model needs.

    A mixture of experts is trained as any other model: the auxiliary loss that balances its routers, which
    ``config.output_router_logits`` asks for, is no part of any loss here.

    The positions of a LongRoPE model are fixed for `context_length` (see `textgym.positions`), in the model itself.

    The tokenizer can have more tokens than the model has embeddings (Gemma 3's has one for images): these are never
    chosen, and a text that holds one is refused. All tokens that the model's generation config names as its ends are
    `end_token_ids`.

    With adapters (LoRA) only these and the heads are trained, and what is copied elsewhere (the reference policy, a
    critic of its own, a guide made of the model) shares the weights under them.

    Args:
        model: The language model, of transformers or in a `peft.PeftModel`.
        tokenizer: Its tokenizer.
        decoding: How `predict`, `generate` and `sampler` choose tokens unless told otherwise. The hand-off is drawn
            before the token and knows no truncation.
        handoff_prob: Gives the policy the action that asks the guide to finish, with this probability in every state
            to begin with; None gives it none.
        autocast: What products of matrices are computed in, whatever the type of the weights; "auto" is bfloat16 where
            the device computes fast in it, None the type of the weights. Heads, log-probabilities, losses and steps of
            the optimiser stay in float32.
        compile: Whether to compile the layers of a causal model with `torch.compile`. Compiling takes about a minute,
            and some seconds in the next process.

    Raises:
        ValueError: A model of the other kind, or one whose texts cannot be read together
            (`textgym.packing.check_served`); the tokenizer has no EOS token, or does not belong to the model; a
            `handoff_prob` outside of (0, 1); a wrong `autocast`.
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
        biases = {"value": 0.0, "guide_value": 0.0}
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
        **arguments: Any,
    ) -> Self:
        """Load a language model, and heads and decoding where they lie beside it.

        Called on `LanguageModelPolicy` itself it makes a `CausalLMPolicy` or a `Seq2SeqPolicy`, as the model's config
        says.

        Args:
            path: Hub id or folder with safetensors weights, or with PEFT adapters, which are trained on.
            tokenizer: The tokenizer or where to find it; None: beside the model.
            decoding: None: the one saved with the policy, else plain sampling.
            device: "auto" is CUDA where there is one, else CPU.
            dtype: Type of the model's weights, in which it also computes; the heads have it too, or float32 where it is
                a half precision. "auto" is float32 for the weights, with ``autocast="auto"``. None: weights and
                autocast as saved with the policy, else float32.
            handoff_prob: Gives a policy that was saved without one the hand-off, with this probability to begin with.
            compile: Whether to compile the model's layers; None: as saved with the policy, else not.
            lora: Gives the model adapters and freezes the rest; arguments of `peft.LoraConfig`, such as
                ``{"r": 8, "lora_alpha": 64}``.
            quantization: "4bit" keeps the model's linear layers in 4 bits, by bitsandbytes; such a model is trained by
                adapters only. None: as saved with the policy, else not.
            gguf_file: A GGUF file at `path`, to be read instead; the policy is saved as any other.
            **arguments: None are allowed; they are a subclass's.

        Raises:
            ImportError: What adapters, quantised weights or GGUF files need is not installed.
            ValueError: There is no model with safetensors weights or no tokenizer at `path`, or they do not fit; a
                quantised model without adapters; adapters that were asked for where there are some.
        """
        if arguments:
            raise ValueError(f"from_pretrained got unknown arguments {sorted(arguments)}")
        file = file_beside(path, POLICY_FILE)
        settings = {} if file is None else json.loads(Path(file).read_text())
        saved_dtype = getattr(torch, settings.get("dtype", "float32"))
        weights = torch.float32 if dtype == "auto" else dtype or saved_dtype
        quantization = settings.get("quantization") if quantization is None else quantization
        packed = settings.get("gguf_file") if gguf_file is None else gguf_file
        model = load_model(path, device=device, dtype=weights, quantization=quantization, gguf_file=packed)
        if lora is not None:
            add_lora(model, path, lora)
        elif has_adapters(model):
            train_adapters(model, file_beside(path, "adapter_model.safetensors"))
        elif quantization is not None:
            raise ValueError(f"quantization={quantization!r} needs lora: quantised weights cannot be trained")
        if tokenizer is None:
            tokenizer = pretrained_tokenizer(path, gguf_file)
        elif not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = pretrained_tokenizer(tokenizer)
        if decoding is None and settings:
            decoding = Decoding(**settings["decoding"])
        file = file_beside(path, HEADS_FILE)
        saved = {} if file is None else load_file(file, device=str(model.device))
        if "handoff.weight" in saved and handoff_prob is None:
            handoff_prob = 0.5  # of no consequence: the head is read below
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
            policy.heads.load_state_dict({**policy.heads.state_dict(), **saved})
        return policy

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write a folder that transformers' `AutoModel...` and `AutoTokenizer` open too, replacing what is there.

        Of a model with adapters these alone are written, in PEFT's format, beside the name of the model they are for.

        Raises:
            ValueError: Adapters on a model that was made in memory, so that it cannot be found again.
        """
        if has_adapters(self.model) and not self.model.name_or_path:
            raise ValueError(
                "policy cannot be saved: its adapters are on a model that was loaded from nowhere; save that model "
                "first, and load it from there with lora={...}"
            )
        with replaced_folder(Path(folder)) as new:
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
    ) -> Sampler:
        """Begin to write a batch of texts (see `Policy.sampler`).

        Raises:
            ValueError: A text could be longer than the model has positions; a decoding with beams where values are
                wanted or the policy can hand off.
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
            handoff_head=self._handoff_head,
            vocab_size=vocabulary_size(self.tokenizer),
            unused_ids=unused_ids(self.tokenizer),
            dtype=self._dtype,
        )

    def evaluate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        columns: Tensor,
        handoffs: Tensor | None = None,
        states_only: Tensor | None = None,
    ) -> Evaluation:
        """Judge decisions in one pass that computes logits only where they are needed (see `Policy.evaluate`).

        Raises:
            ValueError: A column without a valid token (unless it is a hand-off's), or with none before it; a hand-off
                of a policy that has none; a text longer than the model has positions.
        """
        rows, entries = (columns >= 0).nonzero(as_tuple=True)
        judged = columns[rows, entries]
        asked = None if handoffs is None else handoffs[rows, entries]
        if asked is not None and not self.can_hand_off and asked.any():
            raise ValueError("handoffs holds a hand-off, which this policy does not have: make it with handoff_prob")
        at = judged.clamp(max=attention_mask.shape[1] - 1)
        valid = attention_mask[rows, at] != 0
        if not (valid if asked is None else valid | asked).all():
            raise ValueError("columns must hold -1 or columns of valid tokens that have a valid token before them")
        hidden, tokens = self._read(input_ids, attention_mask, rows, judged), input_ids[rows, at]
        decided = None if states_only is None else (~states_only[rows, entries]).nonzero().squeeze(1)
        if decided is None or len(decided) == len(rows):
            log_probs, entropy = self._judge_tokens(hidden, tokens)
        else:
            log_probs, entropy = (
                part.new_zeros(len(rows)).index_put((decided,), part)
                for part in self._judge_tokens(hidden.index_select(0, decided), tokens[decided])
            )
        hidden = at_least_float32(hidden)
        if self.can_hand_off:
            gate = self.heads["handoff"](hidden).squeeze(-1)
            hand_off, go_on = logsigmoid(gate), logsigmoid(-gate)
            log_probs = log_probs + go_on
            if asked is not None:
                log_probs = torch.where(asked, hand_off, log_probs)
            # H = -q log q - (1 - q) log (1 - q) + (1 - q) H(tokens), with q the probability of the hand-off
            entropy = go_on.exp() * (entropy - go_on) - hand_off.exp() * hand_off
            if states_only is not None:
                log_probs, entropy = (part.masked_fill(states_only[rows, entries], 0) for part in (log_probs, entropy))
        values, guide_values = (self.heads[name](hidden).squeeze(-1) for name in ("value", "guide_value"))
        return Evaluation(
            *(_spread(part, columns, rows, entries) for part in (log_probs, entropy, values, guide_values))
        )

    def values(self, input_ids: Tensor, attention_mask: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Judge states in one pass without logits (see `Policy.values`).

        Raises:
            ValueError: A column with no valid token before it; a text longer than the model has positions.
        """
        rows, entries = (columns >= 0).nonzero(as_tuple=True)
        hidden = at_least_float32(self._read(input_ids, attention_mask, rows, columns[rows, entries]))
        values, guide_values = (self.heads[name](hidden).squeeze(-1) for name in ("value", "guide_value"))
        return _spread(values, columns, rows, entries), _spread(guide_values, columns, rows, entries)

    @abstractmethod
    def _read(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """The hidden states (n, d) after all valid tokens of `rows` (n,) in the columns before `columns` (n,)."""

    def _judge_tokens(self, hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of tokens (n,) and entropies, given hidden states (n, d), some at a time."""

        def judge(hidden: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            with autocast(self.device, self._dtype):
                logits = head(self.model, hidden)
            log_probs, entropy = _LogProbAndEntropy.apply(at_least_float32(logits), tokens)
            return log_probs, entropy

        part = max(1, _LOGITS_AT_ONCE // self.model.get_output_embeddings().weight.shape[0])
        if len(tokens) <= part:
            return judge(hidden, tokens)
        # More are made anew in the backward pass, so that memory does not grow with tokens times vocabulary.
        parts = [
            checkpoint(judge, *pair, use_reentrant=False)
            for pair in zip(hidden.split(part), tokens.split(part), strict=True)
        ]
        log_probs, entropy = (torch.cat(part) for part in zip(*parts, strict=True))
        return log_probs, entropy

    @torch.no_grad()
    def shift_values(self, of_policy: float = 0.0, of_guide: float = 0.0) -> None:
        """Move the biases of the critics' heads (see `Policy.shift_values`)."""
        for name, shift in (("value", of_policy), ("guide_value", of_guide)):
            self.heads[name].get_parameter("bias").add_(shift)

    def copy_values(self, to: Literal["policy", "guide"]) -> None:
        """Copy the head of the other critic (see `Policy.copy_values`)."""
        learned, new = ("guide_value", "value") if to == "policy" else ("value", "guide_value")
        self.heads[new].load_state_dict(self.heads[learned].state_dict())

    def merged(self) -> Self:
        """The same policy with its adapters added to the weights of a copy of the model, for use without PEFT."""
        twin = type(self)(merged(self.model), self.tokenizer, self.decoding, None, self.autocast, self.compiled)
        twin.heads, twin.can_hand_off = copy.deepcopy(self.heads), self.can_hand_off
        return self._in_the_same_place(twin)

    def without_handoff(self) -> Self:
        """The same policy without the hand-off, to see what it writes alone; its weights are shared, not copied."""
        alone = type(self)(self.model, self.tokenizer, self.decoding, None, self.autocast, self.compiled)
        for name in alone.heads:
            alone.heads[name] = self.heads[name]
        return self._in_the_same_place(alone)

    def _in_the_same_place(self, twin: Self) -> Self:
        """Tell a policy what this one was told of its environment."""
        twin.prompt_columns, twin.context_length = self.prompt_columns, self.context_length
        twin.add_end_tokens(self.end_token_ids)
        return twin

    @property
    def _dtype(self) -> torch.dtype | None:
        return fast_dtype(self.device) if self.autocast == "auto" else self.autocast

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """EOS, what the model's generation config names (see `textgym.tokenization.end_ids`), and what was added."""
        config = self.model.generation_config
        of_model = end_ids(self.tokenizer, None if config is None else config.eos_token_id)
        return tuple(dict.fromkeys([*of_model, *self._more_end_ids]))

    def _prepare(self, input_ids: Any, attention_mask: Any, new: int = 0) -> None:
        """Make the model ready to read texts, (B, S) each, and to write up to `new` tokens more.

        Raises:
            ValueError: A token that the model does not embed.
        """
        check_embedded(self.tokenizer, self.model, input_ids, attention_mask)
        if short_context(self.model) is not None:
            fix_positions(self.model, self.context_length)
            warn_of_short_factors(self.model, int((attention_mask != 0).sum(1).max()) + new, self.context_length)
        # At every use, since a copy of a compiled model is not compiled.
        if self.compiled and can_pack(self.model):
            compile_layers(self.model)

    @property
    def _handoff_head(self) -> nn.Module | None:
        return self.heads["handoff"] if self.can_hand_off else None

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, decoding: Decoding | None = None, seed: int = 0
    ) -> list[str]:
        """Continue texts (see `Policy.generate`); a policy that can hand off writes all of them itself."""
        alone = self.without_handoff() if self.can_hand_off else self
        return super(LanguageModelPolicy, alone).generate(
            prompts, max_new_tokens=max_new_tokens, decoding=decoding, seed=seed
        )


class CausalLMPolicy(LanguageModelPolicy):
    """A causal language model of transformers as a policy; see `LanguageModelPolicy`.

    Texts are read as packed tokens (`textgym.packing`): padding costs nothing, and rows of a batch that begin with the
    same tokens share them.
    """

    encodes_prompts = False

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

    The prompt is read by the encoder, once for all rows of a batch that have the same; the decoder writes the new
    tokens. Where the one ends and the others begin is told by `prompt_columns` (to `sampler` by the lengths of
    prefixes).
    """

    encodes_prompts = True

    def _read(self, input_ids: Tensor, attention_mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        if self.prompt_columns is None:
            raise ValueError(
                "prompt_columns must be set before texts can be judged, since the prompt is read apart from them: "
                "policy.prompt_columns = env.max_prompt_tokens (algorithms do that)"
            )
        self._prepare(input_ids, attention_mask)
        # Padding too is embedded, and its token can be one that the model does not embed.
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


@contextlib.contextmanager
def replaced_folder(path: Path) -> Iterator[Path]:
    """Fill a temporary folder beside `path`, then put it in its place; if filling fails, `path` is what it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        old = temporary.with_name(temporary.name + "-old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


class _LogProbAndEntropy(torch.autograd.Function):
    """Log-probability of one token and entropy of each row of logits, with their gradients in closed form.

    Autograd would keep several tensors of the logits' size, by far the largest of an update, and take their
    exponentials again; this keeps p = softmax(logits). With H its entropy, d log p_a / d logits = onehot(a) - p and
    d H / d logits = -p (log p + H).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        probs, peaks = logits.softmax(-1), logits.amax(-1)
        # The largest probability is at least 1/V, so its logarithm is precise.
        largest = probs.amax(-1).log()
        log_probs = logits.gather(1, tokens[:, None]).squeeze(1) - peaks + largest
        entropy = peaks - largest - (probs * logits).sum(-1)
        ctx.save_for_backward(probs, tokens, entropy)
        ctx.set_materialize_grads(False)
        return log_probs, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        probs, tokens, entropy = ctx.saved_tensors
        of_log_prob, of_entropy = gradients
        total = None
        if of_entropy is not None:
            log_probs = probs.clamp(min=torch.finfo(probs.dtype).tiny).log_()
            total = log_probs.add_(entropy[:, None]).mul_(probs).mul_(-of_entropy[:, None])
        if of_log_prob is not None:
            of_log_prob = of_log_prob[:, None]
            # Nobody reads the probabilities after this: their memory is that of the gradient.
            total = probs.mul_(-of_log_prob) if total is None else total.addcmul_(probs, of_log_prob, value=-1)
            total.scatter_add_(1, tokens[:, None], of_log_prob)
        return total, None


def left_packed(input_ids: Tensor, valid: Tensor) -> Tensor:
    """Move every row's valid tokens, in order, to the left end; (n, S) to (n, S)."""
    return input_ids.gather(1, (~valid).to(torch.int8).argsort(dim=1, stable=True))


def _spread(values: Tensor, columns: Tensor, rows: Tensor, entries: Tensor) -> Tensor:
    """Put one value for each entry of `columns` that is not -1 back into its place, zero elsewhere."""
    return values.new_zeros(columns.shape).index_put((rows, entries), values)
