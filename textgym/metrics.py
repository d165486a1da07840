"""How a set of written texts is judged, beside the reward.

`METRICS` holds what texts alone decide: each is called ``metric(prompts=, completions=, references=)`` with N prompts,
N completions and N sequences of reference texts, and returns one number for the whole set. `perplexity` needs a model
and works on token ids, so that it judges the very tokens that were written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from textgym.rewards import overlap

if TYPE_CHECKING:
    from transformers import PreTrainedModel

References = Sequence[Sequence[str]]


class Metric(Protocol):
    """A number for a set of texts."""

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str], references: References) -> float:
        """Judge N texts, N at least 1."""
        ...


def distinct(n: int, *, prompts: Sequence[str], completions: Sequence[str], references: References) -> float:
    """Distinct-n: different word n-grams over all word n-grams, pooled over all completions (Li et al. 2016).

    (The paper divides by the number of words; n-grams keep the measure within [0, 1] for every n.) It falls as texts
    are added, so only equal numbers of texts of like length compare. 0 for texts too short to have an n-gram.
    """
    words = [overlap.words_of(text) for text in completions]
    ngrams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def rouge_l(*, prompts: Sequence[str], completions: Sequence[str], references: References) -> float:
    """Mean ROUGE-L F1, stemmed, best over references (see `textgym.rewards.overlap.rouge_l`), in [0, 1]."""
    return float(overlap.rouge_l(completions, references).mean())


def bleu(*, prompts: Sequence[str], completions: Sequence[str], references: References) -> float:
    """Corpus BLEU-4 by sacrebleu, its default tokenisation and smoothing, case kept, in [0, 100].

    Texts without references are left out; 0 when none has any.
    """
    from sacrebleu.metrics import BLEU

    judged = [(text.strip(), list(texts)) for text, texts in zip(completions, references, strict=True) if texts]
    if not judged:
        return 0.0
    most = max(len(texts) for _, texts in judged)
    streams: Any = [[texts[k] if k < len(texts) else None for _, texts in judged] for k in range(most)]
    return BLEU().corpus_score([text for text, _ in judged], streams).score


def cider_d(*, prompts: Sequence[str], completions: Sequence[str], references: References) -> float:
    """Mean CIDEr-D with the document frequencies of these very references, as captions are evaluated, in [0, 10].

    (CommonGen's reward uses those of the training references instead, so that it does not depend on the batch.)
    """
    return float(overlap.CiderD(references)(completions, references).mean())


def coverage(*, prompts: Sequence[str], completions: Sequence[str], references: References) -> float:
    """Mean fraction of a prompt's concepts used (see `textgym.rewards.overlap.coverage`), in [0, 1]."""
    return float(overlap.coverage(prompts, completions).mean())


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "distinct_1": partial(distinct, 1),
        "distinct_2": partial(distinct, 2),
        "rouge_l": rouge_l,
        "bleu": bleu,
        "cider_d": cider_d,
        "coverage": coverage,
    }
)


def perplexity(
    model: PreTrainedModel,
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
) -> float:
    """Perplexity of completions under a causal language model: exp of the mean negative log-likelihood of a token.

    The mean is over all completion tokens of the set, each given its prompt and the tokens before it; a final EOS is a
    token like any other and counts where the ids hold it. Prompt tokens are conditioned on and not counted.

    Args:
        model: The judge, on any device; it reads the ids with its own vocabulary.
        prompt_ids: N sequences of token ids without padding, each at least one token.
        completion_ids: N sequences of token ids without padding; empty ones count nothing.
        batch_size: Texts at once.

    Raises:
        ValueError: An empty prompt, unequal numbers of prompts and completions, or not one completion token.
    """
    import torch

    if len(prompt_ids) != len(completion_ids):
        raise ValueError(f"completion_ids must be as many as prompt_ids ({len(prompt_ids)}), got {len(completion_ids)}")
    if not all(len(ids) for ids in prompt_ids):
        raise ValueError("prompt_ids must each hold at least one token, got an empty one")
    if not any(len(ids) for ids in completion_ids):
        raise ValueError("completion_ids must hold at least one token, got none")

    total, count = 0.0, 0
    order = sorted(range(len(prompt_ids)), key=lambda i: -len(prompt_ids[i]) - len(completion_ids[i]))
    training = model.training
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            # Prompts end and completions begin at one column, so that logits are needed from there on only.
            before = max(len(prompt_ids[i]) for i in rows)
            after = max(len(completion_ids[i]) for i in rows)
            if not after:
                continue
            ids = torch.zeros(len(rows), before + after, dtype=torch.long)
            mask = torch.zeros_like(ids)
            for row, i in enumerate(rows):
                columns = slice(before - len(prompt_ids[i]), before + len(completion_ids[i]))
                ids[row, columns] = torch.tensor([*prompt_ids[i], *completion_ids[i]])
                mask[row, columns] = 1
            ids, mask = ids.to(model.device), mask.to(model.device)
            logits = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                logits_to_keep=after + 1,
            ).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), ids[:, before:].flatten(), reduction="none"
            )
            written = mask[:, before:].flatten()
            total += float((losses * written).sum(dtype=torch.float64))
            count += int(written.sum())
    model.train(training)
    return math.exp(total / count)
