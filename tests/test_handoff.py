"""Policies that can ask the guide to finish: tokens and the hand-off are one distribution, in all parts of the code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import HORIZON, PROMPT_TOKENS, evaluate_with_both
from scipy import stats

from agents import PPO, CausalLMPolicy
from agents.rollout import collect
from textgym import Guidance
from textgym.decoding import Decoding
from textgym.guides import Author, CallableGuide, Completion
from textgym.seeding import hash64

GUIDE = CallableGuide(
    lambda requests: [
        Completion(token_ids=(20 + hash64(r.seed, np.arange(r.max_new_tokens)) % 9).astype(int).tolist())
        for r in requests
    ]
)
# A guide that has nothing to say: the column of the hand-off then holds no token.
SILENT = CallableGuide(lambda requests: [Completion(token_ids=[], finished=False) for _ in requests])


def play(env, policy, **arguments):
    seeds = hash64(1, np.arange(env.num_envs))
    return collect(env, policy, seeds=seeds, reset_seed=1, options={"guidance": Guidance(0.5)}, **arguments)


def plain(policy, rollout):
    """The definition, row by row: all V + 1 probabilities of each state, in the policy's own precision."""
    size = len(policy.tokenizer)
    results = torch.zeros(4, *rollout.authors.shape, dtype=next(policy.parameters()).dtype)
    for row in range(len(rollout)):
        for h in rollout.decisions[row].nonzero().flatten().tolist():
            before = rollout.attention_mask[row, : PROMPT_TOKENS + h].bool()
            ids = rollout.input_ids[row, : PROMPT_TOKENS + h][before][None]
            hidden = policy.model.transformer(ids).last_hidden_state[0, -1]
            asks = policy.heads["handoff"](hidden).sigmoid()
            tokens = (policy.model.lm_head(hidden)).softmax(-1) * (1 - asks)
            joint = torch.cat([tokens[:size], asks])
            action = size if rollout.handoffs[row, h] else rollout.input_ids[row, PROMPT_TOKENS + h]
            results[0, row, h] = joint[action].log()
            results[1, row, h] = -(joint * joint.log()).sum()
            results[2, row, h] = policy.heads["value"](hidden).squeeze()
            results[3, row, h] = policy.heads["guide_value"](hidden).squeeze()
    return results


@pytest.mark.parametrize("guide", [GUIDE, SILENT], ids=["guide", "silent guide"])
def test_sampling_and_evaluation_are_the_joint_distribution(guide, make_env, make_asking):
    policy = make_asking()
    rollout = play(make_env(16, guide=guide, handoff=True), policy)
    decisions, handoffs = rollout.decisions, rollout.handoffs
    assert handoffs.any(), "the test needs hand-offs"
    assert guide is SILENT or (rollout.prefix_length > 0).any(), "and prefixes"
    lengths = rollout.attention_mask.sum(1)
    assert lengths.min() < lengths.max(), "and ragged rows"
    np.testing.assert_array_equal(handoffs.any(1), rollout.finish_reason == "handoff")
    for row in handoffs.any(1).nonzero().flatten().tolist():
        at = int(handoffs[row].nonzero())
        assert at == rollout.prefix_length[row] + rollout.policy_tokens[row]
        assert (rollout.authors[row, at:] == (Author.NONE if guide is SILENT else Author.GUIDE)).all()
    assert (rollout.log_probs[~decisions] == 0).all()

    arguments = (rollout.input_ids, rollout.attention_mask, rollout.columns(decisions), handoffs)
    with torch.no_grad():
        judged, expected = evaluate_with_both(policy, *arguments), plain(policy, rollout)
    torch.testing.assert_close(judged, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(rollout.log_probs, expected[0], rtol=0, atol=1e-4)
    torch.testing.assert_close(rollout.values, expected[2], rtol=0, atol=1e-4)

    policy.double()
    weights = torch.randn(judged.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradients = []
    for results in (evaluate_with_both(policy, *arguments), plain(policy, rollout)):
        policy.zero_grad()
        (weights * results).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in policy.parameters()])
    for gradient, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-9, atol=1e-9)


