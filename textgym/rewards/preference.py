"""TL;DR's learned reward: a small Bradley-Terry model that tells the author's summary of a post from others."""

from __future__ import annotations

import math
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.data.sources import load_split, post_prompt
from textgym.data.splits import SPLITS, Split
from textgym.rewards.trained import Trained, load_or_train

if TYPE_CHECKING:
    import scipy.sparse

# Words of a post in a prompt (500 tokens of about 1.3 per word), and of a summary that a policy can write.
POST_WORDS = 380
SUMMARY_WORDS = 40

HASHED_FEATURES = 2**18
COUNT_TABLE = 2**20
INVERSE_REGULARISATION = 1.0

_TOKEN = re.compile(r"\w+(?:'\w+)?|[.,!?;:]")
_BEGIN, _END = "<s>", "</s>"


def _other(words: list[str], post: list[str], other: list[str], rng: np.random.Generator) -> list[str]:
    """The summary of another post."""
    return other


def _shuffled(words: list[str], post: list[str], other: list[str], rng: np.random.Generator) -> list[str]:
    """The author's words in random order."""
    return [words[i] for i in rng.permutation(len(words))]


def _repeated(words: list[str], post: list[str], other: list[str], rng: np.random.Generator) -> list[str]:
    """A phrase of two to six of the author's words, repeated to at least the length of the summary."""
    start, length = int(rng.integers(max(len(words) - 2, 1))), int(rng.integers(2, 6, endpoint=True))
    phrase = words[start : start + length]
    total = int(rng.integers(max(len(words), 2 * len(phrase)), SUMMARY_WORDS + len(words), endpoint=True))
    return (phrase * total)[:total]


def _truncated(words: list[str], post: list[str], other: list[str], rng: np.random.Generator) -> list[str]:
    """The first 20 to 80 % of the author's words."""
    return words[: max(1, int(len(words) * rng.uniform(0.2, 0.8)))]


def _sentence(words: list[str], post: list[str], other: list[str], rng: np.random.Generator) -> list[str]:
    """A random sentence of the post."""
    sentences = [s.split() for s in re.split(r"(?<=[.!?])\s+", " ".join(post)) if len(s.split()) > 2] or [post]
    return sentences[int(rng.integers(len(sentences)))][:SUMMARY_WORDS]


def _keywords(words: list[str], post: list[str], other: list[str], rng: np.random.Generator) -> list[str]:
    """As many words of the post as the summary has, drawn at random."""
    return [post[i] for i in rng.integers(len(post), size=len(words))]


#: Texts that are worse than the author's summary.
CORRUPTIONS: Mapping[str, Callable[[list[str], list[str], list[str], np.random.Generator], list[str]]] = {
    corrupt.__name__.removeprefix("_"): corrupt
    for corrupt in (_other, _shuffled, _repeated, _truncated, _sentence, _keywords)
}


def _slot(ngram: str, size: int) -> int:
    """Return the index of an n-gram in a hashed table of a power-of-two size."""
    return zlib.crc32(ngram.encode()) & (size - 1)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text.lower())


