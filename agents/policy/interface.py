"""The policy interface: an `Actor` writes texts, a `Policy` can also be trained."""

from __future__ import annotations

import copy
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from textgym.checks import check, check_int
from textgym.decoding import Decoding
from textgym.generation import write
from textgym.sampling import TokenSampler
from textgym.tokenization import Context, decode_continuations, encode_prompts, eos_first

#: Who writes the rest of a text after a state: a state has a value for each of the two.
Continuation = Literal["policy", "guide"]


class Evaluation(NamedTuple):
    """Log-probabilities, entropies and values of given decisions; entries without a decision are zero.

    Attributes:
        log_probs: (B, A) float32, log-probabilities of the decisions under the untruncated softmax at temperature 1.
        entropy: (B, A) float32, entropies in nats of the distributions that they were drawn from.
        values: (B, A) float32, values of the states before the decisions; zero if they were not requested.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor


class Actor(nn.Module, ABC):
    """Base class of everything that writes texts token by token.

    Attributes:
        tokenizer: The tokenizer of its tokens; environments are made with it.
        decoding: How `predict`, `generate` and `sampler` choose tokens unless told otherwise.
        can_hand_off: Whether it has one more action than tokens, the environment's ``vocab_size``, which asks the guide
            to complete the text. Environments made with ``handoff=True`` need such an actor, others one without.
        prompt_columns: P, the number of prompt columns of an observation, for policies that encode prompts separately;
            None if unknown. Algorithms set it to their environment's.
        context_length: P + T, the maximum number of tokens of a text, for policies whose positions depend on it (see
            `textgym.positions`); None if unknown. Algorithms set it to their environment's.
    """

    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    can_hand_off: bool = False
    prompt_columns: int | None = None
    context_length: int | None = None
    _more_end_ids: tuple[int, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.set_seed(0)

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, EOS first."""
        return eos_first(self.tokenizer, self._more_end_ids)

    def add_end_tokens(self, token_ids: Sequence[int]) -> None:
        """Add tokens that end a text; algorithms add those that end an episode of their environment."""
        self._more_end_ids = tuple(dict.fromkeys([*self._more_end_ids, *token_ids]))

    @contextmanager
    def extra_end_tokens(self, token_ids: Sequence[int]) -> Iterator[None]:
        """`add_end_tokens` within a block."""
        before = self._more_end_ids
        self.add_end_tokens(token_ids)
        try:
            yield
        finally:
            self._more_end_ids = before

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def set_seed(self, seed: int) -> None:
        """Seed the draws of `predict`."""
        self._generator = np.random.default_rng(seed)

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
        entropies: bool = False,
    ) -> TokenSampler:
        """Return a sampler that writes a batch of texts.

        Args:
            observation: "input_ids" and "attention_mask", each (N, P+T).
            seeds: (N,) integers; token h of a text must depend only on its row's seed, its state and h.
            max_new_tokens: Maximum number of new tokens of a text, prefix included: an int, or (N,) integers.
            prefix_lengths: (N,) number of new tokens that the observation already holds; None for 0.
            decoding: How tokens are chosen; None for the actor's own `decoding`.
            values: Whether samples hold the values of states that the policy continues.
            entropies: Whether they hold the entropies of the tokens' distributions. It is given only where a guidance
                depends on them.

        Returns:
            The sampler, which writes one token of each text per call.
        """

    def check_length(self, prompt_tokens: int, new_tokens: int) -> None:
        """Refuse texts that may be too long to read: by default none.

        Args:
            prompt_tokens: P, the most tokens of a prompt.
            new_tokens: T, the most tokens after it.

        Raises:
            ValueError: A text of so many tokens cannot be read.
        """

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
            state: The state that the last call returned, or None. It is the number of tokens chosen in each row's
                episode, which `decoding.min_new_tokens` needs if `prompt_columns` is unknown.
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

    def generate(
        self, prompts: Sequence[str], *, max_new_tokens: int, decoding: Decoding | None = None, seed: int = 0
    ) -> list[str]:
        """Continue texts, without hand-offs.

        Args:
            prompts: N texts, which can name special tokens.
            max_new_tokens: Maximum number of tokens of a continuation.
            decoding: How tokens are chosen; None for the actor's own `decoding`.
            seed: Seed of the sampling; equal prompts and seeds give equal continuations.

        Returns:
            N continuations, without special tokens; each can be appended to its prompt as it is.

        Raises:
            ValueError: No sequence of texts; a prompt without a token, or one that is too long for the policy.
        """
        listed = isinstance(prompts, Sequence) and not isinstance(prompts, str | bytes)
        valid = listed and all(isinstance(text, str) for text in prompts)
        check("prompts", prompts, valid, "a sequence of texts")
        check_int("max_new_tokens", max_new_tokens)
        if not prompts:
            return []
        # They may come from a chat template, whose special tokens are meant.
        parts = [("", text, "") for text in prompts]
        encoded = [ids for _, ids in encode_prompts(self.tokenizer, parts, sys.maxsize, template=None)]
        mask = np.arange(max(map(len, encoded))) < np.array([len(ids) for ids in encoded])[:, None]
        input_ids = np.full(mask.shape, self.tokenizer.eos_token_id, np.int64)
        input_ids[mask] = np.concatenate(encoded)
        sampler = self.without_handoff().sampler(
            {"input_ids": input_ids, "attention_mask": mask},
            seeds=np.random.default_rng(seed).integers(2**63, size=len(prompts)),
            max_new_tokens=max_new_tokens,
            decoding=decoding,
            values=False,
        )
        written = write(sampler, np.full(len(prompts), max_new_tokens), self.end_token_ids)
        texts = decode_continuations(self.tokenizer, list(map(Context, encoded, prompts)), written)
        if self.tokenizer.is_fast and self.tokenizer.backend_tokenizer.decoder is None:
            return [text.removeprefix(" ") for text in texts]  # the space between words is not part of the text
        return texts

    def without_handoff(self) -> Self:
        """The same actor without the hand-off, which shares its weights."""
        return self

    @abstractmethod
    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the actor into a folder: weights as safetensors, tokenizer, and whatever else it needs."""

    @classmethod
    @abstractmethod
    def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
        """Read what `save_pretrained` wrote: ``from_pretrained(path, device="auto", ...)``."""


class Policy(Actor):
    """Base class of everything that algorithms train: an actor that also computes log-probabilities and values.

    A subclass implements the abstract methods; its trainable parameters are those of the module. Any architecture is
    possible if `sampler` and `evaluate_actions` use the same distribution: the log-probabilities that sampling records
    must be those that `evaluate_actions` returns for the same decisions. Dropout must be off in both.

    A policy has two value functions: one of the states that the policy continues, and one of those that the guide
    completes.
    """

    def copy(self) -> Self:
        """An independent copy, which shares only weights that are frozen."""
        return copy.deepcopy(self, {id(weight): weight for weight in self.parameters() if not weight.requires_grad})

    @abstractmethod
    def evaluate_actions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        columns: Tensor,
        handoffs: Tensor | None = None,
        states_only: Tensor | None = None,
        values_of: Continuation | None = "policy",
    ) -> Evaluation:
        """Log-probabilities, entropies and values of given decisions. Gradients flow into all results.

        Args:
            input_ids: (B, S) int64; valid tokens of a row can have padding on both sides.
            attention_mask: (B, S), nonzero where valid.
            columns: (B, A) int64, the columns of the tokens to evaluate, each given all valid tokens before it; -1 for
                none.
            handoffs: (B, A) bool, where the decision was the hand-off, in the state made of the valid tokens before
                that column, whose token is ignored; None for nowhere.
            states_only: (B, A) bool, where only the value of the state is needed: log-probability and entropy are zero
                there; None for nowhere.
            values_of: The value function: of states that the "policy" continues or the "guide" completes; None for no
                values.
        """

    def evaluate(self, *arguments: Any, **options: Any) -> Evaluation:
        """The earlier name of `evaluate_actions`."""
        return self.evaluate_actions(*arguments, **options)

    @abstractmethod
    def values(self, input_ids: Tensor, attention_mask: Tensor, columns: Tensor, of: Continuation = "policy") -> Tensor:
        """Values of states. Gradients flow into the result.

        Args:
            input_ids: (B, S) int64; valid tokens of a row can have padding on both sides.
            attention_mask: (B, S), nonzero where valid.
            columns: (B, A) int64 in {1..S}: each names the state made of all valid tokens in the columns before it, so
                that S is the state after the whole text; -1 for none.
            of: The value function: of states that the "policy" continues, or that the "guide" completes.

        Returns:
            (B, A) float32, zero where there is no column.
        """

    @abstractmethod
    def shift_values(self, of: Continuation, shift: float) -> None:
        """Add the constant `shift` to one of the two value functions."""

    @abstractmethod
    def copy_values(self, to: Continuation) -> None:
        """Make the value function `to` equal to the other."""