def first_choices(policy, prompts, rows, decoding=None):
    """What is written first, `rows` times after each prompt."""
    encoded = policy.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    ids, mask = np.zeros((2, len(prompts), 8), np.int64)
    for row, tokens in enumerate(encoded):
        ids[row, 8 - len(tokens) :], mask[row, 8 - len(tokens) :] = tokens, 1
    arguments = {"input_ids": ids.repeat(rows, 0), "attention_mask": mask.repeat(rows, 0)}
    seeds = hash64(5, np.arange(len(prompts) * rows))
    sample = policy.sampler(arguments, seeds=seeds, max_new_tokens=2, decoding=decoding).sample()
    states = [policy.model.transformer(torch.tensor([tokens])).last_hidden_state[0, -1] for tokens in encoded]
    hidden = torch.stack(states).detach()
    asks = policy.heads["handoff"](hidden).double().sigmoid().squeeze(1)
    tokens = policy.model.lm_head(hidden).double().softmax(-1)
    return sample.tokens.reshape(len(prompts), rows), asks.detach(), tokens.detach()


def test_hand_offs_are_as_frequent_as_the_gate_says_and_leave_the_tokens_alone(make_asking):
    policy = make_asking(0.3)
    count, size = 4000, len(policy.tokenizer)
    choices, asks, tokens = first_choices(policy, [" red sun", " green", " two three moon"], count)
    assert asks.max() - asks.min() > 0.1
    for line, ask, law in zip(choices, asks, tokens, strict=True):
        handed = int((line == size).sum())
        assert stats.binomtest(handed, count, float(ask)).pvalue > 1e-3
        observed = np.bincount(line[line != size], minlength=size)
        assert stats.chisquare(observed, law.numpy() * (count - handed)).pvalue > 1e-3
    # With truncation the gate is drawn as ever, and only the tokens are truncated.
    truncated, *_ = first_choices(policy, [" red sun"], count, Decoding(top_k=3, temperature=0.5))
    assert torch.equal(truncated[0] == size, choices[0] == size)
    assert set(truncated[0].tolist()) <= {size, *tokens[0].topk(3).indices.tolist()}


def test_greedy_takes_the_most_probable_of_tokens_and_hand_off(make_asking):
    policy = make_asking(0.006)
    torch.nn.init.normal_(policy.heads["handoff"].weight, std=0.2)
    prompts = [f" {a} {b}" for a in ("red", "one", "sun", "sea") for b in ("green", "two", "moon", "hill")]
    choices, asks, tokens = first_choices(policy, prompts, 2, Decoding(greedy=True))
    joint = torch.cat([tokens * (1 - asks[:, None]), asks[:, None]], 1)
    np.testing.assert_array_equal(choices, joint.argmax(1)[:, None].expand(-1, 2))
    assert 0 < (choices == len(policy.tokenizer)).float().mean() < 1, "the test needs both"
    # `predict`, what evaluation and Stable-Baselines3's users call, is of the same mind.
    ids = np.array([policy.tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts])
    actions, _ = policy.predict({"input_ids": ids, "attention_mask": np.ones_like(ids)}, deterministic=True)
    np.testing.assert_array_equal(actions, choices[:, 0])


