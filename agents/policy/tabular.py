"""A policy without a network: one row of logits per state, for environments with few states."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from agents.policy.interface import Continuation, Evaluation, Policy
from agents.policy.language_model import POLICY_FILE, left_packed
from textgym.decoding import Decoding
from textgym.models import resolve_device
from textgym.precision import at_least_float32
from textgym.sampling import Sample, choose
from textgym.seeding import uniform
from textgym.storage import new_folder, readable, restore
from textgym.tasks.lock import CombinationLock
from textgym.tokenization import pretrained_tokenizer, vocabulary_size

TABLES_FILE = "tables.safetensors"

States = Callable[[Tensor], Tensor]


class TabularPolicy(Policy):
    """A table of logits and two of values, over the states that a function returns.

    All tables are initially zero: tokens are uniform, and all values are 0. If the states are fine enough, every policy
    can be represented, and what an algorithm converges to can be compared with closed forms.

    Args:
        tokenizer: The tokenizer; its tokens are the columns of the logits.
        states: Takes token ids, int64 (n, S), prompt included, each row aligned left, with any ids after its
            end; returns int64 (n, S+1), the state before each token and the one after the last.
        num_states: The number of states.
        decoding: How `predict`, `generate` and `sampler` choose tokens unless told otherwise.

    Raises:
        ValueError: The tokenizer has no EOS token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, states: States, num_states: int, decoding: Decoding | None = None
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError("tokenizer must have an eos_token: it is the action that ends a text")
        self.logits = nn.Parameter(torch.zeros(num_states, vocabulary_size(tokenizer)))
        self.value_table = nn.Parameter(torch.zeros(num_states))
        self.guide_value_table = nn.Parameter(torch.zeros(num_states))
        self.tokenizer = tokenizer
        self.states = states
        self.decoding = decoding or Decoding()

    @classmethod
    def for_lock(cls, lock: CombinationLock, decoding: Decoding | None = None) -> TabularPolicy:
        """A policy for ``textgym/CombinationLock-v0``; `lock` is the environment's attribute of that name."""
        return cls(lock.tokenizer(), functools.partial(_lock_states, lock), lock.num_states, decoding)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        device: str | torch.device = "auto",
        states: States | None = None,
        decoding: Decoding | None = None,
    ) -> TabularPolicy:
        """Read what `save_pretrained` wrote.

        Args:
            path: The folder.
            device: "auto" is CUDA where there is one, else CPU.
            states: The function that the policy was made with, which is not saved; that of a lock is
                ``TabularPolicy.for_lock(env.lock).states``.
            decoding: None: the one saved with the policy.

        Raises:
            ValueError: No `states`, or a folder that is not one of a tabular policy.
        """
        if states is None:
            raise ValueError("states must be given: the function from tokens to states that the policy was made with")
        folder = Path(path)
        restore(folder)
        if not (folder / TABLES_FILE).is_file():
            raise ValueError(f"path must be a folder written by TabularPolicy.save_pretrained, got {str(path)!r}")
        with readable(folder / TABLES_FILE):
            tables = load_file(folder / TABLES_FILE)
            num_states = len(tables["logits"])
        with readable(folder / POLICY_FILE):
            saved = Decoding(**json.loads((folder / POLICY_FILE).read_text(encoding="utf-8"))["decoding"])
        policy = cls(pretrained_tokenizer(folder), states, num_states, decoding or saved)
        policy.to(resolve_device(device), tables["logits"].dtype).load_state_dict(tables)
        return policy

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write tables, decoding and tokenizer into a folder, replacing what is there."""
        with new_folder(folder) as new:
            self.tokenizer.save_pretrained(new)
            save_file(self.state_dict(), new / TABLES_FILE)
            (new / POLICY_FILE).write_text(json.dumps({"decoding": asdict(self.decoding)}, indent=2) + "\n")

    def sampler(self, observation: Mapping[str, Any], **arguments: Any) -> TabularSampler:
        """Return a sampler that writes a batch of texts (see `Actor.sampler`)."""
        return TabularSampler(self, observation, **arguments)

    def evaluate_actions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        columns: Tensor,
        handoffs: Tensor | None = None,
        states_only: Tensor | None = None,
        values_of: Continuation | None = "policy",
    ) -> Evaluation:
        """Evaluate tokens (see `Policy.evaluate_actions`).

        Raises:
            ValueError: A column without a valid token, or with none before it; a hand-off.
        """
        if handoffs is not None and handoffs.any():
            raise ValueError("handoffs must be None or False everywhere: a TabularPolicy cannot hand off")
        there = columns.clamp(min=0)
        if not (attention_mask.gather(1, there).bool() | (columns < 0)).all():
            raise ValueError("columns must hold -1 or columns of valid tokens that have a valid token before them")
        states = self._states_before(input_ids, attention_mask, columns)
        log_probs = at_least_float32(self.logits[states]).log_softmax(-1)
        chosen = log_probs.gather(2, input_ids.gather(1, there)[:, :, None]).squeeze(2)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        given = columns >= 0
        decided = given if states_only is None else given & ~states_only
        values = torch.zeros_like(chosen) if values_of is None else self._values_of(states, given, values_of)
        return Evaluation(torch.where(decided, chosen, 0), torch.where(decided, entropy, 0), values)

    def values(self, input_ids: Tensor, attention_mask: Tensor, columns: Tensor, of: Continuation = "policy") -> Tensor:
        """Values of states (see `Policy.values`).

        Raises:
            ValueError: A column with no valid token before it.
        """
        return self._values_of(self._states_before(input_ids, attention_mask, columns), columns >= 0, of)

    @torch.no_grad()
    def shift_values(self, of: Continuation, shift: float) -> None:
        """Move a table of values (see `Policy.shift_values`)."""
        self._table(of).add_(shift)

    @torch.no_grad()
    def copy_values(self, to: Continuation) -> None:
        """Copy the other table of values (see `Policy.copy_values`)."""
        self._table(to).copy_(self._table("guide" if to == "policy" else "policy"))

    def _table(self, of: Continuation) -> nn.Parameter:
        return self.value_table if of == "policy" else self.guide_value_table

    def _values_of(self, states: Tensor, mask: Tensor, of: Continuation) -> Tensor:
        """The values of states, zero outside of `mask`."""
        return torch.where(mask, at_least_float32(self._table(of))[states], 0)

    def _states_before(self, input_ids: Tensor, attention_mask: Tensor, columns: Tensor) -> Tensor:
        """The state made of all valid tokens before each column; any state where there is no column."""
        valid = attention_mask.bool()
        before = nn.functional.pad(valid.cumsum(1), (1, 0)).gather(1, columns.clamp(min=0))
        if not ((before > 0) | (columns < 0)).all():
            raise ValueError("columns must hold -1 or columns that have a valid token before them")
        return self.states(left_packed(input_ids, valid)).gather(1, before)


class TabularSampler:
    """The `textgym.sampling.TokenSampler` of a `TabularPolicy`, made from the arguments of `Actor.sampler`."""

    def __init__(
        self,
        policy: TabularPolicy,
        observation: Mapping[str, Any],
        *,
        seeds: Any,
        max_new_tokens: Any,
        prefix_lengths: Any = None,
        decoding: Decoding | None = None,
        values: bool = True,
        entropies: bool = False,
    ) -> None:
        self.policy, self.decoding = policy, decoding or policy.decoding
        self._with_values, self._with_entropies = values, entropies
        ids = torch.as_tensor(observation["input_ids"], device=policy.device).long()
        valid = torch.as_tensor(observation["attention_mask"], device=policy.device).bool()
        self._lengths = valid.sum(1)
        self.rows = self._lengths.nonzero().squeeze(1).cpu().numpy()
        prefix = np.broadcast_to(0 if prefix_lengths is None else np.asarray(prefix_lengths), len(ids))
        self._steps, self._step = max(int((np.asarray(max_new_tokens) - prefix).max(initial=0)), 0), 0
        counters = prefix[:, None] + np.arange(self._steps)
        self._uniforms = torch.from_numpy(uniform(np.asarray(seeds)[:, None], counters)).to(policy.device)
        self._eos_banned = torch.from_numpy(counters < self.decoding.min_new_tokens).to(policy.device)
        self._texts = nn.functional.pad(left_packed(ids, valid), (0, self._steps))

    @torch.no_grad()
    def sample(self) -> Sample:
        """Choose the next token of every row in `rows`.

        Raises:
            ValueError: No row is left, or every text already has `max_new_tokens` tokens.
        """
        if not len(self.rows):
            raise ValueError("TabularSampler.sample() needs a row to write, and all rows have left the batch")
        if self._step == self._steps:
            raise ValueError(f"TabularSampler.sample() was called more than max_new_tokens (here {self._steps}) times")
        rows = torch.from_numpy(self.rows).to(self._lengths.device)
        policy, lengths = self.policy, self._lengths[rows]
        states = policy.states(self._texts[rows]).gather(1, lengths[:, None]).squeeze(1)
        logits = at_least_float32(policy.logits[states])
        scores = logits.clone()
        ends = list(policy.end_token_ids)
        scores[:, ends] = scores[:, ends].masked_fill(self._eos_banned[rows, self._step, None], -math.inf)
        tokens = choose(scores, self._uniforms[rows, self._step], self.decoding)
        every = logits.log_softmax(-1)
        log_probs = every.gather(1, tokens[:, None]).squeeze(1)
        self._texts[rows, lengths] = tokens
        self._lengths[rows] += 1
        self._step += 1
        values = at_least_float32(policy.value_table[states]) if self._with_values else None
        entropies = -(every.exp() * every).sum(-1) if self._with_entropies else None
        return Sample(tokens, log_probs, values, entropies)

    def keep(self, mask: np.ndarray) -> None:
        """Leave only those of `rows` in the batch where `mask`, bool (n,), is True."""
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != self.rows.shape:
            raise ValueError(f"mask must be bool of shape {self.rows.shape}, got {mask.dtype} of shape {mask.shape}")
        self.rows = self.rows[mask]


def _lock_states(lock: CombinationLock, ids: Tensor) -> Tensor:
    """The states of a lock, whose prompt is one token: before and after it the text is empty."""
    return nn.functional.pad(lock.states(ids[:, 1:]), (1, 0))
