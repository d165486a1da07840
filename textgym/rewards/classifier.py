"""Rewards by classifiers: a small sentiment model that is trained here, and any sequence-classification model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.checks import check_int, check_one_of
from textgym.data.sources import load_split
from textgym.data.splits import SPLITS, Split
from textgym.rewards.trained import Trained, load_or_train

if TYPE_CHECKING:
    import scipy.sparse
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A text has a prompt of at most 64 tokens, from the first half of a review, and 48 new tokens. A word has about 1.25.
PROMPT_WORDS = 50
NEW_WORDS = 40
# Training adds a random window of each review, this many words.
WINDOW_WORDS = (50, 110)

FEATURES = 2**20
INVERSE_REGULARISATION = 5.0


def fragment(review: str) -> str:
    """Return as many words of a review as an episode has: the prompt, and as many as the policy writes."""
    words = review.split()
    return " ".join(words[: min(len(words) // 2, PROMPT_WORDS) + NEW_WORDS])


def features(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """Return hashed word 1- and 2-grams of texts, float32 (N, features).

    An n-gram counts once however often it is repeated, but each row is divided by the root of its number of n-grams,
    repetitions included. A text repeated k times thus has its log-odds divided by the root of k; counts would raise
    them, an l2 norm would not change them.
    """
    from scipy.sparse import csr_array
    from sklearn.feature_extraction.text import HashingVectorizer

    vectorizer = HashingVectorizer(
        n_features=FEATURES,
        ngram_range=(1, 2),
        token_pattern=r"\w+(?:'\w+)?|[!?]",
        alternate_sign=False,
        norm=None,
        dtype=np.float32,
    )
    counts = csr_array(vectorizer.transform(texts))
    total = np.maximum(counts.sum(axis=1), 1)
    counts.data = (1 / np.sqrt(total)).astype(np.float32).repeat(np.diff(counts.indptr))
    return counts


class SentimentReward:
    """P(positive) of the whole text, prompt and completion, by a small linear model.

    Attributes:
        fingerprint: Identifies the training data and settings.
        accuracy: Held-out accuracy on fragments of test reviews (see `fragment`).
        report: The evaluation after training.
    """

    def __init__(self, trained: Trained):
        self.weights = trained.arrays["weights"]
        self.fingerprint = trained.fingerprint
        self.report = trained.report
        self.accuracy = float(trained.report["test"]["accuracy"])

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Return P(positive) of N texts, float64 (N,), without use of references (see `RewardFunction`)."""
        return self.probabilities([prompt + text for prompt, text in zip(prompts, completions, strict=True)])

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """Return P(positive) of N whole texts, float64 (N,)."""
        from scipy.special import expit

        if not len(texts):
            return np.zeros(0)
        return expit((features(texts) @ self.weights).astype(np.float64))


def sentiment_reward(source: str) -> SentimentReward:
    """Return IMDB's reward, a model that is trained on the source's training reviews in seconds and cached.

    The training texts are as long as those of episodes: the `fragment` of each review, and a random window of it.
    """
    train = load_split("imdb", "train", source)
    recipe = {
        "model": "logistic regression on distinct hashed word 1- and 2-grams over the root of their number, 1",
        "features": FEATURES,
        "C": INVERSE_REGULARISATION,
        "fragment_words": [PROMPT_WORDS, NEW_WORDS],
        "window_words": WINDOW_WORDS,
        "data": train.fingerprint,
    }
    return SentimentReward(load_or_train("sentiment", recipe, lambda: _train_sentiment(train, source)))


