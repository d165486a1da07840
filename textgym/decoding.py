"""Sampling from language models of transformers: one cached pass per token over the rows still being written."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import is_bitsandbytes_available, is_gguf_available, is_peft_available

from textgym.hub import file_beside
from textgym.packing import Autocast, PackedCache, PaddedCache, can_pack, fuse_activations, head
from textgym.positions import check_positions, with_positions_alike
from textgym.seeding import uniform
from textgym.seq2seq import Seq2SeqCache, decoder_start

# A nucleus is looked for among this many most probable tokens; all are ranked only for rows where it is wider.
_NUCLEUS_GUESS = 256
# Below it scores are divided as distances from the largest, in float64.
_LOW_TEMPERATURE = 1e-20
# Tokens of a block in which the token that a uniform number means is looked for.
_BLOCK = 128


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen from a model's distribution.

    Truncation is applied in the order of transformers: temperature, top-k, then top-p inside the top k.

    Attributes:
        temperature: Logits are divided by it.
        top_k: Only the k most probable tokens can be chosen; 0 allows all.
        top_p: Only the smallest set of most probable tokens whose probability reaches it can be chosen (nucleus
            sampling, Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration"); at least one token.
        min_new_tokens: No token that ends a text can be chosen before it has that many new tokens, a prefix counted.
        greedy: Always choose the most probable token.
        num_beams: More than 1 searches for a probable text with so many beams instead of drawing one (see
            `BeamSearch`): for evaluations, `generate` and guides. What is learned from must be sampled.

    Raises:
        ValueError: A value outside its range, or beams together with what only drawing knows.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_new_tokens: int = 0
    greedy: bool = False
    num_beams: int = 1

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 < self.temperature < math.inf):
            raise ValueError(f"Decoding.temperature must be a finite number > 0, got {self.temperature!r}")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"Decoding.top_p must be a number with 0 < top_p <= 1, got {self.top_p!r}")
        for name in ("top_k", "min_new_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"Decoding.{name} must be an int >= 0, got {value!r}")
        if not isinstance(self.greedy, bool):
            raise ValueError(f"Decoding.greedy must be True or False, got {self.greedy!r}")
        if isinstance(self.num_beams, bool) or not isinstance(self.num_beams, int) or self.num_beams < 1:
            raise ValueError(f"Decoding.num_beams must be an int >= 1, got {self.num_beams!r}")
        if self.num_beams > 1 and (self.temperature, self.top_k, self.top_p, self.greedy) != (1, 0, 1, False):
            raise ValueError(
                f"Decoding.num_beams must be 1 with temperature, top_k, top_p or greedy, got {self.num_beams}: beams "
                "search among all tokens, and draw none"
            )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Sample(NamedTuple):
    """The next token of each of n rows.

    Attributes:
        tokens: (n,) int64; with a hand-off head, `vocab_size` (or the number of logits) is the hand-off.
        log_probs: (n,) float32, log-probabilities under the untruncated distribution at temperature 1, whatever the
            decoding: the probability ratios of policy gradients are ratios of the policy's own distribution.
        values: (n,) float32, values of the states in which the tokens were chosen; None without a value head.

    Tokens of a `BeamSearch` have NaN for log-probabilities.
    """

    tokens: Tensor
    log_probs: Tensor
    values: Tensor | None


class Sampler:
    """Cached sampling, one token for every row a call, from which finished rows leave.

    Token h of a row is drawn by inverse CDF with the uniform number that belongs to (seed of the row, h), so a row is
    the same text alone or in any batch. Rows without a single valid token (idle rows of an environment) never enter.
    Equal prompts are read once.

    Args:
        model: A language model; a sequence-to-sequence one reads the prompt in its encoder.
        input_ids: (N, S) integers; valid tokens of a row may have padding on both sides (an observation).
        attention_mask: (N, S), nonzero where `input_ids` is valid.
        decoding: How tokens are chosen.
        seeds: (N,) integers.
        eos_token_id: The token that ends a text, or all that do; held back for `decoding.min_new_tokens`.
        prefix_lengths: (N,) new tokens that `input_ids` already holds; None for none.
        max_new_tokens: Most new tokens of a text, prefix included: an int, or (N,) integers.
        value_head: Maps hidden states (n, d) to values (n, 1).
        handoff_head: Maps hidden states (n, d) to the log-odds (n, 1) of a hand-off, which is drawn before the token,
            from a uniform number of its own; a row that chose it must leave the batch.
        vocab_size: Token ids from here on are never chosen (embedding rows beyond the tokenizer's); None for all. The
            tokenizer can also have more tokens than the model has rows; these are never chosen either.
        unused_ids: Token ids below that are never chosen: gaps of the vocabulary.
        dtype: What products of matrices are computed in, by autocast; None for the type of the weights.

    Attributes:
        rows: (n,) int64 array, indices into the N given rows of those still in the batch, in the order of samples.

    Raises:
        ValueError: Shapes that do not agree, or texts longer than the model has positions.
    """

    rows: np.ndarray

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Any,
        attention_mask: Any,
        *,
        decoding: Decoding,
        seeds: Any,
        eos_token_id: int | Sequence[int],
        prefix_lengths: Any = None,
        max_new_tokens: int | Sequence[int] | np.ndarray,
        value_head: nn.Module | None = None,
        handoff_head: nn.Module | None = None,
        vocab_size: int | None = None,
        unused_ids: Sequence[int] = (),
        dtype: torch.dtype | None = None,
    ) -> None:
        ids, valid = on_host(input_ids), on_host(attention_mask) != 0
        if ids.ndim != 2 or ids.shape != valid.shape:
            raise ValueError(
                "input_ids and attention_mask must both have shape (rows, columns), "
                f"got {tuple(ids.shape)} and {tuple(valid.shape)}"
            )
        per_row = {
            "seeds": np.asarray(seeds),
            "prefix_lengths": np.asarray(0 if prefix_lengths is None else prefix_lengths),
            "max_new_tokens": np.asarray(max_new_tokens),
        }
        for name, array in per_row.items():
            if array.shape != (len(ids),) and (array.shape or name == "seeds"):
                raise ValueError(f"{name} must have one entry for each of {len(ids)} rows, got shape {array.shape}")
        prefix = np.broadcast_to(per_row["prefix_lengths"], len(ids))
        remaining = np.broadcast_to(per_row["max_new_tokens"], len(ids)) - prefix
        lengths, texts = valid.sum(1), [row[here] for row, here in zip(ids, valid, strict=True)]
        self._cache_class: Any = PackedCache if can_pack(model) else PaddedCache
        if model.config.is_encoder_decoder:
            lengths = lengths - prefix
            texts = [(text[:prompt], text[prompt:]) for text, prompt in zip(texts, lengths, strict=True)]
            self._cache_class = Seq2SeqCache
            new = len(decoder_start(model)) + (prefix + remaining).max(initial=0)
            check_positions(model, max(lengths.max(initial=0), new))
        else:
            check_positions(model, (lengths + remaining).max(initial=0))

        self.model, self.decoding, self.eos_token_ids = model, decoding, as_ids(eos_token_id)
        self.value_head, self.handoff_head = value_head, handoff_head
        logits = model.get_output_embeddings().weight.shape[0]
        self.vocab_size = logits if vocab_size is None else vocab_size
        unused = [token for token in unused_ids if token < logits]
        self._unused = torch.tensor(unused, dtype=torch.int64, device=model.device)
        self._ends = [token for token in self.eos_token_ids if 0 <= token < min(logits, self.vocab_size)]
        self.rows = np.flatnonzero(lengths > 0)
        self._texts = [texts[row] for row in self.rows]
        self._steps, self._step = max(int(remaining.max(initial=0)), 0), 0
        counters = prefix[self.rows, None] + np.arange(self._steps)
        row_seeds = per_row["seeds"][self.rows, None]
        self._uniforms = torch.from_numpy(uniform(row_seeds, counters)).to(model.device)
        self._gate_uniforms = None
        if handoff_head is not None:
            self._gate_uniforms = torch.from_numpy(uniform(row_seeds, counters, 1)).to(model.device)
        self._eos_banned = None
        if decoding.min_new_tokens > 0:
            self._eos_banned = torch.from_numpy(counters < decoding.min_new_tokens).to(model.device)
        self._autocast = Autocast(model, dtype)
        self._cache: Any = None
        self._last: Any = None

    @torch.no_grad()
    def sample(self) -> Sample:
        """Choose the next token of every row in `rows`.

        Raises:
            ValueError: No row is left, or every text already has `max_new_tokens` tokens.
        """
        self._check_asked()
        with self._autocast:
            if self._cache is None:
                # Only now, because rows may leave before anything is read.
                self._cache = self._cache_class(self.model, self._texts, self._steps)
                hidden = self._cache.prefill()
            else:
                hidden = self._cache.step(self._last)
            logits = head(self.model, hidden)
        logits, hidden = at_least_float32(logits), at_least_float32(hidden)
        values = None if self.value_head is None else self.value_head(hidden).squeeze(-1)
        scores = logits[:, : self.vocab_size]
        left_out = [logits[:, scores.shape[1] :].logsumexp(-1)]
        if len(self._unused):
            left_out.append(scores[:, self._unused].logsumexp(-1))
            scores[:, self._unused] = -math.inf
        if self._eos_banned is not None:
            banned = self._eos_banned[:, self._step]
            for end in self._ends:
                end_scores = scores[:, end]
                left_out.append(end_scores.masked_fill(~banned, -math.inf))
                end_scores.masked_fill_(banned, -math.inf)
        weights, peaks = _weights(scores)
        # Log-probabilities are those of the whole softmax.
        normalizers = functools.reduce(torch.logaddexp, left_out, weights.sum(-1).log() + peaks)
        tokens = self._last = choose(scores, self._uniforms[:, self._step], self.decoding, weights)
        log_probs = logits.gather(1, tokens[:, None]).squeeze(1) - normalizers
        if self.handoff_head is not None and self._gate_uniforms is not None:
            gate = self.handoff_head(hidden).squeeze(-1)
            log_probs = log_probs + logsigmoid(-gate)
            if self.decoding.greedy:
                handed = logsigmoid(gate) > log_probs
            else:
                handed = self._gate_uniforms[:, self._step] < gate.double().sigmoid()
            log_probs = torch.where(handed, logsigmoid(gate), log_probs)
            tokens = tokens.masked_fill(handed, self.vocab_size)
        self._step += 1
        return Sample(tokens, log_probs, values)

    def _check_asked(self) -> None:
        name = type(self).__name__
        if not len(self.rows):
            raise ValueError(f"{name}.sample() needs a row to write, and all rows have left the batch")
        if self._step == self._steps:
            raise ValueError(f"{name}.sample() was called more than max_new_tokens (here {self._steps}) times")

    def keep(self, mask: np.ndarray) -> None:
        """Let rows leave the batch; the last rows that stay move into their places.

        Args:
            mask: (n,) bool, which of `rows` go on; the next `sample` continues these.
        """
        mask = np.asarray(mask)
        if mask.dtype != np.bool_ or mask.shape != self.rows.shape:
            raise ValueError(f"mask must be bool of shape {self.rows.shape}, got {mask.dtype} of shape {mask.shape}")
        if mask.all():
            return
        count = np.count_nonzero(mask)
        order, moved = np.arange(count), np.flatnonzero(~mask[:count])
        order[moved] = count + np.flatnonzero(mask[count:])
        self.rows = self.rows[order]
        device_order = torch.from_numpy(order).to(self._uniforms.device)
        self._uniforms = self._uniforms[device_order]
        self._gate_uniforms = None if self._gate_uniforms is None else self._gate_uniforms[device_order]
        self._eos_banned = None if self._eos_banned is None else self._eos_banned[device_order]
        if self._cache is None:
            self._texts = [self._texts[row] for row in order]
        else:
            self._last = self._last[device_order]
            self._cache.keep(device_order, torch.from_numpy(moved).to(device_order.device))


class BeamSearch(Sampler):
    """Beam search, told a token at a time: whole texts are found when the first tokens are asked for.

    The search is `generate` of transformers: it ends when `num_beams` texts are finished or the limit is reached, and
    keeps the text whose log-probability, divided by its length, is the highest. Settings of generation that a model
    brings along are not used.

    Args:
        model: As for `Sampler`, as are the arguments not named here.
        input_ids: (N, S) integers.
        attention_mask: (N, S), nonzero where `input_ids` is valid.
        decoding: Its `num_beams` and `min_new_tokens` are used.
        prefix_lengths: (N,) new tokens that `input_ids` already holds; None for none.
        max_new_tokens: Most new tokens of a text, prefix included: an int, or (N,) integers.
        **arguments: As for `Sampler`.

    Raises:
        ValueError: A value head or a head for hand-offs, which do not take part in a search; or as for `Sampler`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Any,
        attention_mask: Any,
        *,
        decoding: Decoding,
        prefix_lengths: Any = None,
        max_new_tokens: int | Sequence[int] | np.ndarray,
        **arguments: Any,
    ) -> None:
        if arguments.get("value_head") is not None or arguments.get("handoff_head") is not None:
            raise ValueError(
                "num_beams must be 1 where values are recorded or a policy can hand off: a search with beams is for "
                "evaluations and for generate, what is learned from must be sampled"
            )
        super().__init__(
            model,
            input_ids,
            attention_mask,
            decoding=decoding,
            prefix_lengths=prefix_lengths,
            max_new_tokens=max_new_tokens,
            **arguments,
        )
        count = len(on_host(input_ids))
        self._prefix = np.broadcast_to(0 if prefix_lengths is None else np.asarray(prefix_lengths), count)
        self._limits = np.broadcast_to(np.asarray(max_new_tokens), count) - self._prefix
        self._found: dict[int, list[int]] | None = None

    def sample(self) -> Sample:
        """The next token of every row in `rows` (EOS after its text is over).

        Raises:
            ValueError: No row is left, or every text already has `max_new_tokens` tokens.
        """
        self._check_asked()
        if self._found is None:
            self._found = self._search()
        texts = [self._found[row] for row in self.rows.tolist()]
        filler = self.eos_token_ids[0] if self.eos_token_ids else 0
        tokens = [text[self._step] if self._step < len(text) else filler for text in texts]
        self._step += 1
        unknown = torch.full((len(texts),), math.nan, device=self.model.device)
        return Sample(torch.tensor(tokens, device=self.model.device), unknown, None)

    def _search(self) -> dict[int, list[int]]:
        """What to write in each of `rows`; rows that have as much to write are searched together."""
        seq2seq = self.model.config.is_encoder_decoder
        groups: dict[tuple[int, int, int], list[tuple[int, Any]]] = {}
        for row, text in zip(self.rows.tolist(), self._texts, strict=True):
            limit = int(self._limits[row])
            least = min(max(self.decoding.min_new_tokens - int(self._prefix[row]), 0), limit)
            groups.setdefault((limit, least, len(text[1]) if seq2seq else 0), []).append((row, text))
        found: dict[int, list[int]] = {}
        for (limit, least, _), members in groups.items():
            rows, texts = zip(*members, strict=True)
            written = self._generate([text[0] for text in texts] if seq2seq else texts, texts, limit, least)
            found |= dict(zip(rows, written, strict=True))
        return found

    def _generate(self, contexts: Any, texts: Any, limit: int, least: int) -> list[list[int]]:
        model: Any = self.model
        if limit < 1:
            return [[] for _ in texts]
        seq2seq = model.config.is_encoder_decoder
        width = max(map(len, contexts))
        ids, mask = np.zeros((2, len(contexts), width), np.int64)
        for row, context in enumerate(contexts):
            where = slice(len(context)) if seq2seq else slice(width - len(context), None)
            ids[row, where], mask[row, where] = context, 1
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if seq2seq:
            start = decoder_start(model)
            inputs["decoder_input_ids"] = np.array([[*start, *new] for _, new in texts], np.int64)
        ends = [token for token in self.eos_token_ids if token >= 0]
        never = [*self._unused.tolist(), *range(self.vocab_size, model.get_output_embeddings().weight.shape[0])]
        usual, model.generation_config = model.generation_config, GenerationConfig()
        try:
            with self._autocast:
                written = model.generate(
                    **{name: torch.from_numpy(array).to(model.device) for name, array in inputs.items()},
                    num_beams=self.decoding.num_beams,
                    do_sample=False,
                    max_new_tokens=limit,
                    min_new_tokens=least,
                    eos_token_id=ends or None,
                    pad_token_id=ends[0] if ends else 0,
                    decoder_start_token_id=start[0] if seq2seq else None,
                    suppress_tokens=never or None,
                )
        finally:
            model.generation_config = usual
        before = inputs["decoder_input_ids" if seq2seq else "input_ids"].shape[1]
        lines = written[:, before:].tolist()
        return [line[: next((i + 1 for i, token in enumerate(line) if token in ends), None)] for line in lines]


