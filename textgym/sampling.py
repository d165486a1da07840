"""Sampling from language models of transformers: one cached pass per token over the rows still being written."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pad
from torch.special import entr
from transformers import PreTrainedModel

from textgym.caches import PackedCache, PaddedCache
from textgym.checks import check
from textgym.decoding import Decoding
from textgym.packing import can_pack, head
from textgym.positions import check_positions
from textgym.precision import Autocast, at_least_float32
from textgym.seeding import uniform
from textgym.seq2seq import Seq2SeqCache, decoder_start

# A nucleus is looked for among this many most probable tokens; all are ranked only for rows where it is wider.
_NUCLEUS_GUESS = 256
# Below it scores are divided as distances from the largest, in float64.
_LOW_TEMPERATURE = 1e-20
# Tokens of a block in which the token that a uniform number means is looked for.
_BLOCK = 128


class Sample(NamedTuple):
    """The next token of each of n rows.

    Attributes:
        tokens: (n,) int64; with a hand-off head, `vocab_size` (or the number of logits) is the hand-off.
        log_probs: (n,) float32, log-probabilities under the untruncated distribution at temperature 1, whatever the
            decoding: the probability ratios of policy gradients are ratios of the policy's own distribution.
        values: (n,) float32, values of the states in which the tokens were chosen; None without a value head.
        entropies: (n,) float32, of the untruncated distributions of tokens, in nats; None unless asked for.

    Tokens found by beam search have NaN for log-probabilities.
    """

    tokens: Tensor
    log_probs: Tensor
    values: Tensor | None
    entropies: Tensor | None = None


class TokenSampler(Protocol):
    """Chooses the next token of every row of a batch, call after call.

    Attributes:
        rows: (n,) int64 array, indices into the given rows of those still in the batch, in the order of samples.
    """

    rows: np.ndarray

    def sample(self) -> Sample:
        """Choose the next token of every row in `rows`."""

    def keep(self, mask: np.ndarray) -> None:
        """Remove rows from the batch.

        Args:
            mask: (n,) bool, which of `rows` stay. Their order can change.
        """


class Sampler:
    """Samples from a language model with a cache, one token per row and call; finished rows leave the batch.

    Token h of a row is drawn by inverse CDF with the uniform number that belongs to (seed of the row, h), so a row gets
    the same text alone or in any batch. Rows without a valid token (idle rows of an environment) never enter. Equal
    prompts are read once.

    Args:
        model: A language model; a sequence-to-sequence one reads the prompt in its encoder.
        input_ids: (N, S) integers; valid tokens of a row may have padding on both sides (an observation).
        attention_mask: (N, S), nonzero where `input_ids` is valid.
        decoding: How tokens are chosen.
        seeds: (N,) integers.
        eos_token_id: The token that ends a text, or several; not chosen before `decoding.min_new_tokens`.
        prefix_lengths: (N,) new tokens that `input_ids` already holds; None for none.
        max_new_tokens: Most new tokens of a text, prefix included: an int, or (N,) integers.
        value_head: Maps hidden states (n, d) to values (n, 1).
        handoff_head: Maps hidden states (n, d) to the log-odds (n, 1) of a hand-off, which is drawn before the token,
            from a separate uniform number; a row that hands off must leave the batch.
        vocab_size: Token ids from here on are never chosen (embedding rows beyond the tokenizer's); None for all. The
            tokenizer can also have more tokens than the model has rows; these are never chosen either.
        unused_ids: Smaller token ids that are never chosen: gaps of the vocabulary.
        dtype: Precision of matrix products, by autocast; None for the type of the weights.
        entropies: Whether samples hold entropies.

    Raises:
        ValueError: Shapes that do not agree, or texts longer than the model has positions.
    """

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
        entropies: bool = False,
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
        self.value_head, self.handoff_head, self.with_entropies = value_head, handoff_head, entropies
        logits = model.get_output_embeddings().weight.shape[0]
        self.vocab_size = logits if vocab_size is None else vocab_size
        unused = [token for token in unused_ids if token < logits]
        self._unused = torch.tensor(unused, dtype=torch.int64, device=model.device)
        self._ends = [token for token in self.eos_token_ids if 0 <= token < min(logits, self.vocab_size)]
        self.rows = np.flatnonzero(lengths > 0)
        self._texts = [texts[row] for row in self.rows]
        self._prefix, self._remaining = prefix, remaining
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
        self._check_not_over()
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
        entropies = entr(logits.softmax(-1)).sum(-1) if self.with_entropies else None
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
        return Sample(tokens, log_probs, values, entropies)

    def _check_not_over(self) -> None:
        name = type(self).__name__
        if not len(self.rows):
            raise ValueError(f"{name}.sample() needs a row to write, and all rows have left the batch")
        if self._step == self._steps:
            raise ValueError(f"{name}.sample() was called more than max_new_tokens (here {self._steps}) times")

    def keep(self, mask: np.ndarray) -> None:
        """Remove rows from the batch (see `TokenSampler`); the last rows that stay move into the free places."""
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


def as_ids(token_ids: int | Sequence[int]) -> tuple[int, ...]:
    """One token id, or several, as a tuple."""
    return (int(token_ids),) if isinstance(token_ids, int | np.integer) else tuple(token_ids)


def choose(scores: Tensor, uniforms: Tensor, decoding: Decoding, weights: Tensor | None = None) -> Tensor:
    """Choose one token per row.

    Args:
        scores: (n, V) float32 logits; -inf marks tokens that cannot be chosen.
        uniforms: (n,) float64 in [0, 1).
        decoding: How to choose; its `min_new_tokens` is left to the caller.
        weights: (n, V) float32, probabilities up to a factor per row, if known.

    Returns:
        (n,) int64.

    Raises:
        ValueError: A decoding with beams, which do not choose single tokens.
    """
    beams = decoding.num_beams
    check("Decoding.num_beams", beams, beams == 1, "1 where single tokens are chosen")
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

    The nucleus is the smallest set of most probable tokens whose total probability reaches `top_p`; of tokens with
    equal scores at its border, those with the smallest ids belong to it.

    Args:
        scores: (n, k) float32 logits.
        top_p: Least total probability of a nucleus.

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
    # Strictly below the total, and searched from the right: an entry without probability adds nothing to the sum, so it
    # is never the first to exceed the threshold.
    total = cumulative[:, -1:]
    thresholds = torch.minimum(thresholds, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(cumulative, thresholds, right=True)
    return index, thresholds - pad(cumulative, (1, 0)).gather(1, index)


def on_host(array: Any) -> np.ndarray:
    """An array or tensor as an array."""
    return array.cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
