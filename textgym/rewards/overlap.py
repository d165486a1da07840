"""Rewards by overlap with references or concepts: CIDEr-D, concept coverage, ROUGE-L.

CommonGen was published with a SPICE term, which needs a Java scene-graph parser; here SPICE is a metric only
(`textgym.metrics`).
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.data.sources import load_split

if TYPE_CHECKING:
    from nltk.stem.snowball import SnowballStemmer

# A human sentence has about 0.14 by CIDEr-D / 10 against the other references of its set, and 1 by coverage: with a
# quarter, both terms have one order of magnitude, and a bare list of the concepts scores well below a sentence.
CIDER_WEIGHT = 1.0
COVERAGE_WEIGHT = 0.25

_WORD = re.compile(r"\w+(?:'\w+)?")
# A line for each lemma: the lemma, and its forms that have another stem, of common verbs and nouns.
_IRREGULAR = Path(__file__).with_name("irregular_forms.txt")


def words_of(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


class CiderDScorer:
    """CIDEr-D with frozen document frequencies (Vedantam, Zitnick, Parikh 2015, section 5, equations 1 to 4).

    The clipped cosine of tf-idf weighted n-grams, n from 1 to 4, to each reference, with a Gaussian penalty (sigma 6)
    on the difference of lengths; the mean over n and references, times 10. As in the authors' code (`pycocoevalcap`), a
    length is the number of bigrams. Words are those of `words_of`, without stemming.

    Args:
        documents: For each sample its references, from which the document frequencies are counted.
    """

    orders = 4
    sigma = 6.0

    def __init__(self, documents: Iterable[Sequence[str]]):
        frequency: Counter[str] = Counter()
        size = 0
        for references in documents:
            frequency.update({ngram for text in references for ngram in self._counts(text)})
            size += 1
        self._default_idf = math.log(max(size, 1))
        # An n-gram of one document weighs as much as an unknown one, so it is not stored.
        self._idf = {ngram: self._default_idf - math.log(n) for ngram, n in frequency.items() if n > 1}

    def __deepcopy__(self, memo: dict[int, Any]) -> CiderDScorer:
        # The table is large and never changes.
        return self

    def __call__(self, candidates: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
        """Score N candidates, each by its references: float64 (N,) in [0, 10], 0 without references."""
        scores = np.zeros(len(candidates))
        for i, (candidate, texts) in enumerate(zip(candidates, references, strict=True)):
            if texts:
                weights, norms, length = self._vector(candidate)
                similarities = [self._similarity(weights, norms, length, *self._vector(text)) for text in texts]
                scores[i] = 10 * np.mean(similarities)
        return scores

    def _counts(self, text: str) -> Counter[str]:
        words = words_of(text)
        return Counter(" ".join(words[i : i + n]) for n in range(1, self.orders + 1) for i in range(len(words) - n + 1))

    def _vector(self, text: str) -> tuple[dict[str, float], np.ndarray, int]:
        """Return the tf-idf weights of a text's n-grams, their norm for each n, and the number of bigrams."""
        weights, squares, length = {}, np.zeros(self.orders), 0
        for ngram, count in self._counts(text).items():
            n = ngram.count(" ")
            weights[ngram] = count * self._idf.get(ngram, self._default_idf)
            squares[n] += weights[ngram] ** 2
            length += count * (n == 1)
        return weights, np.sqrt(squares), length

    def _similarity(
        self,
        candidate: Mapping[str, float],
        candidate_norms: np.ndarray,
        candidate_length: int,
        reference: Mapping[str, float],
        reference_norms: np.ndarray,
        reference_length: int,
    ) -> float:
        products = np.zeros(self.orders)
        for ngram in candidate.keys() & reference.keys():
            products[ngram.count(" ")] += min(candidate[ngram], reference[ngram]) * reference[ngram]
        norms = candidate_norms * reference_norms
        cosines = np.divide(products, norms, out=np.zeros(self.orders), where=norms > 0)
        return float(cosines.mean() * math.exp(-((candidate_length - reference_length) ** 2) / (2 * self.sigma**2)))


