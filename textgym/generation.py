"""Whole texts from language models of transformers, sampled or found by beam search."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from textgym.decoding import Decoding
from textgym.positions import with_positions_alike
from textgym.sampling import Sample, Sampler, TokenSampler, as_ids
from textgym.seq2seq import decoder_start


class BeamSearch(Sampler):
    """Beam search as a sampler: the first call finds the whole texts, and every call returns their next tokens.

    The search is `generate` of transformers: it ends when `num_beams` texts are finished or the limit is reached, and
    keeps the text with the highest log-probability per token. The model's own generation config is not used.

    Args:
        *arguments: As for `Sampler`, as are the others.
        **named: Of `decoding`, only `num_beams` and `min_new_tokens` matter.

    Raises:
        ValueError: A value head, a head for hand-offs or entropies, which take no part in a search; or as for
            `Sampler`.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        if self.value_head is not None or self.handoff_head is not None or self.with_entropies:
            raise ValueError(
                "num_beams must be 1 where values or entropies are recorded or a policy can hand off: beam search is "
                "for evaluations and generate, training needs samples"
            )
        self._found: dict[int, list[int]] | None = None

    def sample(self) -> Sample:
        """Return the next token of every row in `rows` (EOS after its text is over).

        Raises:
            ValueError: No row is left, or every text already has `max_new_tokens` tokens.
        """
        self._check_not_over()
        if self._found is None:
            self._found = self._search()
        texts = [self._found[row] for row in self.rows.tolist()]
        filler = self.eos_token_ids[0] if self.eos_token_ids else 0
        tokens = [text[self._step] if self._step < len(text) else filler for text in texts]
        self._step += 1
        unknown = torch.full((len(texts),), math.nan, device=self.model.device)
        return Sample(torch.tensor(tokens, device=self.model.device), unknown, None)

    def _search(self) -> dict[int, list[int]]:
        """Find the text of each of `rows`; rows with the same limits are searched together."""
        seq2seq = self.model.config.is_encoder_decoder
        groups: dict[tuple[int, int, int], list[tuple[int, Any]]] = {}
        for row, text in zip(self.rows.tolist(), self._texts, strict=True):
            limit = int(self._remaining[row])
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


def sampler_class(decoding: Decoding) -> type[Sampler]:
    """The class that chooses tokens by a decoding."""
    return BeamSearch if decoding.num_beams > 1 else Sampler


def write(sampler: TokenSampler, limits: np.ndarray, eos_token_id: int | Sequence[int]) -> list[list[int]]:
    """Complete a text in every row of a sampler.

    Args:
        sampler: A sampler of N rows.
        limits: (N,) integers, most tokens to write.
        eos_token_id: The token that ends a text, or several.

    Returns:
        For each of the N rows the new token ids, with the token that ended the text.
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
    **arguments: Any,
) -> list[list[int]]:
    """Complete a text in every row.

    Args:
        model: The language model.
        input_ids: (N, S) integers.
        attention_mask: (N, S), nonzero where `input_ids` is valid.
        decoding: How tokens are chosen.
        seeds: (N,) integers.
        eos_token_id: The token that ends a text, or several.
        prefix_lengths: (N,) new tokens that `input_ids` already holds; None for none.
        max_new_tokens: Most new tokens of a text, prefix included: an int, or (N,) integers.
        batch_size: Most rows per batch; rows of similar length are batched together. None: all.
        **arguments: Further ones of `Sampler`.

    Returns:
        For each row the new token ids, with the token that ended the text.

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
                **arguments,
            )
            for row, text in zip(batch, write(sampler, remaining[batch], eos_token_id), strict=True):
                texts[row] = text
    return texts