def test_a_saved_policy_still_hands_off(make_asking, make_env, tmp_path):
    policy = make_asking(0.4)
    policy.save_pretrained(tmp_path / "policy")
    loaded = CausalLMPolicy.from_pretrained(tmp_path / "policy", device="cpu")
    assert loaded.can_hand_off
    env = make_env(16, guide=GUIDE, handoff=True)
    ours, theirs = play(env, policy), play(env, loaded)
    for name in ("input_ids", "handoffs", "log_probs", "values"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name

    bare = CausalLMPolicy(policy.model, policy.tokenizer)
    bare.heads["value"].weight.data.fill_(2)
    bare.save_pretrained(tmp_path / "bare")
    given = CausalLMPolicy.from_pretrained(tmp_path / "bare", device="cpu", handoff_prob=0.25)
    assert given.heads["value"].weight.mean() == 2
    assert given.heads["handoff"](torch.randn(5, 32)).sigmoid().detach().numpy() == pytest.approx(0.25)
    assert not CausalLMPolicy.from_pretrained(tmp_path / "bare", device="cpu").can_hand_off


def test_credit_ends_at_the_hand_off_with_the_reward_of_the_whole_text(make_env, make_asking):
    policy = make_asking()
    env = make_env(16, guide=GUIDE, handoff=True, handoff_cost=0.05)
    agent = PPO(policy, env, episodes_per_iteration=16, kl_coef=0.7, gamma=0.9, gae_lambda=1.0, device="cpu")
    torch.nn.init.normal_(policy.heads["handoff"].weight, std=1.0)
    rollout = agent.play()
    reference = agent.reference_log_probs(rollout)
    handed = rollout.handoffs.any(1)
    assert ((rollout.log_probs - reference)[rollout.handoffs].abs() > 1e-2).all(), "the penalty reads hand-offs too"
    assert (rollout.reward_parts["handoff_cost"][handed] < 0).all()
    returns = agent.credit(rollout, reference).returns
    for row in range(16):
        steps = rollout.decisions[row].nonzero().flatten().tolist()
        rewards = [-0.7 * (rollout.log_probs[row, h] - reference[row, h]).item() for h in steps]
        rewards[-1] += rollout.rewards[row].item()
        for at, h in enumerate(steps):
            expected = sum(0.9**k * value for k, value in enumerate(rewards[at:]))
            assert returns[row, h].item() == pytest.approx(expected, abs=1e-4)
    now = policy.evaluate_actions(
        rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.decisions), rollout.handoffs
    )
    torch.testing.assert_close(now.log_probs, rollout.log_probs, rtol=0, atol=1e-4)


def test_a_policy_learns_whether_to_ask(make_env, make_asking, words_tokenizer):
    """The guide writes words, which is what the task rewards; unless they cost more than they bring."""
    words = words_tokenizer(" red sun on the hill sea", add_special_tokens=False)["input_ids"]
    guide = CallableGuide(lambda requests: [Completion(token_ids=words[: r.max_new_tokens]) for r in requests])
    shares = {}
    for cost in (0.0, 2.0):
        env = make_env(32, guide=guide, handoff=True, handoff_cost=cost)
        agent = PPO(
            make_asking(spread=0.0), env, episodes_per_iteration=32, learning_rate=3e-3, kl_coef=0.0, device="cpu"
        )
        agent.learn(total_episodes=32 * 15)
        shares[cost] = [record["handoff_fraction"] for record in agent.history]
    assert np.mean(shares[0.0][-3:]) > np.mean(shares[0.0][:2])
    assert np.mean(shares[2.0][-3:]) < 0.2 < np.mean(shares[2.0][:2])


def test_environment_and_policy_must_agree_on_hand_offs(make_env, make_policy, make_asking):
    with pytest.raises(ValueError, match="can_hand_off=False"):
        PPO(make_policy(), make_env(8, guide=GUIDE, handoff=True), episodes_per_iteration=8)
    with pytest.raises(ValueError, match="can_hand_off=True"):
        PPO(make_asking(), make_env(8, guide=GUIDE), episodes_per_iteration=8)
    with pytest.raises(ValueError, match="can_hand_off=True"):
        play(make_env(8, guide=GUIDE), make_asking())
    for handoff_prob in (0, 1, -0.5):
        with pytest.raises(ValueError, match="handoff_prob must be"):
            make_asking(handoff_prob)
    policy, rollout = make_policy(), play(make_env(8, guide=GUIDE), make_policy())
    everywhere = torch.ones(8, HORIZON, dtype=torch.bool)
    with pytest.raises(ValueError, match="handoffs holds a hand-off"):
        policy.evaluate_actions(rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.body), everywhere)


def test_without_the_hand_off_a_policy_writes_what_its_language_model_does(make_env, make_policy):
    plain = make_policy()
    handing = CausalLMPolicy(plain.model, plain.tokenizer, handoff_prob=0.4)
    torch.nn.init.normal_(handing.heads["value"].weight)
    alone = handing.without_handoff()
    assert not alone.can_hand_off
    env = make_env(8)
    first, second = (collect(env, policy, seeds=np.arange(8), reset_seed=0) for policy in (plain, alone))
    assert first.texts.tolist() == second.texts.tolist()
    assert alone.heads["value"] is handing.heads["value"]