def generate(
    model: PreTrainedModel,
    input_ids: Any,
    attention_mask: Any,
    *,
    decoding: Decoding,
    seeds: Any,
    eos_token_id: int | Sequence[int],
    prefix_lengths: Any = None,
    max_new_tokens: int | Sequence[int] | np.ndarray,
    batch_size: int | None = None,
    vocab_size: int | None = None,
    unused_ids: Sequence[int] = (),
    dtype: torch.dtype | None = None,
) -> list[list[int]]:
    """Write every row to its end.

    Args:
        model: As for `Sampler`; so are the arguments not named here.
        input_ids: (N, S) integers.
        attention_mask: (N, S), nonzero where `input_ids` is valid.
        decoding: How tokens are chosen.
        seeds: (N,) integers.
        eos_token_id: A text ends with it, or with any of them.
        prefix_lengths: (N,) new tokens that `input_ids` already holds; None for none.
        max_new_tokens: Most new tokens of a text, prefix included: an int, or (N,) integers.
        batch_size: Most rows a pass; rows of similar length go together. None: all.
        vocab_size: Token ids from here on are never chosen.
        unused_ids: Nor are these.
        dtype: What products of matrices are computed in; None for the type of the weights.

    Returns:
        For each row the ids written now, EOS included where the text ended with it.

    Raises:
        ValueError: A row without a valid token, or what `Sampler` raises.
    """
    ids, valid, seeds = np.asarray(input_ids), np.asarray(attention_mask) != 0, np.asarray(seeds)
    lengths = valid.sum(1)
    if not lengths.all():
        raise ValueError(f"attention_mask must have a valid token in every row, row {int(lengths.argmin())} has none")
    prefix = np.broadcast_to(0 if prefix_lengths is None else np.asarray(prefix_lengths), len(ids))
    horizon = np.broadcast_to(np.asarray(max_new_tokens), len(ids))
    remaining = horizon - prefix
    texts: list[list[int]] = [[] for _ in ids]
    order = np.argsort(lengths, kind="stable")[::-1]
    for alike in with_positions_alike(model, lengths + remaining):
        rows = order[np.isin(order, alike)]
        for start in range(0, len(rows), batch_size or max(len(rows), 1)):
            batch = rows[start : start + (batch_size or len(rows))]
            sampler = sampler_class(decoding)(
                model,
                ids[batch],
                valid[batch],
                decoding=decoding,
                seeds=seeds[batch],
                eos_token_id=eos_token_id,
                prefix_lengths=prefix[batch],
                max_new_tokens=horizon[batch],
                vocab_size=vocab_size,
                unused_ids=unused_ids,
                dtype=dtype,
            )
            for row, text in zip(batch, write(sampler, remaining[batch], eos_token_id), strict=True):
                texts[row] = text
    return texts