class _Features:
    """Features of a summary given its post, each bounded, so that scores are bounded.

    Dense: the share of the summary's words that the post has (weighted by idf and not), the share that is copied (2-
    and 4-grams of the post), repetition, association of neighbours (log-ratio of bigrams and share of known bigrams),
    length, and a full stop at the end; and the products of these. Hashed: distinct 1- and 2-grams with begin and end
    marks, divided by the root of their number.

    Attributes:
        counts: Occurrences of each hashed 1- and 2-gram in the training texts, float32 (table,).
        documents: Number of training posts with each hashed word, float32 (hashed_features,).
        size: Number of words and of posts in these counts, float32 (2,).
    """

    def __init__(self, counts: np.ndarray, documents: np.ndarray, size: np.ndarray):
        self.counts, self.documents, self.size = counts, documents, size

    @classmethod
    def counted(cls, posts: Sequence[list[str]], summaries: Sequence[list[str]]) -> _Features:
        """Count the n-grams of the tokens of training posts and summaries."""
        counts = np.zeros(COUNT_TABLE, np.float32)
        documents = np.zeros(HASHED_FEATURES, np.float32)
        words = 0
        for tokens in (*posts, *summaries):
            slots = [_slot(ngram, COUNT_TABLE) for ngram in (*tokens, *_ngrams(tokens, 2))]
            np.add.at(counts, slots, 1)
            words += len(tokens)
        for tokens in posts:
            documents[[_slot(token, HASHED_FEATURES) for token in set(tokens)]] += 1
        return cls(counts, documents, np.array([words, len(posts)], np.float32))

    def of_groups(
        self, documents: Sequence[list[str]], groups: Sequence[Sequence[list[str]]]
    ) -> scipy.sparse.csr_array:
        """Return the features of several summaries per document (a prompt with its post), all as tokens.

        They are float64 (M, dense + hashed), one row for each of the M summaries, in order.
        """
        from scipy.sparse import csr_array, hstack

        dense, slots, values = [], [], []
        for document, texts in zip(documents, groups, strict=True):
            held = [set(_ngrams(document, n)) for n in (1, 2, 4)]
            for text in texts:
                dense.append(self._dense(held, text))
                marked = [_BEGIN, *text, _END]
                ngrams = [*marked, *_ngrams(marked, 2)]
                slots.append(sorted({_slot(ngram, HASHED_FEATURES) for ngram in ngrams}))
                values += [1 / math.sqrt(len(ngrams))] * len(slots[-1])
        columns = np.array([slot for row in slots for slot in row], np.int32)
        offsets = np.array([0, *accumulate(map(len, slots))], np.int32)
        hashed = csr_array((np.array(values), columns, offsets), shape=(len(slots), HASHED_FEATURES))
        single = np.array(dense)
        products = [single[:, i] * single[:, j] for i in range(single.shape[1]) for j in range(i, single.shape[1])]
        return hstack([csr_array(np.stack(products, axis=1)), hashed], format="csr")

    def _dense(self, held: list[set[str]], summary: list[str]) -> list[float]:
        words = [token for token in summary if token[0].isalnum()]
        if not words:
            return [0.0] * 11
        distinct = sorted(set(words))
        idf = np.log(self.size[1] / np.maximum(self.documents[[_slot(w, HASHED_FEATURES) for w in distinct]], 1))
        known = np.array([word in held[0] for word in distinct])
        bigrams, quadgrams = _ngrams(summary, 2), _ngrams(summary, 4)
        pairs = self.counts[[_slot(bigram, COUNT_TABLE) for bigram in bigrams]]
        single = self.counts[[_slot(token, COUNT_TABLE) for token in summary]]
        expected = (single[:-1] + 1) * (single[1:] + 1) / self.size[0]
        association = np.log((pairs + 0.1) / (expected + 0.1)) if len(pairs) else np.zeros(1)
        length = min(math.log1p(len(words)) / math.log1p(SUMMARY_WORDS), 1.5)
        return [
            1.0,
            float((idf * known).sum() / max(idf.sum(), 1e-6)),
            float(known.mean()),
            _share(bigrams, held[1]),
            _share(quadgrams, held[2]),
            1 - len(distinct) / len(words),
            1 - len(set(bigrams)) / max(len(bigrams), 1),
            float(np.clip(association, -3, 6).mean() / 6),
            float((pairs > 0).mean()) if len(pairs) else 0.0,
            length,
            float(summary[-1] in ".!?"),
        ]


def _ngrams(tokens: list[str], n: int) -> list[str]:
    return [" ".join(gram) for gram in zip(*(tokens[i:] for i in range(n)), strict=False)]


def _share(ngrams: list[str], held: set[str]) -> float:
    return sum(ngram in held for ngram in ngrams) / len(ngrams) if ngrams else 0.0


