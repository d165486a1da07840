"""Metrics against their reference implementations, and what all of them keep to."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import time
import zipfile

import bert_score
import evaluate
import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu
from pycocoevalcap.cider.cider_scorer import CiderScorer
from pycocoevalcap.meteor import meteor as pycocoevalcap_meteor
from rouge_score.rouge_scorer import RougeScorer
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
)

from textgym.metrics import NAMES, MissingRequirement, java, load
from textgym.rewards.overlap import words_of

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")

TEXTS = {
    "prompts": ["generate a sentence with: dog run", "generate a sentence with: man ball", "with: cat", "with: sea"],
    "predictions": [" the dog runs in the park", " a man threw one Ball.", " nothing at all", ""],
    "references": [
        ["the dog runs in a park", "a dog was running"],
        ["the man throws a ball"],
        ["a cat sleeps", "the cat is asleep", "it sleeps"],
        ["waves roll in"],
    ],
}
ALWAYS = ("distinct", "self_bleu", "rouge", "bleu", "cider_d", "coverage", "sentiment", "preference")
MODEL = GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, initializer_range=0.5)


def compute(name: str, **columns) -> dict[str, float]:
    return load(name).compute(**columns)


# What every metric keeps to


def test_importing_and_naming_metrics_loads_nothing():
    code = "import sys, textgym.metrics as m; print(len(m.NAMES), {'torch', 'evaluate', 'datasets'} & {*sys.modules})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"{len(NAMES)} set()"
    with pytest.raises(ValueError, match=r"name must be one of .*'rouge'.*, got 'beauty'"):
        load("beauty")
    with pytest.raises(TypeError, match="colour"):
        load("rouge", colour="red")


@pytest.mark.parametrize("name", ALWAYS)
def test_a_metric_is_an_evaluate_metric_whatever_way_it_is_fed(name):
    metric = load(name)
    assert isinstance(metric, evaluate.Metric)
    assert metric.name == name
    assert metric.citation
    assert metric.signature
    whole = metric.compute(**TEXTS)
    assert all(type(value) is float and math.isfinite(value) for value in whole.values())
    json.dumps(whole)
    assert metric.compute(**TEXTS) == whole  # nothing of the first is left in the second
    for rows in (slice(0, 3), slice(3, None)):
        metric.add_batch(**{column: values[rows] for column, values in TEXTS.items()})
    assert metric.compute() == whole
    for prompt, text, references in zip(*TEXTS.values(), strict=True):
        metric.add(prompts=prompt, prediction=text, reference=references)
    assert metric.compute() == whole
    needed = {column: TEXTS[column] for column in metric.features}
    assert metric.compute(**needed) == whole
    with pytest.raises(ValueError, match=r"must hold at least one text|must hold a text for at least one"):
        metric.compute(**{column: [] for column in TEXTS})
    with pytest.raises(ValueError, match="must be given"):
        metric.compute()
    with pytest.raises(ValueError, match="colour"):
        metric.compute(**TEXTS, colour="red")
    for column in needed:
        with pytest.raises(ValueError, match=rf"was not given \['{column}'\]|{column} must be given"):
            metric.compute(**{**TEXTS, column: None})
    if len(needed) > 1:
        with pytest.raises(ValueError, match="Mismatch"):
            metric.compute(**{**TEXTS, "predictions": TEXTS["predictions"][1:]})
    assert metric.compute(**TEXTS) == whole  # and it works on after errors


def test_results_of_metrics_have_names_of_their_own_and_combine():
    together = evaluate.combine([load(name) for name in ALWAYS]).compute(**TEXTS)
    apart = [load(name).compute(**TEXTS) for name in ALWAYS]
    assert together == {key: value for values in apart for key, value in values.items()}
    assert len(together) == sum(map(len, apart))


@pytest.mark.parametrize("name", ["rouge", "bleu", "cider_d", "preference"])
def test_texts_without_references_are_left_out_and_a_string_is_one_reference(name):
    some = {column: values[:2] for column, values in TEXTS.items()}
    more = {**TEXTS, "references": [*TEXTS["references"][:2], [], ()]}
    assert compute(name, **more) == compute(name, **some)
    single = ["a dog", "a ball"]
    listed = compute(name, **{**some, "references": [[text] for text in single]})
    assert compute(name, **{**some, "references": single}) == listed
    with pytest.raises(ValueError, match="references must hold a text"):
        compute(name, **{**some, "references": [[], []]})


def test_processes_do_not_collide_and_leave_nothing_on_disk(tmp_path):
    code = """
