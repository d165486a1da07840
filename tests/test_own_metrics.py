"""Metrics from outside: given as objects or registered under a name, to a task or to an evaluation."""

from __future__ import annotations

import dataclasses

import datasets
import evaluate as hf_evaluate
import gymnasium as gym
import numpy as np
import pytest

import textgym
from agents.evaluation import evaluate
from textgym import metrics
from textgym.metrics import load, register


class Vowels:
    """The share of vowels, with a second value that is no number."""

    signature = "aeiou"

    def compute(self, predictions):
        text = "".join(predictions)
        return {"vowels": np.float32(sum(map(text.count, "aeiou")) / max(len(text), 1)), "most": ["e"]}


class ExactMatch(hf_evaluate.Metric):
    """A metric as evaluate's users write them."""

    def _info(self):
        features = datasets.Features(
            {"predictions": datasets.Value("string"), "references": datasets.List(datasets.Value("string"))}
        )
        return hf_evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, predictions, references):
        pairs = zip(predictions, references, strict=True)
        return {"exact_match": float(np.mean([text.strip() in wanted for text, wanted in pairs]))}


class Longer:
    """Registered by name: needs the source and the start model of the evaluation."""

    needs = {"origin": "source", "judge": "start_model"}  # noqa: RUF012

    def __init__(self, origin, judge):
        self.signature = f"from {origin}, by {judge}"

    def compute(self, **columns):
        assert tuple(columns) == metrics.COLUMNS
        return {"longer": len(columns["prompt_ids"]) + len(columns["prediction_ids"])}


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(metrics, "_FACTORIES", factories := dict(metrics._FACTORIES))
    monkeypatch.setattr(metrics, "NAMES", factories.keys())


def test_a_task_of_ones_own_with_a_metric_of_ones_own(make_policy):
    data = [{"ask": f"colour {i}", "answer": ["red", "blue"]} for i in range(6)]
    task = textgym.Task(
        "coloured",
        data,
        "{ask}",
        "answer",
        8,
        6,
        lambda prompts, completions, references: [0.5] * len(prompts),
        metrics=("distinct", Vowels(), ExactMatch()),
    )
    textgym.register("my/Coloured-v0", task)
    result = evaluate(make_policy(), "my/Coloured-v0", num_envs=4)
    gym.registry.pop("my/Coloured-v0")
    text = "".join(result.completions)
    assert result.metrics["vowels"] == pytest.approx(sum(map(text.count, "aeiou")) / len(text))
    assert result.metrics["exact_match"] == 0
    assert result.metrics.keys() == {"distinct_1", "distinct_2", "vowels", "exact_match"}
    assert result.metric_signatures["Vowels"] == "aeiou"
    assert result.metric_signatures["exact_match"] == "ExactMatch"
    assert result.metrics_left_out == {}


def test_an_evaluation_takes_metrics_and_leaves_out_those_of_a_task_that_lack_references(make_env, make_policy):
    policy, env = make_policy(), make_env(8, split="test")
    assert evaluate(policy, env, metrics=[Vowels(), "rouge"]).metrics.keys() == {
        "vowels", "rouge_1", "rouge_2", "rouge_l",
    }  # fmt: skip
    env = make_env(8, split="test")
    env.task = dataclasses.replace(env.task, metrics=(Vowels(), ExactMatch()), references=lambda row: ())
    result = evaluate(policy, env)
    assert result.metrics.keys() == {"vowels"}
    assert result.metrics_left_out == {"exact_match": "no sample has a reference"}


def test_a_registered_metric_is_a_name_like_any_other_and_says_what_it_needs(make_env, make_policy):
    with pytest.raises(ValueError, match=r"metrics must be of .*got \['longer'\]"):
        textgym.Task("t", [], "p", "r", 4, 4, "first", metrics=("longer",))
    register("longer", Longer)
    assert "longer" in metrics.NAMES
    assert load("longer", origin=1, judge=2).signature == "from 1, by 2"
    policy, env = make_policy(), make_env(8, split="test")
    with pytest.raises(ValueError, match="metrics can hold 'longer' only where start_model is given"):
        evaluate(policy, env, metrics=["longer"])
    env.task = dataclasses.replace(env.task, metrics=("longer",))
    assert evaluate(policy, env).metrics_left_out == {"longer": "start_model was not given"}
    result = evaluate(policy, env, start_model="a judge")
    assert result.metrics == {"longer": 2 * 37.0}
    assert result.metric_signatures == {"longer": f"from {env.source}, by a judge"}
    register("longer", lambda: Vowels())  # a registered one is replaced; a function needs nothing
    assert evaluate(policy, env).metrics.keys() == {"vowels"}


class Nothing:
    def compute(self, predictions):
        return None


class Distinct:
    def compute(self, predictions):
        return {"distinct_1": 1.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([3], r"metrics must be of .*, or objects with a method compute, got \[3\]"),
        ([Vowels], "metrics must be of"),
        ([Vowels(), Vowels()], "metrics must have different names, got two of 'Vowels'"),
        ([Nothing()], "metric 'Nothing' must return numbers by name, got None"),
        (
            ["distinct", Distinct()],
            r"metric 'Distinct' must return names that no other metric has, got \['distinct_1'\]",
        ),
    ],
)
def test_what_is_no_metric_is_refused(wrong, message, make_env, make_policy):
    with pytest.raises(ValueError, match=message):
        evaluate(make_policy(), make_env(8, split="test"), num_prompts=2, metrics=wrong)


def test_names_of_textgym_cannot_be_taken():
    for name in ("rouge", "", 3):
        with pytest.raises(ValueError, match="name must be a string that names no metric of textgym"):
            register(name, Vowels)
    with pytest.raises(ValueError, match="factory must be a function or class"):
        register("vowels", Vowels())
