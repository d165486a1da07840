"""Metrics against direct computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import sacrebleu
import torch
from pycocoevalcap.cider.cider_scorer import CiderScorer
from transformers import GPT2Config, GPT2LMHeadModel

from textgym.metrics import METRICS, perplexity

TEXTS = {
    "prompts": ["generate a sentence with: dog run", "generate a sentence with: man ball", "with: cat"],
    "completions": [" the dog runs in the park", " a man threw one Ball.", " nothing at all"],
    "references": [("the dog runs in a park", "a dog was running"), ("the man throws a ball",), ("a cat sleeps",)],
}


def test_metrics_of_texts():
    values = {name: metric(**TEXTS) for name, metric in METRICS.items()}
    assert values["distinct_1"] == 13 / 14  # only "the" stands twice
    scorer = CiderScorer()
    for text, references in zip(TEXTS["completions"], TEXTS["references"], strict=True):
        scorer += (text.lower().replace(".", ""), list(references))
    assert values["cider_d"] == pytest.approx(scorer.compute_score()[0])
    assert values["coverage"] == pytest.approx(2 / 3)
    padded = [[*references, *[None] * (2 - len(references))] for references in TEXTS["references"]]
    hypotheses = [text.strip() for text in TEXTS["completions"]]
    assert values["bleu"] == pytest.approx(sacrebleu.corpus_bleu(hypotheses, list(zip(*padded, strict=True))).score)


def test_distinct_pools_all_texts():
    texts = {"prompts": ["", ""], "completions": [" a b a b", " A, b"], "references": [(), ()]}
    assert METRICS["distinct_1"](**texts) == 2 / 6
    assert METRICS["distinct_2"](**texts) == 2 / 4
    empty = {"prompts": [""], "completions": [""], "references": [()]}
    assert {name: metric(**empty) for name, metric in METRICS.items()} == dict.fromkeys(METRICS, 0.0)


def test_perplexity_equals_a_direct_computation_text_by_text():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)).train()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(50, size=n).tolist() for n in (1, 7, 3, 12, 5)]
    texts = [rng.integers(50, size=n).tolist() for n in (9, 0, 1, 14, 4)]
    model.eval()
    total = 0.0
    with torch.no_grad():
        for prompt, text in zip(prompts, texts, strict=True):
            log_probs = model(torch.tensor([prompt + text])).logits[0].log_softmax(-1)
            total -= sum(float(log_probs[len(prompt) + h - 1, token]) for h, token in enumerate(text))
    model.train()
    expected = math.exp(total / sum(map(len, texts)))
    for batch_size in (1, 2, 16):
        assert perplexity(model, prompts, texts, batch_size=batch_size) == pytest.approx(expected, rel=1e-5)
    assert model.training


@pytest.mark.parametrize(
    ("prompt_ids", "completion_ids", "named"),
    [([[1]], [[]], "completion_ids"), ([[1]], [[1], [2]], "completion_ids"), ([[]], [[1]], "prompt_ids")],
)
def test_perplexity_refuses_what_it_cannot_judge(prompt_ids, completion_ids, named):
    with pytest.raises(ValueError, match=named):
        perplexity(GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=4, n_layer=1, n_head=1)), prompt_ids, completion_ids)
