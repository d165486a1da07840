"""A local model scores given tokens: as its plain forward pass does, whatever else is in the batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_decoding import tiny_model
from test_local_guide import WORDS, text_guide
from test_models import FAMILIES, model_of
from test_policy import tiny_tokenizer

from textgym.guides import CallableGuide, GuideRequest, ScoringGuide
from textgym.guides.local import LocalGuide
from textgym.guides.references import ReferenceGuide
from textgym.seq2seq import decoder_start


def texts_to_score(count=15):
    """Requests of several lengths, some with one beginning, and continuations of no to nine tokens."""
    random = np.random.default_rng(0)
    shared = tuple(random.integers(1, 64, 5).tolist())
    asked, continuations = [], []
    for i in range(count):
        prompt_ids = shared if i % 3 else tuple(random.integers(1, 64, 1 + i % 7).tolist())
        prefix_ids = tuple(random.integers(1, 64, i % 4).tolist())
        asked.append(GuideRequest("", prompt_ids, "", prefix_ids, 9, i))
        continuations.append([*random.integers(1, 64, i % 10).tolist(), *([0] if i % 2 else [])])
    return asked, continuations


@torch.no_grad()
def expected(model, request, ids):
    """Of one text alone, without padding or sharing, by transformers' own forward pass."""
    new = [*request.prefix_ids, *ids]
    if model.config.is_encoder_decoder:
        start = decoder_start(model)
        logits = model(torch.tensor([request.prompt_ids]), decoder_input_ids=torch.tensor([[*start, *new]])).logits[0]
        logits = logits[len(start) - 1 :]
    else:
        logits = model(torch.tensor([[*request.prompt_ids, *new]])).logits[0, len(request.prompt_ids) - 1 :]
    return logits.double().log_softmax(-1)[np.arange(len(request.prefix_ids), len(new)), ids].numpy()


@pytest.mark.parametrize("name", FAMILIES)
def test_scores_are_those_of_the_plain_model(name):
    model, (asked, texts) = model_of(name), texts_to_score()
    references = [expected(model, request, ids) for request, ids in zip(asked, texts, strict=True)]
    assert min(map(len, references)) == 0
    for batch_size, order in ((256, np.arange(15)), (4, np.random.default_rng(1).permutation(15)), (1, np.arange(15))):
        guide = LocalGuide(model, tokenizer=WORDS, device="cpu", batch_size=batch_size)
        scores = guide.score([asked[i] for i in order], [texts[i] for i in order], WORDS)
        for i, of_text in zip(order, scores, strict=True):
            assert of_text.dtype == np.float32
            np.testing.assert_allclose(of_text, references[i], rtol=1e-5, atol=2e-5)


def test_what_is_scored_is_a_distribution():
    """Over all tokens after a text, and so over the whole vocabulary, whatever the guide's decoding is."""
    guide = LocalGuide(tiny_model(), tokenizer=WORDS, device="cpu")
    request = GuideRequest("", (3, 4), "", (5,), 1, 0)
    scores = guide.score([request] * 64, [[token] for token in range(64)], WORDS)
    assert np.exp(np.concatenate(scores, dtype=np.float64)).sum() == pytest.approx(1, abs=1e-5)


def test_logits_in_blocks_are_the_same(monkeypatch):
    guide, (asked, texts) = LocalGuide(tiny_model(), device="cpu"), texts_to_score()
    whole = guide.score(asked, texts, WORDS)
    monkeypatch.setattr("textgym.scoring._LOGITS_AT_ONCE", 5 * 64)
    for scores, before in zip(guide.score(asked, texts, WORDS), whole, strict=True):
        np.testing.assert_allclose(scores, before, atol=1e-6)
    assert guide.score([], [], WORDS) == []


def test_who_cannot_score_says_so():
    asked, texts = texts_to_score()
    for guide in (CallableGuide(lambda requests: ["w2"] * len(requests)), ReferenceGuide()):
        assert not isinstance(guide, ScoringGuide)
    assert isinstance(LocalGuide("gpt2"), ScoringGuide)
    for guide, why in (
        (text_guide()[0], "has another vocabulary"),
        (LocalGuide(tiny_model(), template="Go on: {prompt}"), "has a template, chat or stop of its own"),
        (LocalGuide(tiny_model(), stop=["w3"]), "has a template, chat or stop of its own"),
    ):
        for requests, continuations in ((asked, texts), ([], [])):
            with pytest.raises(ValueError, match=f"guide must read the tokens that the policy reads .* {why}"):
                guide.score(requests, continuations, WORDS)
    with pytest.raises(ValueError, match="the tokenizer has 99 tokens"):
        LocalGuide(tiny_model()).score([], [], tiny_tokenizer(99))
    with pytest.raises(ValueError, match="40 positions"):
        LocalGuide(tiny_model()).score([GuideRequest("", (2,), "", (), 9, 0)], [[3] * 40], WORDS)