def sampler_class(decoding: Decoding) -> type[Sampler]:
    """What writes texts as a decoding says."""
    return BeamSearch if decoding.num_beams > 1 else Sampler


def as_ids(token_ids: int | Sequence[int]) -> tuple[int, ...]:
    """One token id, or several, as several."""
    return (int(token_ids),) if isinstance(token_ids, int | np.integer) else tuple(token_ids)


def write(sampler: Any, limits: np.ndarray, eos_token_id: int | Sequence[int]) -> list[list[int]]:
    """Write every row of a sampler to its end.

    Args:
        sampler: A `Sampler` of N rows, or anything with its `rows`, `sample` and `keep`.
        limits: (N,) integers, most tokens to write now.
        eos_token_id: A text ends with it, or with any of them.

    Returns:
        For each of the N rows the ids written now, EOS included where the text ended with it.
    """
    written = np.full((len(limits), max(int(limits.max()), 0)), -1)
    step = 0
    sampler.keep(limits[sampler.rows] > 0)
    while len(sampler.rows):
        tokens = sampler.sample().tokens.cpu().numpy()
        written[sampler.rows, step] = tokens
        step += 1
        sampler.keep(~np.isin(tokens, as_ids(eos_token_id)) & (limits[sampler.rows] > step))
    return [line[line >= 0].tolist() for line in written]