class PreferenceReward:
    """A Bradley-Terry score of how much a summary looks like the author's, with mean 0 on authors' summaries.

    The difference of two scores is the log-odds that the first text is preferred.

    Attributes:
        fingerprint: Identifies the training data and settings.
        accuracy: Share of held-out test pairs in the right order, over all corruptions.
        report: The evaluation after training; ``report["test"]`` has the accuracy against each corruption.
    """

    def __init__(self, trained: Trained):
        arrays = trained.arrays
        self.features = _Features(arrays["counts"], arrays["documents"], arrays["size"])
        self.weights = arrays["weights"]
        self.offset = float(arrays["offset"][0])
        self.fingerprint = trained.fingerprint
        self.report = trained.report
        self.accuracy = float(trained.report["test"]["all"])

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Score N texts, float64 (N,), without use of references (see `RewardFunction`)."""
        if not len(prompts):
            return np.zeros(0)
        documents, texts = [_tokens(prompt) for prompt in prompts], [[_tokens(text)] for text in completions]
        return self.features.of_groups(documents, texts) @ self.weights - self.offset


def preference_reward(source: str) -> PreferenceReward:
    """Return TL;DR's learned reward, which is trained on the source's training posts and cached."""
    train = load_split("tldr", "train", source)
    recipe = {
        "model": "Bradley-Terry, logistic regression on differences of summary features, 1",
        "hashed_features": HASHED_FEATURES,
        "count_table": COUNT_TABLE,
        "C": INVERSE_REGULARISATION,
        "words": [POST_WORDS, SUMMARY_WORDS],
        "corruptions": list(CORRUPTIONS),
        "data": train.fingerprint,
    }
    return PreferenceReward(load_or_train("preference", recipe, lambda: _train_preference(train, source)))


def _variants(split: Split) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Return the tokens of each row's prompt, with a truncated post, and of its summaries: author's and corrupted."""
    rng = np.random.default_rng(0)
    rows = list(split.rows)
    others = (np.arange(len(rows)) + rng.integers(1, max(len(rows), 2))) % len(rows)
    documents, variants = [], []
    for row, other in zip(rows, others, strict=True):
        before, body, after = post_prompt(row)
        post, words, others_words = body.split()[:POST_WORDS], row["summary"].split(), rows[other]["summary"].split()
        documents.append(_tokens(before + " ".join(post) + after))
        corrupted = [corrupt(words, post, others_words, rng) for corrupt in CORRUPTIONS.values()]
        variants.append([_tokens(" ".join(text)) for text in (words, *corrupted)])
    return documents, variants


def _train_preference(train: Split, source: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from scipy.sparse import vstack
    from sklearn.linear_model import LogisticRegression

    started = time.perf_counter()
    documents, variants = _variants(train)
    features = _Features.counted(documents, [texts[0] for texts in variants])
    rows = features.of_groups(documents, variants)
    kinds = 1 + len(CORRUPTIONS)
    authors = rows[::kinds]
    differences = vstack([authors - rows[kind::kinds] for kind in range(1, kinds)], format="csr")
    # Logistic regression without intercept on differences is the Bradley-Terry likelihood for either order of a pair;
    # every other pair is turned round because the classifier needs both classes.
    first = np.arange(differences.shape[0]) % 2
    differences.data *= (2.0 * first - 1).repeat(np.diff(differences.indptr))
    model = LogisticRegression(C=INVERSE_REGULARISATION, solver="liblinear", fit_intercept=False)
    weights = model.fit(differences, first).coef_[0]
    scores = authors @ weights
    arrays = {
        "weights": weights,
        "offset": np.array([scores.mean()]),
        "counts": features.counts,
        "documents": features.documents,
        "size": features.size,
    }
    report: dict[str, Any] = {
        "seconds": time.perf_counter() - started,
        "training_pairs": differences.shape[0],
        "author_score_deviation": float(scores.std()),
    }
    for name in SPLITS[1:]:
        split = load_split("tldr", name, source)
        scores = (features.of_groups(*_variants(split)) @ weights).reshape(-1, kinds)
        accuracies = (scores[:, :1] > scores[:, 1:]).mean(axis=0)
        report[name] = {
            "all": float(accuracies.mean()),
            **dict(zip(CORRUPTIONS, accuracies.tolist(), strict=True)),
            "posts": len(scores),
            "data": split.fingerprint,
        }
    return arrays, report
