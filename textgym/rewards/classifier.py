"""Rewards from a classifier of texts: a small sentiment model trained here, and any sequence-classification model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from textgym.checks import check_int, check_one_of
from textgym.data.sources import load_split
from textgym.data.splits import Split, SplitName
from textgym.rewards.trained import Trained, load_or_train

if TYPE_CHECKING:
    import scipy.sparse
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The texts to be judged are a prompt of at most 64 tokens, the first half of a review, and 48 new tokens. A word is
# about 1.25 tokens.
PROMPT_WORDS = 50
NEW_WORDS = 40
# Training adds a random window of each review, this many words.
WINDOW_WORDS = (50, 110)

FEATURES = 2**20
INVERSE_REGULARISATION = 5.0


def fragment(review: str) -> str:
    """The words of a review that an episode would show: the prompt and as much again as the policy writes."""
    words = review.split()
    return " ".join(words[: min(len(words) // 2, PROMPT_WORDS) + NEW_WORDS])


def features(texts: Sequence[str]) -> scipy.sparse.csr_array:
    """Hashed word 1- and 2-grams of texts, float32 (N, features).

    An n-gram counts once however often it is repeated, but every repetition adds to the length the row is divided by
    (the root of the number of n-grams). So saying a text k times over divides its log-odds by the root of k, where the
    usual count or l2 norm would raise or leave them.
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
        fingerprint: What the model was trained on.
        accuracy: Held-out accuracy on fragments of test reviews (see `fragment`).
        report: All that was measured when it was trained.
    """

    def __init__(self, trained: Trained):
        self.weights = trained.arrays["weights"]
        self.fingerprint = trained.fingerprint
        self.report = trained.report
        self.accuracy = float(trained.report["test"]["accuracy"])

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """P(positive) of N texts, float64 (N,); the references play no part (see `RewardFunction`)."""
        return self.probabilities(
            [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        )

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """P(positive) of N whole texts, float64 (N,)."""
        from scipy.special import expit

        if not len(texts):
            return np.zeros(0)
        return expit((features(texts) @ self.weights).astype(np.float64))


def sentiment_reward(source: str) -> SentimentReward:
    """P(positive) by a model trained on the source's training reviews, in seconds, and cached.

    It is trained on fragments as long as the texts it will judge: of each review the one an episode would show, and a
    random window.

    Args:
        source: "mini", "hub" or a folder.
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
    # No intercept: a text that says nothing, or the same again and again, has P(positive) one half.
    model = LogisticRegression(C=INVERSE_REGULARISATION, solver="liblinear", fit_intercept=False)
    weights = model.fit(features(texts), labels).coef_[0].astype(np.float32)
    report: dict[str, Any] = {"seconds": time.perf_counter() - started, "training_texts": len(texts)}

    splits: tuple[SplitName, ...] = ("validation", "test")
    for name in splits:
        split = load_split("imdb", name, source)
        held_out = np.array([row["label"] for row in split.rows])
        p = expit(features([fragment(row["text"]) for row in split.rows]) @ weights)
        report[name] = {
            "accuracy": float(np.mean((p > 0.5) == held_out)),
            "log_loss": float(-np.mean(np.log(np.where(held_out == 1, p, 1 - p).clip(1e-7)))),
            # Calibration: for each fifth of the texts, by P(positive), its mean and the share that is positive.
            "reliability": [
                [float(p[fifth].mean()), float(held_out[fifth].mean())] for fifth in np.array_split(np.argsort(p), 5)
            ],
            "texts": len(held_out),
            "data": split.fingerprint,
        }
    return {"weights": weights}, report


class ModelReward:
    """A class's probability by any sequence-classification model, of the whole text (prompt and completion).

    A model with one output is a scorer (a reward model): its raw score is the reward.

    Args:
        model: Hub id or folder of a model in safetensors.
        label: The class whose probability is the reward: its name in the model's ``id2label`` or its index. None: the
            class called "positive" or "pos" where there is one, else the last.
        device: "auto" (CUDA, else CPU) or a torch device.
        batch_size: Texts scored at once.
        truncation_side: Which end of a text longer than the model's limit is dropped; "left" keeps what was written
            last.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        label: str | int | None = None,
        device: str | torch.device = "auto",
        batch_size: int = 32,
        truncation_side: str = "left",
    ):
        check_one_of("truncation_side", truncation_side, ("left", "right"))
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        from textgym.decoding import resolve_device

        self.fingerprint = os.fspath(model)
        self.batch_size = check_int("batch_size", batch_size)
        self.device = resolve_device(device)
        self.label = _label_index(AutoConfig.from_pretrained(model).id2label, label)
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, truncation_side=truncation_side)
        self.model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(model, use_safetensors=True)
        self.model.eval().to(self.device)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        # Decoder classifiers read the score at the last token that is not padding, which they find by this id.
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        limit = getattr(self.model.config, "max_position_embeddings", None)
        self.max_length = min(limit or self.tokenizer.model_max_length, self.tokenizer.model_max_length)

    def __call__(
        self, *, prompts: Sequence[str], completions: Sequence[str], references: Sequence[Sequence[str]]
    ) -> np.ndarray:
        """Score N texts, float64 (N,); the references play no part (see `RewardFunction`)."""
        import torch

        texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        scores = np.zeros(len(texts))
        if not texts:
            return scores
        encoded = self.tokenizer(texts, truncation=True, max_length=self.max_length)
        # Longest first: batches of like lengths, and one that is too large for the device fails at once.
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