import json, sys
from textgym.metrics import load
text = sys.argv[1]
for _ in range(50):
    print(json.dumps(load("rouge").compute(predictions=[text], references=["one dog runs"])))
"""
    caches = {name: str(tmp_path / name) for name in ("HF_METRICS_CACHE", "HF_EVALUATE_CACHE", "HF_HOME")}
    texts = ("one dog runs", "one dog")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, text], env={**os.environ, **caches}, stdout=subprocess.PIPE)
        for text in texts
    ]
    for text, process in zip(texts, processes, strict=True):
        lines = process.communicate()[0].splitlines()
        assert [json.loads(line) for line in lines] == 50 * [
            compute("rouge", predictions=[text], references=["one dog runs"])
        ]
    assert list(tmp_path.rglob("*")) == []


# Overlap


def test_rouge_is_that_of_rouge_score():
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)
    rows = [scorer.score_multi(*row) for row in zip(TEXTS["references"], TEXTS["predictions"], strict=True)]
    assert compute("rouge", **TEXTS) == {
        name: pytest.approx(np.mean([row[kind].fmeasure for row in rows]))
        for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2"), ("rouge_l", "rougeL"))
    }


def test_bleu_is_that_of_sacrebleu():
    padded = [[*references, *[None] * (3 - len(references))] for references in TEXTS["references"]]
    hypotheses = [text.strip() for text in TEXTS["predictions"]]
    expected = sacrebleu.corpus_bleu(hypotheses, list(zip(*padded, strict=True))).score
    assert compute("bleu", **TEXTS) == {"bleu": pytest.approx(expected)}
    assert expected > 0


def test_cider_d_is_that_of_pycocoevalcap_on_the_same_words():
    scorer = CiderScorer()
    for text, references in zip(TEXTS["predictions"], TEXTS["references"], strict=True):
        scorer += (" ".join(words_of(text)), [" ".join(words_of(reference)) for reference in references])
    assert compute("cider_d", **TEXTS) == {"cider_d": pytest.approx(scorer.compute_score()[0])}


@needs_java
def test_cider_d_is_that_of_captions_where_the_tokenizers_agree():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    predictions = ["A man, in red, rides a horse.", "Two dogs play; one sleeps!", "the sea is very calm"]
    references = [["A man rides a brown horse."], ["Dogs are playing.", "two dogs and a cat"], ["A calm sea"]]
    tokenizer, scorer = PTBTokenizer(), CiderScorer()
    words = [
        tokenizer.tokenize({i: [{"caption": text} for text in texts] for i, texts in enumerate(column)})
        for column in ([[text] for text in predictions], references)
    ]
    for row in range(3):
        scorer += (words[0][row][0], words[1][row])
    scores = compute("cider_d", predictions=predictions, references=references)
    assert scores == {"cider_d": pytest.approx(scorer.compute_score()[0])}


def test_coverage_counts_concepts():
    assert compute("coverage", **TEXTS) == {"coverage": 0.5}


# Diversity

TEXT = st.lists(st.sampled_from("abcd"), max_size=9).map(" ".join)


@given(st.lists(TEXT, min_size=1, max_size=6))
def test_distinct_n_pools_all_texts(texts):
    for n, value in enumerate(load("distinct").compute(predictions=texts).values(), start=1):
        ngrams = [text.split()[i : i + n] for text in texts for i in range(len(text.split()) - n + 1)]
        assert value == len(set(map(tuple, ngrams))) / max(len(ngrams), 1)


def test_distinct_n_of_words():
    assert compute("distinct", predictions=[" a b a b", " A, b"]) == {"distinct_1": 2 / 6, "distinct_2": 2 / 4}


@settings(deadline=None)
@given(st.lists(TEXT, min_size=2, max_size=6))
def test_self_bleu_is_that_of_nltk_against_all_other_texts(texts):
    words = [text.split() for text in texts]
    smoothing = SmoothingFunction().method1
    bleus = [
        sentence_bleu(words[:i] + words[i + 1 :], words[i], smoothing_function=smoothing) if words[i] else 0.0
        for i in range(len(words))
    ]
    assert load("self_bleu").compute(predictions=texts) == {"self_bleu": pytest.approx(np.mean(bleus))}


def test_self_bleu_of_a_thousand_texts_takes_no_time():
    rng = np.random.default_rng(0)
    vocabulary = np.array([f"w{i}" for i in range(2000)])
    texts = [" ".join(vocabulary[rng.zipf(1.3, size=48) % 2000]) for _ in range(1000)]
    started = time.perf_counter()
    (value,) = compute("self_bleu", predictions=texts).values()
    assert time.perf_counter() - started < 10
    assert 0 < value < 1
    assert compute("self_bleu", predictions=["just one text here"]) == {"self_bleu": 0}
    assert compute("self_bleu", predictions=["the same four words"] * 3) == {"self_bleu": 1}


# Models


def test_perplexity_equals_a_direct_computation_text_by_text():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(MODEL).train()
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
        metric = load("perplexity", model=model, batch_size=batch_size)
        scores = metric.compute(prompt_ids=prompts, prediction_ids=texts)
        assert scores == {"perplexity": pytest.approx(expected, rel=1e-5)}
    assert model.training


@pytest.mark.parametrize(
    ("prompt_ids", "prediction_ids", "named"),
    [([[1]], [[]], "prediction_ids"), ([[1]], [[1], [2]], "prediction_ids"), ([[]], [[1]], "prompt_ids")],
)
def test_perplexity_refuses_what_it_cannot_judge(prompt_ids, prediction_ids, named):
    with pytest.raises(ValueError, match=named):
        load("perplexity", model=GPT2LMHeadModel(MODEL)).compute(prompt_ids=prompt_ids, prediction_ids=prediction_ids)


def test_perplexity_is_of_causal_models():
    model = BartForConditionalGeneration(BartConfig(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1))
    with pytest.raises(ValueError, match="model must be a causal language model, got a BartForConditionalGeneration"):
        load("perplexity", model=model)


PAIRS = {
    "predictions": ["the dog runs in a park", "A man threw one Ball.", "nothing at all", "a cat", " a dog\nbarks "],
    "references": [
        ["the dog was running in the park", "dogs run"],
        ["the man throws a ball"],
        ["a cat sleeps", "the cat is asleep", "it sleeps"],
        ["a cat"],
        ["a dog barks at the man who throws a ball for it, again and again"],
    ],
}


def bert_score_of(encoder: str, layer: int, predictions, references) -> dict:
    """What the package bert-score says."""
    scores = bert_score.score(predictions, references, model_type=encoder, num_layers=layer, device="cpu", nthreads=0)
    names = ("bert_score_precision", "bert_score_recall", "bert_score_f1")
    return {name: pytest.approx(float(values.mean()), abs=1e-6) for name, values in zip(names, scores, strict=True)}


@pytest.mark.parametrize("layer", [1, 5, 6])
def test_bert_score_is_that_of_bert_score(encoder, layer):
    for batch_size in (2, 32):
        metric = load("bert_score", encoder=encoder, layer=layer, device="cpu", batch_size=batch_size)
        assert metric.compute(**PAIRS) == bert_score_of(encoder, layer, **PAIRS)


def test_bert_score_takes_a_layer_by_the_depth_of_the_encoder_and_names_it(encoder):
    metric = load("bert_score", encoder=encoder, device="cpu")
    assert metric.signature == f"{encoder}, layer 5, no idf, no rescaling"
    same = metric.compute(predictions=["a cat", "a dog"], references=[["a dog", "a cat"], "a dog"])
    assert same == dict.fromkeys(same, pytest.approx(1))
    # An empty text matches nothing, though its start and end tokens could be matched.
    half = metric.compute(predictions=["", "a dog", "x"], references=["a cat", "a dog", ""])
    assert half == dict.fromkeys(half, pytest.approx(1 / 3))
    for layer in (0, 7):
        with pytest.raises(ValueError, match=f"layer must be in 1 to 6.*{layer}"):
            load("bert_score", encoder=encoder, layer=layer)
    with pytest.raises(ValueError, match=r"encoder must be .* got '/nowhere'"):
        load("bert_score", encoder="/nowhere")


def test_bert_score_of_roberta_and_of_the_encoder_of_bart(tmp_path):
    texts = [text for texts in (PAIRS["predictions"], *PAIRS["references"]) for text in texts]
    tokens = ByteLevelBPETokenizer()
    tokens.train_from_iterator(texts * 2, vocab_size=300, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    tokens.save_model(str(tmp_path))
    # bert-score puts a space before a first word, which the tokenizer has to be told here since transformers 5.
    tokenizer = RobertaTokenizer.from_pretrained(tmp_path, add_prefix_space=True, model_max_length=38)
    sizes = {"vocab_size": len(tokenizer), "pad_token_id": 1, "max_position_embeddings": 40}
    bert = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    bart = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64}
    torch.manual_seed(0)
    for name, model, layer in (
        ("roberta", RobertaModel(RobertaConfig(**sizes, **bert)), 2),
        ("bart", BartModel(BartConfig(**sizes, **bart, decoder_layers=1)), 1),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        metric = load("bert_score", encoder=tmp_path / name, layer=layer, device="cpu")
        assert metric.compute(**PAIRS) == bert_score_of(str(tmp_path / name), layer, **PAIRS)


# Java


@pytest.fixture
def fake_java(tmp_path, monkeypatch):
    """Makes `java` a shell script, which runs where it is asked for its version."""

    def make(script: str, version: str = "exit 0") -> None:
        (tmp_path / "java").write_text(f"#!/bin/sh\n[ $1 = -version ] && {version}\n{script}\n")
        (tmp_path / "java").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return make


@pytest.mark.parametrize("name", ["meteor", "spice"])
def test_java_and_the_package_that_carries_the_programs_are_missed_at_once(name, monkeypatch, fake_java, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingRequirement, match=r"need Java.*no `java` on the PATH that runs"):
        load(name)
    fake_java("", version="exit 1")
    with pytest.raises(MissingRequirement, match=r"need Java.*no `java` on the PATH that runs"):
        load(name)
    fake_java("")
    monkeypatch.setattr(java, "find_spec", lambda name: None)
    with pytest.raises(MissingRequirement, match=r'pip install "textgym\[metrics\]"'):
        load(name)


def test_spice_says_that_it_needs_corenlp_and_why_it_fails(monkeypatch, fake_java, tmp_path):
    fake_java("echo no memory left >&2; exit 3")
    (tmp_path / "spice" / "lib").mkdir(parents=True)
    monkeypatch.setattr(java, "_package", lambda: tmp_path)
    with pytest.raises(MissingRequirement, match=r"3\.6\.0\.jar.*3\.6\.0-models\.jar must be in .*get_stanford_models"):
        load("spice")
    for name in java.CORENLP:
        (tmp_path / "spice" / "lib" / name).touch()
    with pytest.raises(RuntimeError, match="SPICE failed with exit code 3: no memory left"):
        load("spice").compute(**TEXTS)


def test_a_meteor_that_dies_is_reported_and_not_asked_again(fake_java):
    java._meteor.cache_clear()
    metric = load("meteor")
    for number in (3, 4):
        fake_java(f"read line; echo no memory left >&2; exit {number}")
        with pytest.raises(RuntimeError, match=f"METEOR failed with exit code {number}: no memory left"):
            metric.compute(**TEXTS)


@needs_java
@pytest.mark.slow
def test_meteor_is_that_of_pycocoevalcap_and_starts_once():
    texts = {
        "predictions": [*TEXTS["predictions"], "naïve “quotes” |||\n and\r lines", "same words"],
        "references": [*TEXTS["references"], ["quotes ||| lines"], ["same words", ""]],
    }
    score = compute("meteor", **texts)
    process = java._meteor(os.getpid()).process
    wrapper = pycocoevalcap_meteor.Meteor()
    lines = [[java._line(text) for text in references] for references in texts["references"]]
    expected, _ = wrapper.compute_score(
        dict(enumerate(lines)), {row: [java._line(text)] for row, text in enumerate(texts["predictions"])}
    )
    assert score == {"meteor": expected}
    assert 0.2 < expected < 0.5
    assert compute("meteor", predictions=["a man rides a horse"], references=["a man rides a horse"])["meteor"] > 0.99
    assert java._meteor(os.getpid()).process is process
    assert process.poll() is None


# A parser that takes every word for an object of the scene, in place of the one that needs CoreNLP's models.
PARSER = """
package edu.anu.spice;