def choose(scores: Tensor, uniforms: Tensor, decoding: Decoding, weights: Tensor | None = None) -> Tensor:
    """Choose one token a row.

    Args:
        scores: (n, V) float32 logits; -inf marks tokens that cannot be chosen.
        uniforms: (n,) float64 in [0, 1).
        decoding: How to choose; its `min_new_tokens` is the caller's business.
        weights: (n, V) float32, each row's probabilities by a factor, where they are known; None for unknown.

    Returns:
        (n,) int64.

    Raises:
        ValueError: A decoding with beams, which are no choice of one token.
    """
    if decoding.num_beams > 1:
        raise ValueError(f"Decoding.num_beams must be 1 where single tokens are chosen, got {decoding.num_beams}")
    if decoding.greedy:
        return scores.argmax(-1)
    if weights is not None and decoding.temperature == 1 and not decoding.top_k and decoding.top_p == 1:
        return _inverse_cdf(weights, uniforms)
    if decoding.temperature != 1:
        if decoding.temperature < _LOW_TEMPERATURE:  # quotients would leave the range of float32
            below_largest = (scores - scores.amax(-1, keepdim=True)).double()
            scores = (below_largest / decoding.temperature).to(scores.dtype)
        else:
            scores = scores / decoding.temperature
    ids = None
    if decoding.top_k:
        # In the order of ids, not of ranks: rounding that differs between batch sizes can swap the ranks of near ties.
        ids = scores.topk(min(decoding.top_k, scores.shape[-1])).indices.sort(-1).values
        scores = scores.gather(1, ids)
    if decoding.top_p < 1:
        scores = nucleus(scores, decoding.top_p)
    chosen = _inverse_cdf(_weights(scores)[0], uniforms)
    return chosen if ids is None else ids.gather(1, chosen[:, None]).squeeze(1)


