"""Rewards against independent references, and the invariants a batched reward must have."""

from __future__ import annotations

import copy
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider_scorer import CiderScorer
from rouge_score.rouge_scorer import RougeScorer
from scipy.special import logit

from textgym.data.sources import load_split
from textgym.rewards import load_reward, split_parts
from textgym.rewards.classifier import ModelReward, fragment, sentiment_reward
from textgym.rewards.overlap import (
    CIDER_WEIGHT,
    COVERAGE_WEIGHT,
    CiderDScorer,
    cider_coverage_reward,
    coverage,
    rouge_l_reward,
    words_of,
)
from textgym.rewards.preference import CORRUPTIONS, preference_reward

WORDS = ["a", "the", "dog", "man", "runs", "throws", "ball", "to", "on", "in", "park"]
SENTENCE = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)

DOCUMENTS = st.lists(st.lists(SENTENCE, min_size=1, max_size=4), min_size=2, max_size=8)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTGYM_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def sentiment(cache):
    return sentiment_reward("mini")


@pytest.fixture(scope="module")
def preference(cache):
    return preference_reward("mini")


def score(reward, prompts, completions, references=None):
    values = reward(prompts=prompts, completions=completions, references=references or [()] * len(prompts))
    return split_parts(values, len(prompts))[0]


# Overlap