@lru_cache(maxsize=1)
def _stemmer() -> tuple[SnowballStemmer, dict[str, frozenset[str]]]:
    from nltk.stem.snowball import SnowballStemmer

    stemmer = SnowballStemmer("english")
    lemmas: dict[str, set[str]] = {}
    for line in _IRREGULAR.read_text(encoding="utf-8").splitlines():
        lemma, *forms = line.split()
        for form in forms:
            lemmas.setdefault(form, set()).add(stemmer.stem(lemma))
    return stemmer, {form: frozenset(stems) for form, stems in lemmas.items()}


@lru_cache(maxsize=2**16)
def _stems(word: str) -> frozenset[str]:
    """Return the possible stems of a word ("leaves": of leaf and of leave)."""
    stemmer, lemmas = _stemmer()
    return lemmas.get(word, frozenset()) | {stemmer.stem(word.removesuffix("'s"))}


def coverage(prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """Return the fraction of concepts that each of N texts uses, in any inflected form: float64 (N,) in [0, 1].

    A prompt is "generate a sentence with: c1 c2 c3" or the concepts alone; without concepts the fraction is 0. Two
    words are forms of one lemma where the English Snowball stemmer gives them the same stem, or by a table of irregular
    verbs and nouns.
    """
    fractions = np.zeros(len(prompts))
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        concepts = words_of(prompt.rpartition("with:")[2])
        written = frozenset().union(*map(_stems, words_of(completion)))
        fractions[i] = np.mean([not written.isdisjoint(_stems(concept)) for concept in concepts]) if concepts else 0.0
    return fractions


def rouge(
    kinds: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
) -> dict[str, np.ndarray]:
    """Return F1 of ROUGE (Lin 2004) with Porter stemming by the `rouge-score` package, the best over references.

    For each of `kinds` ("rouge1", "rouge2", "rougeL") it is float64 (N,) in [0, 1]; 0 for a text without references.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([*kinds], use_stemmer=True)
    best = {kind: np.zeros(len(completions)) for kind in kinds}
    for row, (text, targets) in enumerate(zip(completions, references, strict=True)):
        for target in targets:
            for kind, score in scorer.score(target, text).items():
                best[kind][row] = max(best[kind][row], score.fmeasure)
    return best


class CiderCoverageReward:
    """CommonGen's reward: ``CIDER_WEIGHT * CIDEr-D / 10 + COVERAGE_WEIGHT * coverage``, shown as two parts.

    Args:
        cider: CIDEr-D with the document frequencies to use.
        fingerprint: Identifies their data.
    """

    def __init__(self, cider: CiderDScorer, fingerprint: str):
        self.cider = cider
        self.fingerprint = fingerprint

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> dict[str, np.ndarray]:
        """Score N texts (see `RewardFunction`)."""
        return {
            "cider": CIDER_WEIGHT * self.cider(completions, references) / 10,
            "coverage": COVERAGE_WEIGHT * coverage(prompts, completions),
        }


def cider_coverage_reward(source: str) -> CiderCoverageReward:
    """Return CommonGen's reward with the document frequencies of the source's training references."""
    train = load_split("commongen", "train", source)
    recipe = f"cider-d {CIDER_WEIGHT} coverage {COVERAGE_WEIGHT} {train.fingerprint}"
    return CiderCoverageReward(
        CiderDScorer(row["targets"] for row in train.rows), hashlib.sha256(recipe.encode()).hexdigest()[:16]
    )


class RougeLReward:
    """ROUGE-L F1 (see `rouge`) as a reward."""

    fingerprint = "rouge-score rougeL F1 stemmed max"

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Score N texts (see `RewardFunction`)."""
        return rouge(["rougeL"], completions, references)["rougeL"]


def rouge_l_reward(source: str) -> RougeLReward:
    """Return ROUGE-L against the references, which does not depend on the source."""
    return RougeLReward()
