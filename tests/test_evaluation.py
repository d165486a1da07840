"""An evaluation reads every prompt once, whatever the number of rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import tyro
from transformers import GPT2Config, GPT2LMHeadModel

from agents import PPO, TabularPolicy
from agents.environments import make_env as agents_make_env
from agents.environments import sibling_env
from agents.evaluation import evaluate, main, pass_at
from agents.policy import CausalLMPolicy
from textgym.decoding import Decoding
from textgym.guidance import Guidance
from textgym.guides import Author, CallableGuide, Completion
from textgym.metrics import NAMES, MissingRequirement, load
from textgym.seeding import hash64

LOCK_ID = "textgym/CombinationLock-v0"


def noise(requests):
    """A guide that writes anything, by the seed of the request."""
    return [
        Completion(token_ids=(20 + hash64(r.seed, np.arange(r.max_new_tokens)) % 9).astype(int).tolist())
        for r in requests
    ]


@pytest.fixture
def handing_policy(make_policy):
    """A tiny policy that hands off every third token."""
    policy = make_policy()
    return CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.3)


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
    result = evaluate(policy, make_env(8, split="test"), start_model=judge)
    assert sorted(result.metrics) == ["distinct_1", "distinct_2", "perplexity"]
    total, count = 0.0, 0
    for prompt, ids in zip(result.prompts, result.token_ids, strict=True):
        context = policy.tokenizer(prompt)["input_ids"]
        log_probs = judge(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
        total -= sum(log_probs[len(context) + h - 1, token].item() for h, token in enumerate(ids))
        count += len(ids)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_what_the_tasks_metrics_lack_is_recorded_and_what_was_asked_for_is_an_error(
    make_env, make_policy, monkeypatch, tmp_path
):
    policy, env = make_policy(), make_env(16, split="test")
    names = ("perplexity", "distinct", "rouge", "meteor", "spice", "bert_score")
    env.task = dataclasses.replace(env.task, metrics=names)
    monkeypatch.setenv("PATH", str(tmp_path))  # without Java
    result = evaluate(policy, env)
    assert sorted(result.metrics) == ["distinct_1", "distinct_2", "rouge_1", "rouge_2", "rouge_l"]
    assert sorted(result.metric_signatures) == ["distinct", "rouge"]
    reasons = result.metrics_left_out
    assert sorted(reasons) == ["bert_score", "meteor", "perplexity", "spice"]
    assert [name for name, reason in reasons.items() if "Java" in reason] == ["meteor", "spice"]
    assert "start_model" in reasons["perplexity"]
    assert "encoder" in reasons["bert_score"]
    assert result.to_dict()["metrics_left_out"] == reasons
    with pytest.raises(MissingRequirement, match="Java"):
        evaluate(policy, env, metrics=["distinct", "meteor"])
    for name, argument in (("perplexity", "start_model"), ("bert_score", "encoder")):
        with pytest.raises(ValueError, match=f"metrics .*'{name}'.* {argument} is given"):
            evaluate(policy, env, metrics=[name])


def test_metrics_are_those_of_the_texts_that_were_written(make_env, make_policy):
    names = [name for name in NAMES if name not in ("perplexity", "meteor", "spice", "bert_score")]
    result = evaluate(make_policy(), make_env(16, split="test"), num_prompts=9, metrics=names)
    texts = {"prompts": result.prompts, "predictions": result.completions, "references": result.references}
    for name in names:
        metric = load(name, source="mini") if name in ("sentiment", "preference") else load(name)
        assert metric.compute(**texts).items() <= result.metrics.items()
    assert result.metrics_left_out == {}


def test_without_references_the_tasks_metrics_do_without(make_env, make_policy):
    policy, env = make_policy(), make_env(16, split="test")
    env.task = dataclasses.replace(env.task, metrics=("distinct", "rouge"), references=lambda row: ())
    result = evaluate(policy, env)
    assert sorted(result.metrics) == ["distinct_1", "distinct_2"]
    assert result.metrics_left_out == {"rouge": "no sample has a reference"}
    assert list(result.metric_signatures) == ["distinct"]
    with pytest.raises(ValueError, match="references"):
        evaluate(policy, env, metrics=["rouge"])


def test_results_are_plain_data_and_samples_are_written(make_env, make_policy, tmp_path):
    result = evaluate(make_policy(), make_env(8, split="test"), num_prompts=9)
    summary = json.loads(json.dumps(result.to_dict()))
    assert summary["reward"] == pytest.approx(np.mean(summary["rewards"]))
    assert summary["fingerprint"] == make_env(1, split="test").data.fingerprint
    result.save(tmp_path / "samples" / "test.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "samples" / "test.jsonl").read_text().splitlines()]
    assert [line["completion"] for line in lines] == result.completions
    assert {author for line in lines for author in line["authors"]} == {"policy"}


def test_the_best_of_n_texts_is_kept_and_more_texts_never_do_worse(make_env, make_policy):
    policy = make_policy()
    one, two, four = (evaluate(policy, make_env(16, split="test"), best_of=n, seed=3) for n in (1, 2, 4))
    assert (two.rewards >= one.rewards).all()
    assert (four.rewards >= two.rewards).all()
    assert four.reward > two.reward > one.reward
    same = two.rewards == one.rewards  # the first text is that of best_of=1, and stays where no other is better
    assert 0 < same.sum() < len(same)
    assert [t for t, kept in zip(two.completions, same, strict=True) if kept] == [
        t for t, kept in zip(one.completions, same, strict=True) if kept
    ]
    for result in (one, two, four):
        shares = [sum("a" <= letter <= "z" for letter in text) / max(len(text), 1) for text in result.completions]
        assert result.rewards == pytest.approx(shares, abs=1e-6)
        assert result.sample_ids.tolist() == list(range(37))
    assert two.policy_tokens > one.policy_tokens + 37
    assert four.to_dict()["best_of"] == 4
    rows = evaluate(policy, make_env(5, split="test"), best_of=4, seed=3)
    assert rows.completions == four.completions
    assert rows.policy_tokens == four.policy_tokens


def test_all_texts_of_a_prompt_are_kept_and_the_first_is_that_of_one(make_env, make_policy, tmp_path):
    policy = make_policy()
    one, four = (evaluate(policy, make_env(16, split="test"), samples_per_prompt=n, seed=3) for n in (1, 4))
    rows = evaluate(policy, make_env(5, split="test"), samples_per_prompt=4, seed=3)
    best = evaluate(policy, make_env(16, split="test"), best_of=4, seed=3)
    for name in ("completions", "token_ids", "metrics", "reward_parts"):
        assert getattr(four, name) == getattr(one, name)
    assert one.all_completions == [[text] for text in one.completions]
    assert one.all_rewards.tolist() == [[reward] for reward in one.rewards]
    assert four.all_rewards[:, 0].tolist() == four.rewards.tolist() == one.rewards.tolist()
    assert four.all_rewards.max(1).tolist() == best.rewards.tolist()
    for other in (rows, best):  # batches change nothing, and best_of draws the same texts
        assert other.all_completions == four.all_completions
        assert other.all_rewards.tolist() == four.all_rewards.tolist()
        assert other.policy_tokens == four.policy_tokens
    assert all(len({*texts}) > 1 for texts in four.all_completions)
    shares = [[sum("a" <= x <= "z" for x in t) / max(len(t), 1) for t in texts] for texts in four.all_completions]
    assert four.all_rewards == pytest.approx(np.array(shares), abs=1e-6)
    assert four.policy_tokens > one.policy_tokens == sum(map(len, one.token_ids))

    success = float(np.median(four.all_rewards.max(1)))
    summary = json.loads(json.dumps(four.to_dict(success)))
    assert 0 < four.solved(success).mean() < 1
    assert four.pass_at(4, success) == four.solved(success).mean()
    assert four.pass_at(1, success) == pytest.approx((four.all_rewards >= success).mean())
    assert pass_at(summary["successes"], summary["texts_per_prompt"], 2) == four.pass_at(2, success)
    four.save(tmp_path / "texts.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [line["all_completions"] for line in lines] == four.all_completions


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n):
    for c in range(n + 1):
        succeeded = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in itertools.combinations(succeeded, k)]
            assert pass_at([c], n, k) == pytest.approx(np.mean(subsets), abs=1e-12)
        assert pass_at([c], n, n) == (c > 0)
    counts = np.arange(n + 1)
    assert pass_at(counts, n, 1) == pytest.approx(counts.mean() / n)


def test_pass_at_k_is_exact_where_binomials_are_large():
    n, c, k = 10_000, 3, 64
    exact = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at([c], n, k) == pytest.approx(exact, rel=1e-10)


def test_a_policy_that_can_hand_off_is_evaluated_with_its_guide(make_env, handing_policy):
    arguments = {"guide": CallableGuide(noise), "handoff": True, "handoff_cost": 0.1}
    env = make_env(16, split="test", **arguments)
    results = [
        evaluate(handing_policy, env, seed=1),
        evaluate(handing_policy, make_env(5, split="test", **arguments), seed=1),
    ]
    results.append(
        evaluate(handing_policy, env.spec.id, seed=1, num_envs=8, tokenizer=handing_policy.tokenizer, **arguments)
    )
    for result in results:
        assert result.completions == results[0].completions  # the guide's part hangs on the sample too
        assert 0 < result.handoff_fraction < 1
        assert result.handoff_fraction == np.mean(["guide" in named(authors) for authors in result.authors])
        assert result.guide_tokens == sum(named(authors).count("guide") for authors in result.authors)
        assert result.reward_parts["handoff_cost"] == pytest.approx(-0.1 * result.guide_tokens / 37)
        assert result.reward == pytest.approx(sum(result.reward_parts.values()))
        assert result.to_dict()["handoff_fraction"] == result.handoff_fraction


def named(authors):
    return ["policy" if author == 0 else "guide" for author in authors]


def test_a_sibling_keeps_the_guide_only_where_the_policy_needs_it(make_env):
    guide = CallableGuide(noise)
    kept = sibling_env(make_env(4, guide=guide, handoff=True, handoff_cost=0.1), num_envs=3, split="validation")
    assert (kept.guide is not None, kept.handoff, kept.handoff_cost) == (True, True, 0.1)
    assert (kept.split, kept.num_envs) == ("validation", 3)
    assert sibling_env(make_env(4, guide=guide), num_envs=3, split="validation").guide is None


def test_wrong_arguments_are_named(make_env, make_policy, handing_policy):
    policy, env = make_policy(), make_env(8)
    with pytest.raises(ValueError, match="best_of must be 1 with greedy"):
        evaluate(policy, env, best_of=2, decoding=Decoding(greedy=True))
    with pytest.raises(ValueError, match="samples_per_prompt must be 1 with greedy"):
        evaluate(policy, env, samples_per_prompt=2, decoding=Decoding(greedy=True))
    with pytest.raises(ValueError, match="best_of and samples_per_prompt exclude each other, got 2 and 3"):
        evaluate(policy, env, best_of=2, samples_per_prompt=3)
    for k in (0, 3, 1.0):
        with pytest.raises(ValueError, match="k must be an int from 1 to the number of texts per prompt, 2"):
            pass_at([1], 2, k)
    with pytest.raises(ValueError, match="successes must be between 0 and 2"):
        pass_at([3], 2, 1)
    with pytest.raises(ValueError, match=r"handoff must be True .* handoff=True"):
        evaluate(handing_policy, env.spec.id)
    with pytest.raises(ValueError, match="handoff must be False"):
        evaluate(policy, make_env(8, guide=CallableGuide(noise), handoff=True))
    for arguments in (
        {"num_prompts": 0},
        {"best_of": 0},
        {"samples_per_prompt": 0},
        {"metrics": ["beauty"]},
        {"source": "mini"},
    ):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            evaluate(policy, env, **arguments)


def test_the_command_prints_what_the_function_returns(make_env, make_policy, tmp_path, capsys):
    policy, env_id = make_policy(), make_env(1).spec.id
    policy.save_pretrained(tmp_path / "policy")
    samples = tmp_path / "samples.jsonl"
    command = ["--policy", str(tmp_path / "policy"), "--env", env_id, "--num-prompts", "12", "--greedy"]
    tyro.cli(main, args=[*command, "--start-model", str(tmp_path / "policy"), "--output", str(samples)])
    printed = json.loads(capsys.readouterr().out)
    expected = evaluate(
        policy, env_id, num_prompts=12, decoding=Decoding(greedy=True), start_model=str(tmp_path / "policy")
    )
    assert {**printed, "seconds": 0} == {**expected.to_dict(), "seconds": 0}
    assert len(samples.read_text().splitlines()) == 12


def test_the_command_counts_successes_among_several_texts(make_env, make_policy, tmp_path, capsys):
    policy, env_id = make_policy(), make_env(1).spec.id
    policy.save_pretrained(tmp_path / "policy")
    command = ["--policy", str(tmp_path / "policy"), "--env", env_id, "--num-prompts", "5", "--samples-per-prompt", "3"]
    tyro.cli(main, args=command)
    printed = json.loads(capsys.readouterr().out)
    expected = evaluate(policy, env_id, num_prompts=5, samples_per_prompt=3, metrics=["distinct"])
    assert printed["samples_per_prompt"] == printed["texts_per_prompt"] == 3
    assert printed["successes"] == expected.successes().tolist()
    assert printed["policy_tokens"] == expected.policy_tokens


def test_the_command_evaluates_a_policy_that_can_hand_off(make_env, make_policy, handing_policy, tmp_path, capsys):
    handing_policy.save_pretrained(tmp_path / "policy")
    make_policy(seed=1).save_pretrained(tmp_path / "guide")
    arguments = {"num_prompts": 12, "guide": str(tmp_path / "guide"), "handoff_cost": 0.01}
    main(str(tmp_path / "policy"), make_env(1).spec.id, **arguments)
    printed = json.loads(capsys.readouterr().out)
    assert printed["handoff_fraction"] > 0
    assert printed["reward_parts"]["handoff_cost"] == pytest.approx(-0.01 * printed["guide_tokens"] / 12)


def test_a_guide_alone_is_judged_by_whole_hand_offs(make_env, make_policy):
    policy = make_policy()
    alone = Guidance(handoff_prob=1.0, no_body_prob=1.0)
    first, second = (
        evaluate(policy, make_env(rows, split="test", guide="references"), guidance=alone) for rows in (5, 64)
    )
    assert first.completions == second.completions
    for text, references in zip(first.completions, first.references, strict=True):
        assert any(reference.startswith(text.strip()) for reference in references)  # cut at the horizon
    assert first.policy_tokens == 0
    assert {author for authors in first.authors for author in authors} == {Author.REFERENCE}
    # A guide that only writes whole texts takes no other hand-off.
    for guidance in ({"handoff_prob": 1.0}, {"handoff_prob": 1.0, "no_body_prob": 1.0, "restart_prob": 0.5}):
        with pytest.raises(ValueError, match="hands off, which this guide cannot"):
            evaluate(policy, make_env(5, split="test", guide="references"), guidance=guidance)


def test_a_policy_is_judged_after_prefixes_of_the_guide(make_env, make_policy):
    policy, half = make_policy(), Guidance(1.0, restart_fraction=0.5)
    result = evaluate(policy, make_env(8, split="test", guide=CallableGuide(noise)), guidance=half)
    written = [sum(author == Author.GUIDE for author in authors) for authors in result.authors]
    assert all(written)
    assert result.guide_tokens == sum(written)


def lengths(prompts, completions, references):
    """A reward."""
    return [len(text) for text in completions]


def test_an_agent_is_judged_in_its_own_environment_unless_told_otherwise(recwarn):
    """A template, a stop string and a reward of one's own are not lost."""
    arguments = {"template": "Q: {prompt} A:", "stop": ["z"], "reward": lengths}
    env = gym.make_vec("textgym/CommonGen-v0", num_envs=4, train_samples=50, **arguments)
    ids = {"bos_token_id": env.eos_token_id, "eos_token_id": env.eos_token_id, "vocab_size": len(env.tokenizer)}
    policy = CausalLMPolicy(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, **ids)), env.tokenizer)
    agent = PPO(policy, env, episodes_per_iteration=8, device="cpu")
    assert agent.env.parking
    own = evaluate(agent, num_prompts=6, num_envs=3, metrics=())
    assert [warning for warning in recwarn if "environment" in str(warning.message)] == []
    assert own.split == "test"
    assert own.rewards.tolist() == [len(text) for text in own.completions]
    same = evaluate(agent, "textgym/CommonGen-v0", num_prompts=6, num_envs=6, metrics=(), **arguments)
    assert same.completions == own.completions
    told = r"template='\{prompt\}' instead of 'Q: .* stop=\(\) instead of \('z',\).* instead of 'lengths'"
    with pytest.warns(UserWarning, match=told):
        evaluate(agent, "textgym/CommonGen-v0", num_prompts=6, metrics=())
    with pytest.raises(ValueError, match="env must be given for CausalLMPolicy"):
        evaluate(policy)


