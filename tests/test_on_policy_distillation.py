"""On-policy distillation: its gradient is that of the reverse KL to the guide, and it ends at the guide."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_lock import LOCK_ID, fixed_policy
from test_scoring import text_guide
from torch.nn.utils.rnn import pad_sequence

from agents import GKD, OnPolicyDistillation, TabularPolicy
from agents.evaluation import make_env as vector_env
from benchmarks.comparison.combination_lock import expected_reward
from textgym import Guidance
from textgym.guides import Author
from textgym.guides.local import LocalGuide
from textgym.tasks.lock import LockGuide

SMALL = {"vocab_size": 4, "length": 3}


class TabularGuide:
    """A policy of a few states that scores, and writes nothing."""

    author = Author.GUIDE
    can_hand_off = True

    def __init__(self, policy):
        self.policy = policy

    def complete(self, requests, tokenizer):
        raise AssertionError("nobody asked it to write")

    @torch.no_grad()
    def score(self, requests, continuations, tokenizer):
        if not requests:
            return []
        texts = [[*r.prompt_ids, *r.prefix_ids, *ids] for r, ids in zip(requests, continuations, strict=True)]
        ids = pad_sequence(list(map(torch.tensor, texts)), batch_first=True)
        mask = pad_sequence([torch.ones(len(text)) for text in texts], batch_first=True)
        columns = torch.arange(1, ids.shape[1]).where(mask[:, 1:] > 0, -1)
        log_probs = self.policy.evaluate_actions(ids, mask, columns).log_probs.numpy()
        return [
            row[len(text) - len(new) - 1 : len(text) - 1]
            for row, text, new in zip(log_probs, texts, continuations, strict=True)
        ]


class WritingGuide(TabularGuide):
    """One that writes, too."""

    def complete(self, requests, tokenizer):
        return self.writer.complete(requests, tokenizer)


def on_the_lock(rows, lock_arguments, algorithm=OnPolicyDistillation, kind=TabularGuide, **arguments):
    lock = vector_env(LOCK_ID, num_envs=1, **lock_arguments).lock
    guide = kind(fixed_policy(lock)[0])
    guide.writer = LockGuide(lock)
    env: Any = vector_env(LOCK_ID, num_envs=rows, guide=guide, **lock_arguments)
    policy = TabularPolicy.for_lock(env.lock)
    return algorithm(policy, env, **{"episodes_per_iteration": rows, "device": "cpu", **arguments})


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("others", [{}, {"kl_coef": 0.3, "reward_coef": 0.7}], ids=["alone", "with the others"])
def test_the_expected_gradient_is_that_of_the_reverse_kl(gamma, others):
    """A sum over all texts, each of which a uniform policy writes now and then."""
    agent = on_the_lock(1024, SMALL | {"fork": True}, gamma=gamma, **others)
    lock, logits, guide = agent.env.lock, agent.policy.logits, agent.env.guide.policy.logits.double().log_softmax(-1)
    rollout = agent.play()
    texts = rollout.input_ids[:, rollout.prompt_columns :].masked_fill(rollout.authors < 0, -1)
    _, first = np.unique(texts.numpy(), axis=0, return_index=True)
    rollout = rollout[torch.from_numpy(first)]
    random = torch.Generator().manual_seed(0)
    for table in (logits, agent.reference.logits):
        table.data = torch.randn(table.shape, generator=random)
    decisions, columns = rollout.decisions, rollout.columns(rollout.decisions)
    with torch.no_grad():
        recorded = agent.policy.evaluate_actions(rollout.input_ids, rollout.attention_mask, columns)
    rollout.log_probs = recorded.log_probs

    states = lock.states(rollout.input_ids[:, rollout.prompt_columns :])[:, :-1]
    tokens = rollout.input_ids[:, rollout.prompt_columns :]
    reference = agent.reference.logits.double().log_softmax(-1)
    policy = logits.double().log_softmax(-1)
    log_probs = policy[states, tokens].masked_fill(~decisions, 0)
    probs = log_probs.sum(1).exp()
    assert float(probs.detach().sum()) == pytest.approx(1, abs=1e-6), "every text is there"
    # Gradients of these objectives, which are minimised.
    target = guide + agent.kl_coef * reference
    if gamma == 1:
        penalty = ((1 + agent.kl_coef) * policy - target)[states, tokens].masked_fill(~decisions, 0).sum(1)
        objective = (probs * penalty).sum()
    else:  # in the states that the policy visits, however it came there
        divergence = (policy.exp() * ((1 + agent.kl_coef) * policy - target)).sum(-1)
        objective = (probs.detach()[:, None] * divergence[states].masked_fill(~decisions, 0)).sum()
    objective = objective - agent.reward_coef * (probs * rollout.rewards).sum()
    (exact,) = torch.autograd.grad(objective, logits, retain_graph=True)

    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    (expected,) = torch.autograd.grad(-(probs.detach()[:, None] * credit.advantages * log_probs).sum(), logits)
    torch.testing.assert_close(expected, exact, rtol=1e-5, atol=1e-6)
    assert exact.abs().max() > 0.05

    rows = torch.arange(len(rollout))
    loss = agent.loss(agent.evaluate_actions(rollout, credit, rows), credit, credit)["loss"]
    (taken,) = torch.autograd.grad(loss * decisions.sum(), logits)
    (sampled,) = torch.autograd.grad(
        -(credit.advantages * agent.evaluate_actions(rollout, credit, rows).log_probs).sum(), logits
    )
    torch.testing.assert_close(taken, sampled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_the_policy_becomes_the_guide(gamma):
    agent = on_the_lock(256, SMALL, gamma=gamma, learning_rate=0.2, minibatch_size=256)
    agent.learn(total_episodes=256 * 50)
    guide = agent.env.guide.policy
    worth = expected_reward(guide, agent.env.lock)
    assert worth > 0.2
    assert expected_reward(agent.policy, agent.env.lock) == pytest.approx(worth, abs=0.05)
    assert agent.history[0]["guide_kl"] > 20 * abs(agent.history[-1]["guide_kl"])
    assert agent.num_guide_tokens == 0


def test_a_mix_has_the_gradient_of_both_kinds_of_text():
    """The reverse KL on the policy's tokens and the likelihood of the guide's, each a mean over its tokens."""
    agent = on_the_lock(512, SMALL | {"fork": True}, GKD, WritingGuide)
    agent.policy.logits.data = torch.randn(agent.policy.logits.shape, generator=torch.Generator().manual_seed(0))
    rollout = agent.play()
    whole = (rollout.authors == Author.GUIDE).any(1)
    assert 0.4 < whole.float().mean() < 0.6
    tokens, logits = rollout.input_ids[:, rollout.prompt_columns :], agent.policy.logits
    states = agent.env.lock.states(tokens)[:, :-1]
    policy, guide = (table.double().log_softmax(-1) for table in (logits, agent.env.guide.policy.logits))
    own, others, count = [], [], 0
    for row in range(len(rollout)):
        for step in range(tokens.shape[1]):
            state, token, author = states[row, step], tokens[row, step], rollout.authors[row, step]
            if author == Author.GUIDE:
                others.append(-policy[state, token])
            elif author == Author.POLICY:
                own.append(-(guide - policy)[state, token].detach() * policy[state, token])
                count += int(whole[row])
    assert count == whole.sum(), "the last token of a guide's text is the policy's"
    (expected,) = torch.autograd.grad(torch.stack(own).mean() + torch.stack(others).mean(), logits)

    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    agent.credit_guide(rollout, credit, agent.imitation)
    now = agent.evaluate_actions(rollout, credit, torch.arange(len(rollout)))
    loss = agent.with_guide_loss(agent.loss(now, credit, credit), now, credit, credit, agent.imitation)["loss"]
    (taken,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(taken, expected, rtol=1e-4, atol=1e-5)


def test_a_mix_ends_near_the_guide_of_which_it_has_some_texts():
    agent = on_the_lock(256, SMALL, GKD, WritingGuide, learning_rate=0.2, minibatch_size=256)
    agent.learn(total_episodes=256 * 50)
    assert agent.history[0]["guide_kl"] > 15 * abs(agent.history[-1]["guide_kl"])
    assert agent.history[-1]["guide_probability"] > 0.7
    # One text for each of the lock's problems, however often it is learned.
    assert agent.num_guide_tokens == len(agent.env.data) * SMALL["length"]


def test_a_mix_needs_a_guide_that_writes_and_scores(make_env, make_policy):
    with pytest.raises(ValueError, match="env must have a guide that can start texts for gkd"):
        GKD(make_policy(), make_env(8), episodes_per_iteration=8)
    with pytest.raises(ValueError, match="env must have a guide that can score tokens for gkd"):
        GKD(make_policy(), make_env(8, guide="references"), episodes_per_iteration=8)


@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(restart_prob=0.7), Guidance(0.5, None, 0.5)], ids=["alone", "prefix", "ends"]
)
def test_the_guide_judges_the_decisions_where_they_stand(guidance, make_env, make_policy):
    """After prompts of several lengths and prefixes of the guide, and before what it wrote at the end."""
    teacher = make_policy(1)
    env = make_env(32, guide=LocalGuide(teacher.model, device="cpu"), guidance=guidance)
    agent = OnPolicyDistillation(make_policy(), env, episodes_per_iteration=32, gamma=0.5, device="cpu")
    rollout = agent.play()
    assert (rollout.prefix_length > 0).any() == bool(guidance.restart_prob)
    assert rollout.completion.any() == bool(guidance.handoff_prob)
    scores = agent.guide_log_probs(rollout)
    columns = rollout.columns(rollout.decisions)
    with torch.no_grad():
        judged = teacher.evaluate_actions(rollout.input_ids, rollout.attention_mask, columns).log_probs
    torch.testing.assert_close(scores, judged, rtol=1e-5, atol=1e-5)
    advantages = agent.credit(rollout, agent.reference_log_probs(rollout)).advantages
    for row in range(len(rollout)):
        steps = torch.nonzero(rollout.decisions[row]).flatten().tolist()
        costs = [float(rollout.log_probs[row, h] - scores[row, h]) for h in steps]
        for at, h in enumerate(steps):
            expected = -sum(0.5**k * cost for k, cost in enumerate(costs[at:]))
            assert float(advantages[row, h]) == pytest.approx(expected, abs=1e-5)


def test_a_guide_that_cannot_score_is_refused_at_once(make_env, make_policy):
    for guide in (None, "references", lambda requests: [" sea"] * len(requests)):
        with pytest.raises(ValueError, match="env must have a guide that can score tokens for opd"):
            OnPolicyDistillation(make_policy(), make_env(8, guide=guide), episodes_per_iteration=8)
    with pytest.raises(ValueError, match="env must have a guide that can score tokens for opd"):
        OnPolicyDistillation(TabularPolicy.for_lock(gym.make(LOCK_ID).unwrapped.lock), LOCK_ID)
    with pytest.raises(ValueError, match=r"guide must read the tokens that the policy reads .* has another vocabulary"):
        OnPolicyDistillation(make_policy(), make_env(8, guide=text_guide()[0]), episodes_per_iteration=8)
    env = make_env(8, guide=LocalGuide(make_policy(1).model), handoff=True)
    with pytest.raises(ValueError, match="env must be made without handoff=True for opd"):
        OnPolicyDistillation(make_policy(), env, episodes_per_iteration=8)
    for argument, value in (("gamma", 1.1), ("reward_coef", -1), ("clip_range", 0)):
        with pytest.raises(ValueError, match=argument):
            on_the_lock(8, SMALL, **{argument: value})


def test_a_token_that_the_guide_finds_impossible_stops_with_a_clear_error():
    agent = on_the_lock(64, SMALL)
    agent.env.guide.policy.logits.data[:, 2] = -torch.inf
    with pytest.raises(FloatingPointError, match="opd, iteration 1: the guide's score is not finite"):
        agent.learn(total_episodes=64)
