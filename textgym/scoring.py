"""How likely given tokens are under a language model of transformers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from textgym import packing, seq2seq
from textgym.positions import check_positions, with_positions_alike
from textgym.precision import at_least_float32, autocast

# Entries of a block of logits (64 MiB in float32).
_LOGITS_AT_ONCE = 2**24


@torch.no_grad()
def log_probs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int,
    dtype: torch.dtype | None = None,
) -> list[np.ndarray]:
    """Log-probabilities of tokens, each given all before it, under the untruncated softmax at temperature 1.

    Causal models read packed tokens (`textgym.packing`): no padding, and beginnings that texts share once.

    Args:
        model: The language model.
        prompts: N sequences of token ids, none empty; the encoder of a sequence-to-sequence model reads them.
        prefixes: N sequences of token ids, which follow the prompts.
        continuations: N sequences of token ids, which follow the prefixes.
        batch_size: Most texts in one pass; texts of similar length are read together.
        dtype: Data type of matrix products; None for the type of the weights.

    Returns:
        For each text float32 (L,), of the L tokens of its continuation.

    Raises:
        ValueError: A text is too long for the model.
    """
    results = [np.zeros(len(ids), np.float32) for ids in continuations]
    seq2seq_model = model.config.is_encoder_decoder
    texts = [
        [*([] if seq2seq_model else prompt), *prefix, *ids]
        for prompt, prefix, ids in zip(prompts, prefixes, continuations, strict=True)
    ]
    lengths = np.array([len(text) for text in texts])
    start = len(seq2seq.decoder_start(model)) if seq2seq_model else 0
    check_positions(model, max(start + int(lengths.max(initial=0)), *map(len, prompts), 0))
    for alike in with_positions_alike(model, lengths):
        order = [row for row in alike[np.argsort(-lengths[alike], kind="stable")].tolist() if len(results[row])]
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            with autocast(model.device, dtype):
                scores = _of_batch(model, *([part[row] for row in batch] for part in (prompts, texts, continuations)))
            for row, part in zip(batch, scores.cpu().split([len(results[row]) for row in batch]), strict=True):
                results[row][:] = part.numpy()
    return results


def _of_batch(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> Tensor:
    """Log-probabilities (n,) of the tokens with which texts end, text after text; see `log_probs`."""
    sizes, ends = np.array([len(ids) for ids in continuations]), np.array([len(text) for text in texts])
    rows = torch.from_numpy(np.repeat(np.arange(len(texts)), sizes)).to(model.device)
    before = np.concatenate([np.arange(end - size, end) for size, end in zip(sizes, ends, strict=True)])
    lengths = torch.from_numpy(before).to(model.device)
    if model.config.is_encoder_decoder:
        of_prompts = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        states = seq2seq.read(model, _padded(model, prompts), of_prompts, _padded(model, texts), rows, lengths)
    else:
        states = packing.read(model, _padded(model, texts), rows, lengths)
    tokens = torch.tensor([token for ids in continuations for token in ids], device=model.device)
    # In blocks, so that memory does not grow with tokens times vocabulary.
    block = max(1, _LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
    parts = zip(states.split(block), tokens.split(block), strict=True)
    return -torch.cat(
        [
            cross_entropy(at_least_float32(packing.head(model, part)), of_part, reduction="none")
            for part, of_part in parts
        ]
    ).float()


def _padded(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """(B, S) int64, texts from the first column on; what follows them is never read."""
    return pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True).to(model.device)