def _train_sentiment(train: Split, source: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from scipy.special import expit
    from sklearn.linear_model import LogisticRegression

    started = time.perf_counter()
    rng = np.random.default_rng(0)
    texts, labels = [], []
    for row in train.rows:
        words = row["text"].split()
        length = int(rng.integers(WINDOW_WORDS[0], WINDOW_WORDS[1], endpoint=True))
        start = int(rng.integers(max(len(words) - length, 0), endpoint=True))
        texts += [fragment(row["text"]), " ".join(words[start : start + length])]
        labels += [row["label"]] * 2
    # Without an intercept, an empty text has P(positive) one half, and a repetitive one nearly.
    model = LogisticRegression(C=INVERSE_REGULARISATION, solver="liblinear", fit_intercept=False)
    weights = model.fit(features(texts), labels).coef_[0].astype(np.float32)
    report: dict[str, Any] = {"seconds": time.perf_counter() - started, "training_texts": len(texts)}
    for name in SPLITS[1:]:
        split = load_split("imdb", name, source)
        held_out = np.array([row["label"] for row in split.rows])
        p = expit(features([fragment(row["text"]) for row in split.rows]) @ weights)
        report[name] = {
            "accuracy": float(np.mean((p > 0.5) == held_out)),
            "log_loss": float(-np.mean(np.log(np.where(held_out == 1, p, 1 - p).clip(1e-7)))),
            # For each fifth of the texts, in order of P(positive): its mean and the share of positive reviews.
            "reliability": [
                [float(p[fifth].mean()), float(held_out[fifth].mean())] for fifth in np.array_split(np.argsort(p), 5)
            ],
            "texts": len(held_out),
            "data": split.fingerprint,
        }
    return {"weights": weights}, report


class ModelReward:
    """The probability of a class of the whole text (prompt and completion) by a sequence-classification model.

    A model with one output is a reward model: its raw score is the reward.

    Args:
        model: Hub id or folder of a model in safetensors.
        label: The class whose probability is the reward: its name in the model's ``id2label`` or its index. None is
            the class named "positive" or "pos", else the last.
        device: "auto" (CUDA, else CPU) or a torch device.
        batch_size: Texts scored at once.
        truncation_side: Which end of a text is dropped where it is longer than the model's limit; "left" keeps the end.
        trust_remote_code: Whether Python code of the model's folder or repository may run.

    Raises:
        ValueError: There is no such model, it has no safetensors weights, or an argument is wrong.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        label: str | int | None = None,
        device: str | torch.device = "auto",
        batch_size: int = 32,
        truncation_side: str = "left",
        trust_remote_code: bool = False,
    ):
        check_one_of("truncation_side", truncation_side, ("left", "right"))
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        from textgym.hub import load_pretrained
        from textgym.models import resolve_device

        self.fingerprint = os.fspath(model)
        self.batch_size = check_int("batch_size", batch_size)
        self.device = resolve_device(device)
        code = {"trust_remote_code": trust_remote_code}
        self.tokenizer: PreTrainedTokenizerBase
        self.model: PreTrainedModel
        try:
            labels = load_pretrained(AutoConfig, model, **code).id2label
            self.tokenizer = load_pretrained(AutoTokenizer, model, truncation_side=truncation_side, **code)
            self.model = load_pretrained(AutoModelForSequenceClassification, model, **code)
        except (OSError, ValueError) as error:
            raise ValueError(
                "reward must be a function, a name of the task's, or the hub id or folder of a sequence-classification "
                f"model with a tokenizer and safetensors weights, got {self.fingerprint!r}: {error}"
            ) from error
        self.label = _label_index(labels, label)
        self.model.eval().to(self.device)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Decoder classifiers read the score at the last token that is not padding, found by this id.
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        limit = getattr(self.model.config, "max_position_embeddings", None)
        self.max_length = min(limit or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Score N texts, float64 (N,), without use of references (see `RewardFunction`)."""
        import torch

        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        scores = np.zeros(len(texts))
        if not texts:
            return scores
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        # Longest first, for batches of similar lengths, of which one that is too large for the device fails at once.
        order = sorted(range(len(texts)), key=lambda i: -len(encoded["input_ids"][i]))
        with torch.inference_mode():
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = self.tokenizer.pad(
                    {key: [values[i] for i in rows] for key, values in encoded.items()},
                    padding_side="right",
                    return_tensors="pt",
                )
                logits = self.model(**batch.to(self.device)).logits.float()
                values = logits[:, 0] if logits.shape[1] == 1 else logits.softmax(-1)[:, self.label]
                scores[rows] = values.cpu().numpy()
        return scores


def _label_index(id2label: dict[int, str], label: str | int | None) -> int:
    names = {name.lower(): index for index, name in id2label.items()}
    if label is None:
        return names.get("positive", names.get("pos", max(id2label)))
    if isinstance(label, str) and label.lower() in names:
        return names[label.lower()]
    if isinstance(label, int) and label in id2label:
        return label
    raise ValueError(f"label must be one of {sorted(names)} or {sorted(id2label)}, got {label!r}")