@settings(max_examples=150, deadline=None)
@given(documents=DOCUMENTS, data=st.data())
def test_cider_d_equals_pycocoevalcap_per_item(documents, data):
    documents[0].append("a dog runs")  # pycocoevalcap stops at a corpus without words
    candidates = data.draw(st.lists(SENTENCE, min_size=len(documents), max_size=len(documents)))
    scorer = CiderScorer()
    for candidate, references in zip(candidates, documents, strict=True):
        scorer += (candidate, references)
    _, expected = scorer.compute_score()
    np.testing.assert_allclose(CiderDScorer(documents)(candidates, documents), expected, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(documents=DOCUMENTS, data=st.data())
def test_cider_d_keeps_the_training_document_frequencies(documents, data):
    """Held-out items: pycocoevalcap with the counts of one corpus scores the items of another of the same size."""
    held_out = data.draw(
        st.lists(st.lists(SENTENCE, min_size=1, max_size=3), min_size=len(documents), max_size=len(documents))
    )
    candidates = data.draw(st.lists(SENTENCE, min_size=len(documents), max_size=len(documents)))
    frozen, scorer = CiderScorer(), CiderScorer()
    for references in documents:
        frozen += (None, references)
    frozen.compute_doc_freq()
    for candidate, references in zip(candidates, held_out, strict=True):
        scorer += (candidate, references)
    scorer.document_frequency = frozen.document_frequency
    np.testing.assert_allclose(CiderDScorer(documents)(candidates, held_out), scorer.compute_cider(), atol=1e-6)


def test_cider_d_words_and_missing_references():
    cider = CiderDScorer([["the dog runs"], ["a man throws a ball"]])
    assert words_of("The man's DOG, runs!") == ["the", "man's", "dog", "runs"]
    assert cider([" The dog, RUNS."], [["the dog runs"]]) == cider(["the dog runs"], [["the dog runs"]])
    assert cider(["the dog runs"], [()]) == 0


@pytest.mark.parametrize(
    ("concepts", "text", "expected"),
    [
        ("dog run field", " The dogs were running over fields.", 1.0),
        ("child stand throw", " Children stood and threw it.", 1.0),
        ("leave leaf knife", " The leaves, the knives", 1.0),
        ("wear tooth woman", " the women wore", 2 / 3),
        ("dog run field", " doggerel runner up", 0.0),
        ("dog run field", "", 0.0),
    ],
)
def test_coverage_counts_inflected_forms(concepts, text, expected):
    assert coverage([f"generate a sentence with: {concepts}"], [text]) == pytest.approx(expected)
    assert coverage([concepts], [text]) == pytest.approx(expected)  # a user's own prompt


def test_cider_coverage_parts_and_references_score_high():
    reward = cider_coverage_reward("mini")
    rows = list(load_split("commongen", "validation", "mini").rows)[:100]
    prompts = ["generate a sentence with: " + " ".join(row["concepts"]) for row in rows]
    references = [tuple(row["targets"]) for row in rows]
    parts = reward(prompts=prompts, completions=[" " + texts[0] for texts in references], references=references)
    assert set(parts) == {"cider", "coverage"}
    assert parts["coverage"].mean() > 0.98 * COVERAGE_WEIGHT
    assert parts["coverage"].max() <= COVERAGE_WEIGHT
    assert parts["cider"].max() <= CIDER_WEIGHT
    human = sum(parts.values()).mean()
    listed = score(reward, prompts, [" " + " ".join(row["concepts"]) for row in rows], references).mean()
    other = score(reward, prompts, [" " + texts[0] for texts in references[1:] + references[:1]], references).mean()
    assert human > listed > other


def test_rouge_l_is_the_best_over_references():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    references = [("the dogs ran home", "a cat sat"), ("one",), ()]
    texts = [" the dog runs home", " two", " three"]
    expected = [
        max((scorer.score(r, t)["rougeL"].fmeasure for r in rs), default=0)
        for rs, t in zip(references, texts, strict=True)
    ]
    np.testing.assert_array_equal(score(rouge_l_reward("mini"), ["p"] * 3, texts, references), expected)


# Small trained models


def test_sentiment_is_accurate_on_held_out_fragments_and_leaves_room(sentiment):
    rows = list(load_split("imdb", "test", "mini").rows)
    p = sentiment.probabilities([fragment(row["text"]) for row in rows])
    accuracy = np.mean((p > 0.5) == [row["label"] for row in rows])
    assert sentiment.accuracy == pytest.approx(accuracy)
    assert accuracy > 0.85
    assert np.quantile(p, 0.9) - np.quantile(p, 0.1) > 0.5
    assert np.quantile(p, 0.9) < 0.999


def test_repetition_does_not_pay_in_sentiment(sentiment):
    """A text said four times over has half the log-odds, but for the bigram where two copies meet."""
    texts = [fragment(row["text"]) for row in load_split("imdb", "test", "mini").rows]
    once, often = sentiment.probabilities(texts), sentiment.probabilities([" ".join([text] * 4) for text in texts])
    np.testing.assert_allclose(logit(often), logit(once) / 2, atol=0.1)
    assert often[once > 0.55].mean() < once[once > 0.55].mean() - 0.03
    words = sorted(set(words_of(" ".join(texts))))
    word = words[int(sentiment.probabilities(words).argmax())]
    few, many = sentiment.probabilities([" ".join([word] * 3), " ".join([word] * 48)])
    assert few > many > 0.5
    assert sentiment.probabilities([""]) == 0.5


def test_preference_orders_held_out_pairs(preference):
    assert preference.accuracy > 0.9
    assert min(preference.report["test"][kind] for kind in CORRUPTIONS) > 0.75
    rows = list(load_split("tldr", "test", "mini").rows)[:50]
    prompts = [f"SUBREDDIT: r/{r['subreddit']}\nTITLE: {r['title']}\nPOST: {r['post']}\nTL;DR:" for r in rows]
    authors = score(preference, prompts, [" " + r["summary"] for r in rows])
    swapped = score(preference, prompts, [" " + r["summary"] for r in rows[1:] + rows[:1]])
    assert np.mean(authors > swapped) > 0.75
    assert np.isfinite(score(preference, ["", "x"], ["", " "])).all()


@pytest.mark.parametrize("name", ["sentiment", "preference"])
def test_trained_rewards_score_a_text_alike_in_any_batch_copy_and_process(name, request):
    reward = request.getfixturevalue(name)
    rows = list(load_split("tldr", "validation", "mini").rows)[:12]
    prompts, texts = [row["post"] for row in rows], [" " + row["summary"] for row in rows]
    scores = score(reward, prompts, texts)
    order = random.Random(0).sample(range(12), 12)
    np.testing.assert_array_equal(score(reward, [prompts[i] for i in order], [texts[i] for i in order]), scores[order])
    alone = [score(reward, [p], [t])[0] for p, t in zip(prompts, texts, strict=True)]
    np.testing.assert_allclose(alone, scores, atol=1e-12)
    for other in (copy.deepcopy(reward), pickle.loads(pickle.dumps(reward))):
        np.testing.assert_array_equal(score(other, prompts, texts), scores)
        assert other.fingerprint == reward.fingerprint
    assert score(reward, [], []).shape == (0,)


def test_training_is_cached_by_what_it_saw(cache, sentiment, monkeypatch):
    folder = cache / "rewards" / f"sentiment-{sentiment.fingerprint}"
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "weights.safetensors"]
    assert json.loads((folder / "report.json").read_text())["test"]["accuracy"] == sentiment.accuracy
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".") and path.suffix != ".lock"]
    trained = []

    def train(*_):
        trained.append(True)
        return {"weights": np.zeros(1)}, {"test": {"accuracy": 0}}

    monkeypatch.setattr("textgym.rewards.classifier._train_sentiment", train)
    again = sentiment_reward("mini")
    np.testing.assert_array_equal(again.weights, sentiment.weights)
    assert not trained
    split = load_split("imdb", "train", "mini")
    monkeypatch.setattr("textgym.rewards.classifier.load_split", lambda *_: type(split)(split.rows, "other"))
    assert sentiment_reward("mini").fingerprint != sentiment.fingerprint
    assert trained