def on_the_lock(env):
    """An agent with a table as its policy."""
    policy = TabularPolicy.for_lock(gym.make(LOCK_ID).unwrapped.lock)
    return PPO(policy, env, episodes_per_iteration=8, minibatch_size=8, device="cpu")


@pytest.mark.parametrize(
    "make",
    [
        lambda: gym.make(LOCK_ID),
        lambda: gym.make_vec(LOCK_ID, num_envs=8),
        lambda: agents_make_env(LOCK_ID, num_envs=8),
    ],
    ids=["make", "make_vec", "parking"],
)
def test_an_agent_learns_alike_in_whatever_gymnasium_makes(make):
    agents = [on_the_lock(env).learn(total_episodes=8) for env in (LOCK_ID, make())]
    assert [agent.env.num_envs for agent in agents] == [8, 8]
    assert torch.equal(agents[0].policy.logits, agents[1].policy.logits)


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: gym.wrappers.RecordEpisodeStatistics(gym.make(LOCK_ID)),
        lambda: gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec(LOCK_ID, num_envs=4)),
    ],
)
def test_a_wrapped_environment_is_refused_by_the_wrappers_name(wrapped):
    with pytest.raises(ValueError, match=r"env must not be wrapped .* \['RecordEpisodeStatistics'\]"):
        on_the_lock(wrapped())


def test_a_result_is_a_line_and_in_a_notebook_a_table(make_env, make_policy):
    result = evaluate(make_policy(), make_env(8, split="test"), metrics=("distinct",))
    assert repr(result).startswith("EvaluationResult(words test, 37 prompts: reward ")
    assert f"distinct_1 {result.metrics['distinct_1']:.3f}" in repr(result)
    result.completions[0] = "<script>alert(1)</script>"
    page = result._repr_html_()
    assert page.count("<tr>") == 11
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
