"""Metrics of diversity within and between texts."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence

import numpy as np

from textgym.metrics.base import TextMetric
from textgym.rewards.overlap import words_of

Ngram = tuple[str, ...]


def _ngrams(words: Sequence[str], n: int) -> list[Ngram]:
    return list(zip(*(words[i:] for i in range(n)), strict=False))


class Distinct(TextMetric):
    """Distinct-1 and distinct-2: the number of different word n-grams divided by that of all, over all texts together.

    (The paper divides by the number of words; n-grams keep the measure within [0, 1] for every n.) It falls as texts
    are added, so only equal numbers of texts of similar lengths are comparable. Words are in lower case, without
    punctuation.

    Returns:
        ``distinct_1``, ``distinct_2``; 0 where the texts are too short to have an n-gram.
    """

    inputs = ("predictions",)
    paper = "Li et al. A Diversity-Promoting Objective Function for Neural Conversation Models. NAACL 2016."
    signature = "over n-grams, words by regular expression"

    def _scores(self, predictions: Sequence[str]) -> dict[str, float]:
        texts = [words_of(text) for text in predictions]
        scores = {}
        for n in (1, 2):
            ngrams = [ngram for words in texts for ngram in _ngrams(words, n)]
            scores[f"distinct_{n}"] = len(set(ngrams)) / max(len(ngrams), 1)
        return scores


class SelfBleu(TextMetric):
    """Self-BLEU: the mean BLEU-4 of every text with all other texts as references; high for similar texts.

    BLEU of single texts, where zero matches count as 0.1 (Chen and Cherry 2014, method 1), as in Texygen's code, which
    uses nltk. No texts are sampled: the count of an n-gram is clipped at the highest count in another text, which the
    two highest counts of each n-gram give for every text, so that the time is linear in the size of the set. Self-BLEU
    rises as texts are added, so only equal numbers of texts are comparable. Words are in lower case, without
    punctuation.

    Returns:
        ``self_bleu`` in [0, 1]; 0 for a single text.
    """

    inputs = ("predictions",)
    paper = "Zhu et al. Texygen: A Benchmarking Platform for Text Generation Models. SIGIR 2018."
    signature = "BLEU-4, method 1, against all others, words by regular expression"
    orders = 4
    unmatched = 0.1

    def _scores(self, predictions: Sequence[str]) -> dict[str, float]:
        if len(predictions) == 1:
            return {"self_bleu": 0.0}
        texts = [words_of(text) for text in predictions]
        counts = [[Counter(_ngrams(words, n)) for words in texts] for n in range(1, self.orders + 1)]
        most = [_two_highest(of_texts) for of_texts in counts]
        lengths = sorted(map(len, texts))
        total = 0.0
        for row, words in enumerate(texts):
            matches = [
                sum(second[ngram] if count == first[ngram] else count for ngram, count in of_texts[row].items())
                for of_texts, (first, second) in zip(counts, most, strict=True)
            ]
            if not matches[0]:
                continue  # without a common word BLEU is 0
            precisions = [(match or self.unmatched) / max(len(words) - n, 1) for n, match in enumerate(matches)]
            brevity = min(0.0, 1 - _closest_other(lengths, len(words)) / len(words))
            total += math.exp(brevity + np.log(precisions).mean())
        return {"self_bleu": total / len(texts)}


def _two_highest(counts: Sequence[Counter[Ngram]]) -> tuple[Counter[Ngram], Counter[Ngram]]:
    """Return the highest count of every n-gram in a text, and the highest in the other texts."""
    first: Counter[Ngram] = Counter()
    second: Counter[Ngram] = Counter()
    for of_text in counts:
        for ngram, count in of_text.items():
            second[ngram] = max(second[ngram], min(count, first[ngram]))
            first[ngram] = max(first[ngram], count)
    return first, second


def _closest_other(lengths: Sequence[int], length: int) -> int:
    """Return the nearest to one of the sorted `lengths` among the others, the shorter of two equally near."""
    start, stop = bisect_left(lengths, length), bisect_right(lengths, length)
    if stop - start > 1:
        return length
    neighbours = [*lengths[max(start - 1, 0) : start], *lengths[stop : stop + 1]]
    return min(neighbours, key=lambda other: abs(other - length))
