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
    texts = [[*prefix, *ids] for prefix, ids in zip(prefixes, continuations, strict=True)]
    if not model.config.is_encoder_decoder:
        texts = [[*prompt, *text] for prompt, text in zip(prompts, texts, strict=True)]
    lengths = np.array([len(text) for text in texts])
    longest = max(map(len, prompts), default=0) if model.config.is_encoder_decoder else 0
    check_positions(model, max(longest, int(lengths.max(initial=0))))
    for alike in with_positions_alike(model, lengths):
        order = [row for row in alike[np.argsort(-lengths[alike], kind="stable")].tolist() if len(results[row])]
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            rows = torch.from_numpy(np.repeat(np.arange(len(batch)), [len(results[row]) for row in batch]))
            before = np.concatenate([np.arange(len(texts[row]) - len(results[row]), len(texts[row])) for row in batch])
            tokens = torch.tensor([token for row in batch for token in continuations[row]])
            rows, lengths_before, tokens = (t.to(model.device) for t in (rows, torch.from_numpy(before), tokens))
            with autocast(model.device, dtype):
                ids = _padded(model, [texts[row] for row in batch])
                if model.config.is_encoder_decoder:
                    of_batch = [prompts[row] for row in batch]
                    sizes = torch.tensor([len(prompt) for prompt in of_batch], device=model.device)
                    states = seq2seq.read(model, _padded(model, of_batch), sizes, ids, rows, lengths_before)
                else:
                    states = packing.read(model, ids, rows, lengths_before)
                scores = torch.cat([_of_tokens(model, *part) for part in _blocks(model, states, tokens)])
            for row, part in zip(batch, scores.cpu().split([len(results[row]) for row in batch]), strict=True):
                results[row][:] = part.numpy()
    return results


def _padded(model: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """(B, S) int64, texts from the first column on; what follows them is never read."""
    return pad_sequence([torch.tensor(text, dtype=torch.int64) for text in texts], batch_first=True).to(model.device)


def _blocks(model: PreTrainedModel, states: Tensor, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Hidden states (n, d) and the tokens (n,) after them, in parts whose logits fit into memory."""
    size = max(1, _LOGITS_AT_ONCE // model.get_output_embeddings().weight.shape[0])
    return list(zip(states.split(size), tokens.split(size), strict=True))


def _of_tokens(model: PreTrainedModel, states: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities (n,) of tokens (n,) after hidden states (n, d)."""
    return -cross_entropy(at_least_float32(packing.head(model, states)), tokens, reduction="none").float()