import edu.cmu.meteor.aligner.SynonymDictionary;
import edu.cmu.meteor.util.Constants;
import java.net.URL;
import java.util.*;

public class SpiceParser {
    SynonymDictionary synonyms;

    public SpiceParser(String cache, int threads, Boolean merge) throws Exception {
        String folder = Constants.DEFAULT_SYN_DIR_URL.toString();
        URL exceptions = new URL(folder + "/english.exceptions");
        synonyms = new SynonymDictionary(
            exceptions, new URL(folder + "/english.synsets"), new URL(folder + "/english.relations"));
    }

    public List<SceneGraph> parseCaptions(List<String> texts) {
        return parseCaptions(texts, Collections.nCopies(texts.size(), 1));
    }

    public List<SceneGraph> parseCaptions(List<String> texts, List<Integer> sizes) {
        List<SceneGraph> graphs = new ArrayList<>();
        Iterator<String> text = texts.iterator();
        for (int size : sizes) {
            SceneGraph graph = new SceneGraph(synonyms, true);
            for (int i = 0; i < size; i++)
                for (String word : text.next().trim().split("\\\\s+")) graph.addObject(word);
            graphs.add(graph);
        }
        return graphs;
    }
}
"""


@pytest.mark.skipif(shutil.which("javac") is None, reason="needs a Java compiler")
def test_spice_without_its_parser(tmp_path, monkeypatch):
    package = java._package()
    shutil.copytree(package / "spice" / "lib", tmp_path / "spice" / "lib", copy_function=os.symlink)
    code, models = (tmp_path / "spice" / "lib" / name for name in java.CORENLP)
    code.symlink_to(package / "tokenizer" / "stanford-corenlp-3.4.1.jar")  # has the graphs, and no models
    models.touch()
    (tmp_path / "SpiceParser.java").write_text(PARSER)
    program = package / "spice" / "spice-1.0.jar"
    path = os.pathsep.join([str(program), f"{package / 'spice' / 'lib'}/*", str(code)])
    subprocess.run(
        ["javac", "-nowarn", "-cp", path, "-d", str(tmp_path), str(tmp_path / "SpiceParser.java")], check=True
    )
    with zipfile.ZipFile(program) as whole, zipfile.ZipFile(tmp_path / "spice" / "spice-1.0.jar", "w") as jar:
        for name in whole.namelist():
            if name.startswith(("edu/", "META-INF/MANIFEST")) and "SpiceParser" not in name:
                jar.writestr(name, whole.read(name))
        jar.write(tmp_path / "edu" / "anu" / "spice" / "SpiceParser.class", "edu/anu/spice/SpiceParser.class")
    monkeypatch.setattr(java, "_package", lambda: tmp_path)
    scores = compute(
        "spice",
        predictions=["dog car", "stone", "naïve “tree”", "cat"],
        references=[["dog automobile", "tree"], ["water", "boat"], ["naïve “tree” cat", "sky"], ["cat", "cat"]],
    )
    # Right of written and of the references: 2/2 and 2/3 (a car is an automobile), none, 2/2 and 2/4, all.
    assert scores == {"spice": pytest.approx((4 / 5 + 0 + 2 / 3 + 1) / 4, abs=5e-4)}


# Rewards


def test_sentiment_is_the_reward_of_imdb():
    from textgym.rewards.classifier import sentiment_reward

    rewards = sentiment_reward("mini")(
        prompts=TEXTS["prompts"], completions=TEXTS["predictions"], references=TEXTS["references"]
    )
    assert load("sentiment", source="mini").compute(**TEXTS) == {"sentiment": pytest.approx(rewards.mean())}
    with pytest.raises(ValueError, match="source must be"):
        load("sentiment", source="nowhere")


def length(*, prompts, completions, references):
    return [len(text.split()) for text in completions]


def test_preference_is_the_score_and_the_share_of_wins_against_each_reference():
    scores = load("preference", reward=length).compute(
        prompts=["p"] * 3,
        predictions=[" a b c", " a b", ""],
        references=[["a", "a b c d", "c b a", "a"], ["b a"], ["a", "b"]],
    )
    assert scores == {"preference": pytest.approx(5 / 3), "win_rate": pytest.approx((2.5 / 4 + 1 / 2 + 0) / 3)}


def test_the_preference_model_prefers_references_to_other_texts():
    from textgym.tasks import TASKS

    rows = TASKS["tldr"].split("test", "mini").rows
    columns = {
        "prompts": ["".join(TASKS["tldr"].prompt_of(row)) for row in rows],
        "references": [TASKS["tldr"].references_of(row) for row in rows],
    }
    metric = load("preference", source="mini")
    same = metric.compute(predictions=[texts[0] for texts in columns["references"]], **columns)
    assert same["win_rate"] == 0.5
    other = metric.compute(
        predictions=[texts[0] for texts in columns["references"][1:] + columns["references"][:1]], **columns
    )
    assert other["win_rate"] < 0.2
    assert other["preference"] < same["preference"]