# Any sequence-classification model


@pytest.fixture(scope="module", params=["bert", "gpt2"])
def classifier_folder(request, tmp_path_factory) -> Path:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp(request.param)
    words = ["[PAD]", "[UNK]", "[EOS]", *["a", "good", "bad", "film", "it", "was", "very", "not"]]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        eos_token="[EOS]",
        pad_token="[PAD]" if request.param == "bert" else None,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    shared = {
        "vocab_size": len(words),
        "max_position_embeddings": 24,
        "id2label": {0: "NEGATIVE", 1: "NEUTRAL", 2: "POSITIVE"},
        "initializer_range": 0.5,
    }
    config = (
        BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, **shared)
        if request.param == "bert"
        else GPT2Config(n_embd=16, n_layer=2, n_head=2, bos_token_id=2, eos_token_id=2, **shared)
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    return folder


TEXTS = [
    " good",
    " it was a very good film",
    " bad bad film it was not good",
    " not",
    " it was not very bad film a good film it",
]


def test_model_reward_is_the_models_probability_for_any_batch(classifier_folder):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    reward = ModelReward(classifier_folder, batch_size=2, device="cpu")
    prompts = ["a film", "it", "a bad film", "a", "it was"]
    scores = score(reward, prompts, TEXTS)
    model = AutoModelForSequenceClassification.from_pretrained(classifier_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier_folder)
    with torch.no_grad():
        for prompt, text, value in zip(prompts, TEXTS, scores, strict=True):
            ids = torch.tensor([tokenizer(prompt + text)["input_ids"]])
            logits = model.base_model(ids)
            features = logits.pooler_output if hasattr(logits, "pooler_output") else logits.last_hidden_state[:, -1]
            head = model.classifier if hasattr(model, "classifier") else model.score
            assert value == pytest.approx(float(head(features).softmax(-1)[0, 2]), abs=1e-5)
    np.testing.assert_allclose(score(reward, prompts[::-1], TEXTS[::-1])[::-1], scores, atol=1e-5)
    np.testing.assert_allclose(score(pickle.loads(pickle.dumps(reward)), prompts, TEXTS), scores, atol=1e-6)
    assert np.ptp(scores) > 1e-3


def test_model_reward_truncates_and_chooses_its_class(classifier_folder):
    long = " good film" * 30
    left, right = (ModelReward(classifier_folder, truncation_side=side, device="cpu") for side in ("left", "right"))
    assert score(left, ["bad" + long], [" not"]) == pytest.approx(score(left, [""], [long + " not"]))
    assert score(right, ["bad" + long], [" not"]) == pytest.approx(score(right, ["bad" + long], [""]))
    assert score(left, ["bad" + long], [" not"]) != pytest.approx(score(right, ["bad" + long], [" not"]))
    by_class = [ModelReward(classifier_folder, label=label, device="cpu") for label in (0, "neutral", 2)]
    shares = [score(reward, ["a"], TEXTS[:1])[0] for reward in by_class]
    assert sum(shares) == pytest.approx(1)
    assert ModelReward(classifier_folder).label == 2
    for argument in ({"label": "happy"}, {"label": 3}, {"truncation_side": "up"}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(argument))):
            ModelReward(classifier_folder, **argument)


# What the environment asks of a reward


def test_load_reward_by_name_function_folder_or_not_at_all(classifier_folder):
    def own(**_):
        return [0.0]

    named = {"first": lambda source: ("first", source)}
    assert load_reward("first", named, "folder") == ("first", "folder")
    assert load_reward(own, named, "mini") is own
    assert isinstance(load_reward(str(classifier_folder), named, "mini"), ModelReward)
    for wrong in ("second", 3):
        with pytest.raises(ValueError, match=r"reward must be None, one of \['first'\].*got"):
            load_reward(wrong, named, "mini")


def test_split_parts_sums_parts_and_refuses_what_is_no_reward():
    total, parts = split_parts({"a": [1, 2], "b": np.array([0.5, 0.25], np.float32)}, 2)
    np.testing.assert_array_equal(total, [1.5, 2.25])
    assert {name: part.dtype for name, part in parts.items()} == {"a": np.float64, "b": np.float64}
    assert list(split_parts([1.0], 1)[1]) == ["reward"]
    for wrong in ([1.0], 1.0, None, ["x", "y"], [1.0, float("nan")], {"a": [1.0, 2.0], "b": [1.0]}, {}, [[1.0], [2.0]]):
        with pytest.raises(ValueError, match="mine must return"):
            split_parts(wrong, 2, "mine")
