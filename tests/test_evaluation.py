"""An evaluation reads every prompt once, whatever the number of rows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import tyro

from agents.evaluation import evaluate, main
from textgym.decoding import Decoding


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(greedy=True)])
def test_every_prompt_once_whatever_the_number_of_rows(decoding, make_env, make_policy):
    policy = make_policy()
    results = [evaluate(policy, make_env(rows, split="test"), decoding=decoding) for rows in (5, 16, 64)]
    for result in results:
        assert result.sample_ids.tolist() == list(range(37))
        assert result.completions == results[0].completions
        assert result.rewards.tolist() == results[0].rewards.tolist()
        assert result.metrics == results[0].metrics
        assert result.prompts == [row["ask"] for row in make_env(1, split="test").data.rows]
        assert [len(ids) for ids in result.token_ids] == [len(authors) for authors in result.authors]
        assert result.policy_tokens == sum(map(len, result.token_ids))


def test_a_subset_is_the_same_for_every_seed_and_its_texts_are_those_of_the_whole(make_env, make_policy):
    policy, env = make_policy(), make_env(8, split="test")
    whole = evaluate(policy, env, seed=1)
    first, second = (evaluate(policy, env, num_prompts=11, seed=seed) for seed in (1, 2))
    assert first.sample_ids.tolist() == second.sample_ids.tolist()
    assert len(set(first.sample_ids.tolist())) == 11
    assert first.completions == [whole.completions[index] for index in first.sample_ids]
    assert first.completions != second.completions


def test_perplexity_is_that_of_the_written_tokens(make_env, make_policy):
    policy, judge = make_policy(), make_policy(seed=1).model
    result = evaluate(policy, make_env(8, split="test"), start_model=judge, metrics=["distinct_2"])
    assert sorted(result.metrics) == ["distinct_2", "perplexity"]
    total, count = 0.0, 0
    for prompt, ids in zip(result.prompts, result.token_ids, strict=True):
        context = policy.tokenizer(prompt)["input_ids"]
        log_probs = judge(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_probs[len(context) + h - 1, token].item() for h, token in enumerate(ids))
        count += len(ids)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_results_are_plain_data_and_samples_are_written(make_env, make_policy, tmp_path):
    result = evaluate(make_policy(), make_env(8, split="test"), num_prompts=9)
    summary = json.loads(json.dumps(result.to_dict()))
    assert summary["reward"] == pytest.approx(np.mean(summary["rewards"]))
    assert summary["fingerprint"] == make_env(1, split="test").data.fingerprint
    result.save(tmp_path / "samples" / "test.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "samples" / "test.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in lines] == result.completions
    assert {author for line in lines for author in line["authors"]} == {"policy"}


def test_wrong_arguments_are_named(make_env, make_policy):
    policy, env = make_policy(), make_env(8)
    for arguments in ({"num_prompts": 0}, {"metrics": ["beauty"]}, {"source": "mini"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            evaluate(policy, env, **arguments)


def test_the_command_prints_what_the_function_returns(make_env, make_policy, tmp_path, capsys):
    policy, env_id = make_policy(), make_env(1).spec.id
    policy.save_pretrained(tmp_path / "policy")
    samples = tmp_path / "samples.jsonl"
    command = ["--policy", str(tmp_path / "policy"), "--env", env_id, "--num-prompts", "12", "--greedy"]
    tyro.cli(main, args=[*command, "--start-model", str(tmp_path / "policy"), "--output", str(samples)])
    printed = json.loads(capsys.readouterr().out)
    expected = evaluate(policy, env_id, num_prompts=12, decoding=Decoding(greedy=True), start_model=policy.model)
    assert {**printed, "seconds": 0} == {**expected.to_dict(), "seconds": 0}
    assert len(samples.read_text().splitlines()) == 12
