"""The combination lock: a test task in which every value is known in closed form."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym import seeding
from textgym.checks import check, is_int, is_number
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.guides.base import Author, Completion, Guide, GuideRequest
from textgym.task import Task

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

EOS_ID = 0
# Copies of the one prompt in the data: an evaluation visits every sample once.
EPISODES = 256
SAFE_WORTH, BETTER_WORTH = 0.5, 1.0
# At the fork the guide takes the safe or the better path with these probabilities, and then follows it with those.
TAKES_SAFE, TAKES_BETTER = 0.8, 0.2
FOLLOWS_SAFE, FOLLOWS_BETTER = 1.0, 0.4

Prefix = Sequence[int]


@dataclass(frozen=True)
class CombinationLock:
    """A hidden combination of symbols that opens a lock, or a fork with two of them, and a guide that half knows it.

    Token 0 is EOS, tokens 1 to K-1 are symbols. A text is worth something only if it is exactly an ending: H symbols
    in the right order. Everything is undiscounted.

    Plain, there is one ending, worth 1. On the combination the guide writes the right symbol with probability p, else
    one of the K-2 others uniformly.

    With `fork` there are two endings that differ from the first symbol on: a safe one worth 0.5, and a better one worth
    1. The guide takes the safe path with probability 0.8, and then follows it with certainty; it takes the better path
    with probability 0.2, and then follows it with probability 0.4 a symbol, else writing another uniformly.

    Off every path the guide writes a uniform symbol. It never writes EOS.

    Attributes:
        vocab_size: K, the number of tokens; at least 3, with `fork` at least 4.
        length: H, symbols of an ending and the horizon of an episode; at least 1, with `fork` at least 2.
        guide_accuracy: p, in [0, 1]. It has no effect on the guide of a fork, and must keep its default there.
        fork: Whether there are two endings.
        combination_seed: The endings are a hash of it.

    Raises:
        ValueError: A value is outside of its range.
    """

    vocab_size: int = 20
    length: int = 10
    guide_accuracy: float = 0.9
    fork: bool = False
    combination_seed: int = 0

    def __post_init__(self) -> None:
        check("fork", self.fork, isinstance(self.fork, bool), "True or False")
        for name, least in (("vocab_size", 4 if self.fork else 3), ("length", 2 if self.fork else 1)):
            value = getattr(self, name)
            check(name, value, is_int(value) and value >= least, f"an int >= {least} with fork={self.fork}")
        check("combination_seed", self.combination_seed, is_int(self.combination_seed), "an int")
        accuracy = self.guide_accuracy
        check("guide_accuracy", accuracy, is_number(accuracy) and 0 <= accuracy <= 1, "a number in [0, 1]")
        if self.fork and accuracy != type(self).guide_accuracy:
            raise ValueError(f"guide_accuracy has no effect with fork=True and must be left out, got {accuracy!r}")

    # Worth

    @functools.cached_property
    def endings(self) -> tuple[tuple[tuple[int, ...], float], ...]:
        """The H token ids and the worth of every ending; the best is last."""

        def symbols(path: int) -> np.ndarray:
            draws = seeding.uniform(self.combination_seed, path, np.arange(self.length))
            return seeding.integer(1, self.vocab_size - 1, draws)

        first = symbols(0)
        if not self.fork:
            return ((tuple(first.tolist()), 1.0),)
        second = symbols(1)
        # One of the K-2 symbols that the safe path does not begin with: the two never meet.
        second[0] -= second[0] == self.vocab_size - 1
        second[0] += second[0] >= first[0]
        return ((tuple(first.tolist()), SAFE_WORTH), (tuple(second.tolist()), BETTER_WORTH))

    def reward(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> list[float]:
        """Return the worth of each text, 0 where it is no ending (see `textgym.rewards.base.RewardFunction`)."""
        worths = {_text(ending): worth for ending, worth in self.endings}
        return [worths.get(text.strip(), 0.0) for text in completions]

    # Closed forms

    def guide_probs(self, prefix: Prefix = ()) -> np.ndarray:
        """Return the guide's distribution of the next token.

        Args:
            prefix: Token ids of the text so far.

        Returns:
            Probabilities of the tokens, float64 (K,).

        Raises:
            ValueError: A token id is outside of [0, K).
        """
        return self._guide_table[self._state(prefix)].copy()

    def value(self, probs: Callable[[tuple[int, ...]], Any], prefix: Prefix = ()) -> float:
        """Return the expected worth of the whole text when a policy continues it.

        Args:
            probs: The policy: a function from the token ids so far to the probabilities (K,) of the next.
            prefix: Token ids of the text so far.
        """
        prefix = tuple(int(token) for token in prefix)
        total = 0.0
        for ending, worth in self.endings:
            if ending[: len(prefix)] == prefix:
                rest = range(len(prefix), self.length)
                total += worth * float(np.prod([float(probs(ending[:depth])[ending[depth]]) for depth in rest]))
        return total

    def guide_value(self, prefix: Prefix = ()) -> float:
        """Return V of the guide: the expected worth of the whole text when the guide continues it."""
        return self.value(self.guide_probs, prefix)

    def guide_q(self, prefix: Prefix = ()) -> np.ndarray:
        """Return Q of the guide: its value after each token, float64 (K,), 0 for EOS, which ends the text early."""
        return np.array([self.guide_value((*prefix, token)) for token in range(self.vocab_size)])

    # States: 0 is the empty text, eH + d the first d symbols of ending e (from 0), the last any text off the endings

    @property
    def num_states(self) -> int:
        """The number of states that values and the guide distinguish."""
        return len(self.endings) * self.length + 2

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the states of texts before and after each token.

        Args:
            tokens: int64 (n, S) on any device, the tokens after the prompt. After the end of a row's text, tokens and
                states are arbitrary.

        Returns:
            int64 (n, S+1) in [0, `num_states`): the state before each token, and the one after the last. State 0 is the
            empty text; all texts with which no ending begins share the last state.
        """
        import torch

        endings = torch.tensor([ending for ending, _ in self.endings], device=tokens.device)
        n, width = tokens.shape
        depth = min(width, self.length)
        on_path = (tokens[:, None, :depth] == endings[:, :depth]).cumprod(-1)
        numbers = torch.arange(1, endings.numel() + 1, device=tokens.device).view_as(endings)[:, :depth]
        number = (on_path * numbers).sum(1)  # a text is on one ending at most
        states = tokens.new_full((n, width + 1), self.num_states - 1)
        states[:, 0] = 0
        states[:, 1 : depth + 1] = torch.where(number > 0, number, self.num_states - 1)
        return states

    def _state(self, prefix: Prefix) -> int:
        state = 0
        for token in prefix:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"prefix must hold token ids in [0, {self.vocab_size}), got {token}")
            state = int(self._next_state[state, token])
        return state

    @functools.cached_property
    def _paths(self) -> tuple[tuple[int, int, int, int], ...]:
        """(ending, state, right symbol, next state) for every step along an ending."""
        return tuple(
            (path, path * self.length + depth if depth else 0, symbol, path * self.length + depth + 1)
            for path, (ending, _) in enumerate(self.endings)
            for depth, symbol in enumerate(ending)
        )

    @functools.cached_property
    def _next_state(self) -> np.ndarray:
        """int64 (states, K)."""
        table = np.full((self.num_states, self.vocab_size), self.num_states - 1)
        for _, state, symbol, following in self._paths:
            table[state, symbol] = following
        return table

    @functools.cached_property
    def _guide_table(self) -> np.ndarray:
        """The guide's distribution of the next token in each state, float64 (states, K)."""
        symbols = self.vocab_size - 1
        table = np.full((self.num_states, self.vocab_size), 1 / symbols)
        follows = (FOLLOWS_SAFE, FOLLOWS_BETTER) if self.fork else (self.guide_accuracy,)
        for path, state, symbol, _ in self._paths:
            table[state] = (1 - follows[path]) / (symbols - 1)
            table[state, symbol] = follows[path]
        if self.fork:
            table[0] = 0
            table[0, [ending[0] for ending, _ in self.endings]] = TAKES_SAFE, TAKES_BETTER
        table[:, EOS_ID] = 0
        return table

    @functools.cached_property
    def _guide_cumulative(self) -> np.ndarray:
        cumulative = self._guide_table.cumsum(1)
        # Rounding must leave no gap below 1, where a draw would select no token.
        return cumulative / cumulative[:, -1:]

    # Tokenizer and task

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Return a tokenizer with EOS and the symbols "s1", "s2", ..., separated by white space."""
        from textgym.tokenization import word_tokenizer

        return word_tokenizer([f"s{symbol}" for symbol in range(1, self.vocab_size)])

    @property
    def task(self) -> Task:
        """The lock as a task: one prompt of one token in every split, and the best ending as its reference."""
        return Task(
            name="lock",
            data=[{"prompt": "s1", "ending": _text(self.endings[-1][0])}] * EPISODES,
            prompt="{prompt}",
            references="ending",
            max_prompt_tokens=1,
            max_new_tokens=self.length,
            reward=self.reward,
            tokenizer=self.tokenizer,
        )


@dataclass(frozen=True)
class LockGuide:
    """The guide of a lock, which samples from `CombinationLock.guide_probs`.

    Attributes:
        lock: The lock.
    """

    lock: CombinationLock
    author = Author.GUIDE
    can_hand_off = True

    def complete(self, requests: Sequence[GuideRequest], tokenizer: PreTrainedTokenizerBase) -> list[Completion]:
        """Complete every request; token h depends only on the seed of the request, the text before it, and h."""
        if not requests:
            return []
        lock = self.lock
        states = np.array([lock._state(request.prefix_ids) for request in requests])
        limits = [request.max_new_tokens for request in requests]
        positions = np.array([len(request.prefix_ids) for request in requests])[:, None] + np.arange(max(limits))
        draws = seeding.uniform(np.array([request.seed for request in requests])[:, None], positions)
        written: np.ndarray = np.empty(positions.shape, np.int64)
        for step in range(max(limits)):
            written[:, step] = (lock._guide_cumulative[states] <= draws[:, step, None]).sum(1)
            states = lock._next_state[states, written[:, step]]
        return [
            Completion(token_ids=tokens[:limit], finished=False)
            for tokens, limit in zip(written.tolist(), limits, strict=True)
        ]


class _WithLock:
    """The constructor that the single and the vector environment share."""

    def __init__(
        self,
        *num_envs: int,
        vocab_size: int = CombinationLock.vocab_size,
        length: int = CombinationLock.length,
        guide_accuracy: float = CombinationLock.guide_accuracy,
        fork: bool = CombinationLock.fork,
        combination_seed: int = CombinationLock.combination_seed,
        guide: str | Guide | Callable | None = "scripted",
        **arguments: Any,
    ) -> None:
        self.lock = CombinationLock(vocab_size, length, guide_accuracy, fork, combination_seed)
        horizon = arguments.get("max_new_tokens")
        check("max_new_tokens", horizon, horizon in (None, length), f"None or length={length}, the lock's horizon")
        if isinstance(guide, str) and guide == "scripted":
            guide = LockGuide(self.lock)
        super().__init__(*num_envs, task=self.lock.task, guide=guide, **arguments)  # type: ignore[call-arg]
        tokenizer: PreTrainedTokenizerBase = self.tokenizer  # type: ignore[attr-defined]
        given = arguments.get("tokenizer") is not None
        if given and tokenizer.get_vocab() != self.lock.tokenizer().get_vocab():
            raise ValueError(
                f"tokenizer must be None or have the lock's vocabulary ({vocab_size} tokens: EOS, s1, s2, ...), "
                f"got one of {len(tokenizer)} tokens"
            )


class CombinationLockEnv(_WithLock, TextEnv):
    """Write a hidden combination of symbols.

    Description
        A text is worth something only if it is exactly the hidden combination of H symbols; chance finds it once in
        (K-1)^H texts. A scripted guide knows each next symbol with probability p. It tests algorithms that learn from
        a guide, because the value of any policy is known in closed form
        (`textgym.tasks.lock.CombinationLock`, the attribute ``lock``).

        With ``fork=True`` there are two combinations, and the guide knows the one that is worth less far better: an
        algorithm that only improves on the guide one step at a time ends on the safe path.

    Action Space
        ``Discrete(K)``: the next token; 0 ends the text, 1 to K-1 are the symbols. With ``handoff=True``,
        ``Discrete(K + 1)``: the last action asks the guide to finish the text.

    Observation Space
        ``Dict`` of ``input_ids``, int64 (P+T,), and ``attention_mask``, int8 (P+T,), with T = H. The prompt is in
        the first P columns; token h of the text is in column P+h; the columns after the text are padding, mask 0.

    Rewards
        Zero until the episode ends, then 1 for the combination and 0 for any other text. With ``fork=True``, 0.5 for
        the safe combination and 1 for the better one.

        Every token of a guide's completion costs ``handoff_cost``.

    Starting State
        Always the same prompt of one symbol. With probability ``guidance.restart_prob`` a prefix that the guide wrote
        follows it. The options of ``reset`` give another ``prompt`` with ``references``, a ``prefix``, or new
        ``guidance``; the prompt changes nothing.

    Episode End
        The episode terminates at the end-of-sequence token or a string of ``stop`` ("stop"), after T tokens ("length"),
        or when the guide has completed the text ("handoff"). It is never truncated: the horizon is part of the task.

    Arguments
        ``vocab_size``: K, by default 20. ``length``: H, by default 10.
        ``guide_accuracy``: p, by default 0.9; not with ``fork=True``.
        ``fork``: True for two combinations, by default False.
        ``combination_seed``: the combination is a hash of it, by default 0.
        ``split``: "train" (default), "validation" or "test", which are the same here. ``source`` changes nothing.
        ``tokenizer``: one with the lock's vocabulary; None makes it.
        ``max_prompt_tokens``: P, by default 1. ``max_new_tokens``: None or H.
        ``template``: a text with ``{prompt}`` that the policy reads instead of the prompt, such as "Q: {prompt} A:".
        ``chat``: True makes it a user's message in the chat template. ``stop``: strings, or names of special tokens,
        that end the text; the reward reads the text before them.
        ``reward``: None for the worth of the text; or as for every task, the hub id or path of a
        sequence-classification model; or a callable ``(prompts, completions, references) -> floats or named parts``.
        ``guide``: "scripted" (default), None, "references", the hub id or path of a language model, a
        `textgym.guides.Guide`, or a function on a list of `textgym.guides.GuideRequest`.
        ``guidance``: a `textgym.Guidance`, or a mapping of its fields, which says when the guide takes part.
        ``handoff``: True adds the hand-off action. ``handoff_cost``: the cost of each token of a guide's completion.
        ``min_new_tokens``, ``banned_tokens``: `action_masks` does not allow an end before so many tokens, nor these
        token ids.
        ``order``: "random" (default) or "sequential", which visits each sample of the split once.
        ``render_mode``: "ansi", "html", "human" or None.

        The vector environment also takes ``num_envs``, ``parking``, ``autoreset_mode`` and ``copy``
        (see `textgym.engine.TextVectorEnv`).

    Info
        From ``reset``: ``prompt``, ``references``, ``sample_id`` (-1 for a user's prompt), ``prefix_length``,
        ``authors`` (int8 (T,): -1 nothing, 0 policy, 1 guide, 2 reference, 3 user). From the last ``step``: ``text``,
        ``authors``, ``finish_reason``, ``reward_parts``, ``prefix_length``, ``policy_tokens``, ``guide_tokens``.

    Version History
        v0: first version.
    """


class CombinationLockVectorEnv(_WithLock, TextVectorEnv):
    """`CombinationLockEnv` for N rows at once (see `textgym.engine.TextVectorEnv`)."""


def _text(tokens: Sequence[int]) -> str:
    return " ".join(f"s{token}" for token in tokens)