def nucleus(scores: Tensor, top_p: float) -> Tensor:
    """Set the scores outside each row's nucleus to -inf.

    The nucleus is the smallest set of most probable tokens whose probability reaches `top_p`; of tokens with equal
    scores at its border the first ids belong to it.

    Args:
        scores: (n, k) float32 logits.
        top_p: Probability that a nucleus reaches.

    Returns:
        (n, k).
    """
    normalizers = scores.logsumexp(-1, keepdim=True)

    def border(ranked: Tensor, normalizers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The lowest score in each nucleus, how many tokens with it belong there, and whether there are more of them.

        Returns:
            (n, 1) each; that there are more is also said where the last of the ranked has that score.
        """
        probs = (ranked - normalizers).exp()
        more_probable = probs.cumsum(-1) - probs
        size = (more_probable < top_p).sum(-1, keepdim=True).clamp_(min=1)
        lowest = ranked.gather(1, size - 1)
        more = ranked.gather(1, size.clamp(max=ranked.shape[-1] - 1)) == lowest
        return lowest, size - (ranked > lowest).sum(-1, keepdim=True), more

    ranked = scores.topk(min(_NUCLEUS_GUESS, scores.shape[-1])).values
    lowest, count, more = border(ranked, normalizers)
    wider = (ranked - normalizers).exp().sum(-1) <= top_p
    if ranked.shape != scores.shape and wider.any():
        lowest[wider], count[wider], more[wider] = border(
            scores[wider].sort(descending=True).values, normalizers[wider]
        )
    outside = scores < lowest
    if more.any():
        equal = scores == lowest
        outside |= equal & (equal.cumsum(-1) > count)
    return scores.masked_fill(outside, -math.inf)


def _weights(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Exponentials of scores (n, V) less each row's largest, and the largest (n,)."""
    peaks = scores.amax(-1, keepdim=True)
    return (scores - peaks).exp_(), peaks.squeeze(1)


def _inverse_cdf(weights: Tensor, uniforms: Tensor) -> Tensor:
    """The first index of each row whose share of the row's running sum exceeds the uniform number; (n,) int64."""
    # First the block, then the token in it: running sums are in float64, because in float32 the sum over a large
    # vocabulary swallows its rare tokens, and over the whole vocabulary they would take longer than all else here.
    blocks = pad(weights, (0, -weights.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    cumulative = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    block, rest = _first_above(cumulative, uniforms[:, None] * cumulative[:, -1:])
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, _BLOCK)).squeeze(1).cumsum(-1, dtype=torch.float64)
    return (block * _BLOCK + _first_above(inside, rest)[0]).squeeze(1)


def _first_above(cumulative: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """The first index of each row whose running sum exceeds a threshold, and how far the threshold goes into it."""
    # Strictly below the total, and searched from the right: what has no probability adds nothing to the sum, so it is
    # never the first to exceed the threshold.
    total = cumulative[:, -1:]
    thresholds = torch.minimum(thresholds, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, thresholds, right=True)
    return index, thresholds - pad(cumulative, (1, 0)).gather(1, index)


def on_host(array: Any) -> np.ndarray:
    """An array or tensor as an array."""
    return array.cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Widen half precision, in which sums over a vocabulary lose too much; float64 stays what it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def load_model(
    path: str | os.PathLike,
    *,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    quantization: Literal["4bit"] | None = None,
    gguf_file: str | None = None,
) -> PreTrainedModel:
    """Load a language model for use without dropout, a causal or a sequence-to-sequence one as its config says.

    Args:
        path: Hub id or folder with safetensors weights, or with PEFT adapters, which are put on the model that they
            name.
        device: "auto" is CUDA where there is one, else CPU.
        dtype: Type of the weights; with `quantization`, of what is computed with them.
        quantization: "4bit" keeps the weights of linear layers in 4 bits (NF4, Dettmers et al. 2023, arXiv 2305.14314),
            by bitsandbytes.
        gguf_file: A GGUF file in that folder, to be read instead; its weights are unpacked.

    Raises:
        ImportError: What adapters, quantised weights or GGUF files need is not installed.
        ValueError: There is no such model, or it has no safetensors weights.
    """
    target = resolve_device(device)
    adapters = file_beside(path, "adapter_config.json")
    if adapters is not None and not is_peft_available():
        raise ImportError(f'the adapters in {str(path)!r} need peft: pip install "textgym[peft]"')
    if gguf_file is not None and not is_gguf_available():
        raise ImportError('gguf_file needs gguf: pip install "textgym[gguf]"')
    base, arguments = path, {"trust_remote_code": False, **({} if gguf_file is None else {"gguf_file": gguf_file})}
    if adapters is not None and file_beside(path, "config.json") is None:
        base = json.loads(Path(adapters).read_text())["base_model_name_or_path"]
    try:
        config = AutoConfig.from_pretrained(str(base), **arguments)
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        if gguf_file is None:
            arguments["use_safetensors"] = True
        else:
            arguments["config"] = config  # to read a large vocabulary from such a file again takes many seconds
        if quantization is not None:
            arguments |= {"quantization_config": _quantization(quantization, dtype), "device_map": {"": target}}
        model = kind.from_pretrained(str(path), dtype=dtype, **arguments)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model {str(path)!r} must be a hub id or a folder of a causal or sequence-to-sequence language model with "
            f"safetensors weights: {error}"
        ) from error
    fuse_activations(model)
    if gguf_file is not None:  # its weights are unpacked: an ordinary model, that can be saved as one
        model.__dict__.pop("hf_quantizer", None)
        model.config.__dict__.pop("quantization_config", None)
    if quantization is not None:
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):  # a layout of weights without gradients
                layer.support_avx512bf16_for_cpu = False
        return model.eval()
    if target.type == "cpu":
        # Weights mapped from a file lie at odd addresses, where matrix products can round differently: a policy that
        # was saved and loaded would not be the same to the last bit.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    module: Any = model.eval()  # transformers wraps `to` in a way that type checkers misread
    return module.to(target)


def _quantization(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    if quantization != "4bit":
        raise ValueError(f'quantization must be None or "4bit", got {quantization!r}')
    if not is_bitsandbytes_available():
        raise ImportError('quantization needs bitsandbytes: pip install "textgym[quantization]"')
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def resolve_device(device: str | torch.device) -> torch.device:
    """Read a device argument; "auto" is CUDA where there is one, else CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and (rank := os.environ.get("LOCAL_RANK")):  # each process of a machine has its own
            device = f"cuda:{int(rank) % torch.cuda.device_count()}"
    return torch.device(device)
