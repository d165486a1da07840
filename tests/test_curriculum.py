"""Curricula against their rules, and groups that are rescued or replaced, on a lock whose guide knows the way."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import GRPO, PPO, RLOO, AggreVaTeD, TabularPolicy
from agents.curriculum import POPE, AccuracyTrend, AdaBack, Cosine, Curriculum, Plan, PrefixRL, Stages, Uniform
from agents.environments import make_env
from textgym.guides import Author

SAMPLES = 12
LOCK = {"vocab_size": 6, "length": 4, "guide_accuracy": 1.0}


def began(rule):
    rule.start(SAMPLES)
    return rule


def plan(rule, groups=400, group_size=3, iteration=0, seed=0):
    return rule.plan(iteration, groups, group_size, np.random.default_rng(seed))


def outcome(plan, succeeds):
    """Rewards 0 and 1 of every episode, by a rule on sample and fraction."""
    return np.vectorize(succeeds)(plan.samples[:, None], plan.fractions).astype(float)


@given(st.sampled_from(["uniform", "cosine", "stages", "adaback", "trend", "pope", "prefix-rl"]), st.integers(0, 9))
@settings(deadline=None, max_examples=40)
def test_every_rule_plans_valid_episodes_and_repeats_itself(name, seed):
    rule, again = began(Curriculum.of(name)), began(Curriculum.of({"name": name}))
    random = np.random.default_rng(seed)
    for iteration in range(6):
        first, second = plan(rule, 20, 4, iteration, seed), plan(again, 20, 4, iteration, seed)
        assert first.fractions.shape == (20, 4)
        assert first.samples.shape == (20,)
        assert ((first.fractions >= 0) & (first.fractions <= 1)).all()
        assert ((first.samples >= 0) & (first.samples < SAMPLES)).all()
        np.testing.assert_array_equal(first.fractions, second.fractions)
        np.testing.assert_array_equal(first.samples, second.samples)
        assert first.prefixes == second.prefixes
        rewards = random.integers(0, 2, (20, 4)).astype(float)
        rollout = SimpleNamespace(
            input_ids=torch.ones(80, 9, dtype=torch.int64), authors=torch.zeros(80, 7), prompt_columns=2
        )
        rule.record(first, rewards, rollout)
        again.set_state(rule.get_state())  # all of what it learned


def test_fixed_rules_have_their_published_fractions():
    uniform = plan(began(Uniform(beta=0.75)), 4000).fractions[:, 0]
    assert np.mean(uniform > 0) == pytest.approx(0.75, abs=0.03)
    assert uniform[uniform > 0].mean() == pytest.approx(0.5, abs=0.02)
    for iteration, probability in ((0, 0.95), (150, 0.5), (299, 0.05), (300, 0.0)):
        fractions = plan(began(Cosine()), 4000, iteration=iteration).fractions[:, 0]
        assert fractions.mean() == pytest.approx(probability, abs=0.02)
        assert set(np.round(fractions * 5, 9)) <= set(range(6))
    stages = [plan(began(Stages(iterations=10)), iteration=i).fractions.mean() for i in (0, 9, 10, 19, 20, 500)]
    assert stages == [0.5, 0.5, 0.25, 0.25, 0, 0]


def test_adaback_finds_the_fraction_that_each_sample_needs():
    needed, tightest = np.linspace(0, 0.9, SAMPLES), np.ones(SAMPLES)
    rule = began(AdaBack(zero_prob=0))
    for iteration in range(60):
        made = plan(rule, 48, 2, iteration, iteration)
        rule.record(made, outcome(made, lambda sample, fraction: fraction >= needed[sample]), None)
        low, high = rule.intervals.T
        tightest = np.minimum(tightest, high)
        assert (high >= needed).all(), "what never sufficed is not ruled out"
        assert (low <= high).all()
    assert np.abs(tightest - needed).max() < 0.2
    # By hand: failure raises the lower bound, success takes the upper one and opens the lower one.
    rule = began(AdaBack(averaging=0.5))
    rule.record(Plan(np.array([0]), np.array([[0.4]]), [None]), np.zeros((1, 1)), None)
    assert rule.intervals[0].tolist() == [0.4, 1.0]
    assert rule.average.tolist() == [0.2, 1.0]
    rule.record(Plan(np.array([0, 1]), np.array([[0.6], [0.3]]), [None] * 2), np.array([[1.0], [0.0]]), None)
    assert rule.intervals[:2].tolist() == [[0.0, 0.6], [0.3, 1.0]], "a new sample began from the averages"
    rule.record(Plan(np.array([0]), np.zeros((1, 1)), [None]), np.zeros((1, 1)), None)
    assert rule.intervals[0].tolist() == [0.0, 0.6], "a failure without a prefix proves nothing"
    # A success by chance does not last, and two groups of one sample can disagree.
    rule.record(Plan(np.array([0, 0]), np.array([[0.0], [0.0]]), [None] * 2), np.array([[1.0], [0.0]]), None)
    assert rule.intervals[0].tolist() == [0.0, 1.0]
    rule.record(Plan(np.array([0, 0]), np.array([[0.3], [0.8]]), [None] * 2), np.array([[1.0], [0.0]]), None)
    assert rule.intervals[0].tolist() == [0.8, 1.0]


def test_the_trend_moves_against_the_rewards():
    rule = began(AccuracyTrend(initial=0.4))
    made = plan(rule, 5, 12)
    assert (made.fractions[:, :2] == 0.4).all()
    assert not made.fractions[:, 2:].any()
    for rewards, expected in (((0.2, 0.4, 0.6), 0.2), ((0.6, 0.4, 0.25), 0.4), ((0.3, 0.3, 0.0), 0.4)):
        for reward in rewards:
            rule.record(made, np.full((5, 12), reward), None)
        assert rule.fraction == pytest.approx(expected)


def test_pope_plays_what_is_unsolved_twice():
    rule = began(POPE(tries=6, fraction=0.7))
    for iteration in range(12):
        made = plan(rule, 24, 3, iteration, iteration)
        rule.record(made, outcome(made, lambda sample, fraction: sample % 2 or fraction > 0), None)
    assert rule.solved.tolist() == [bool(i % 2) for i in range(SAMPLES)]
    made = plan(rule, 24, 3)
    hard = made.samples % 2 == 0
    guided = made.fractions[:, 0] > 0
    assert not guided[~hard].any()
    firsts = np.flatnonzero(hard & ~guided)
    assert all(made.samples[i + 1] == made.samples[i] and guided[i + 1] for i in firsts if i + 1 < 24)
    assert set(made.fractions[guided, 0]) == {0.7}


def test_prefix_rl_cuts_own_successes_where_accuracy_is_middling():
    text = list(range(10, 18))
    rollout = SimpleNamespace(
        input_ids=torch.tensor([[0, 0, *text, 0]] * 2), authors=torch.tensor([[0] * 8 + [-1]] * 2), prompt_columns=2
    )
    rule = began(PrefixRL(beta=1.0, averaging=0.5))
    nothing = plan(rule)
    assert nothing.prefixes == [None] * 400
    rule.record(Plan(np.array([5]), np.zeros((1, 2)), [None]), np.array([[1.0, 0.0]]), rollout)
    made = plan(rule)
    assert {tuple(p) for s, p in zip(made.samples, made.prefixes, strict=True) if s == 5} == {tuple(text[:4])}
    assert all(p is None for s, p in zip(made.samples, made.prefixes, strict=True) if s != 5)
    # From half of the text it always succeeds: less is given next.
    for _ in range(3):
        rule.record(Plan(np.array([5]), np.zeros((1, 2)), [text[:4]]), np.ones((1, 2)), rollout)
    assert len(next(p for s, p in zip(*(plan(rule).samples, plan(rule).prefixes), strict=True) if s == 5)) < 4


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("adabck", "curriculum must be one of"),
        ({"name": "stages", "stages": (2,)}, r"stages must be numbers in \[0, 1\]"),
        ({"name": "cosine", "iterations": 0}, "iterations must be an int of at least 1"),
    ],
)
def test_wrong_curricula_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        Curriculum.of(value)
    with pytest.raises(TypeError, match="AdaBack has no argument 'treshold'; did you mean threshold"):
        Curriculum.of({"name": "adaback", "treshold": 1})


def lock_agent(algorithm, rows=24, env=None, **arguments):
    made = make_env("textgym/CombinationLock-v0", num_envs=rows, **{**LOCK, **(env or {})})
    defaults = {"episodes_per_iteration": rows, "minibatch_size": rows, "kl_coef": 0.0, "learning_rate": 0.5}
    groups = {"group_size": 4} if algorithm in (GRPO, RLOO) else {}
    return algorithm(TabularPolicy.for_lock(made.lock), made, **{**defaults, **groups, "device": "cpu", **arguments})


def test_a_curriculum_decides_samples_and_prefixes_and_nothing_else():
    agent = lock_agent(PPO, curriculum=Stages((0.5,)))
    rollout = agent.play()
    assert (rollout.prefix_length == 2).all()
    assert (rollout.authors[:, :2] == int(Author.GUIDE)).all()
    assert int(rollout.guide_tokens.sum()) == 48
    samples = len(set(rollout.sample_ids.tolist()))
    assert agent.env.guide_tokens_written == 4 * samples, "a kept text is written once"
    expected = agent.plan()
    assert rollout.sample_ids.tolist() == expected.samples.tolist()
    # Hand-offs stay.
    agent = lock_agent(AggreVaTeD, curriculum=Stages((0.5,)), beta=1.0)
    rollout = agent.play()
    assert (rollout.authors[:, :2] == int(Author.GUIDE)).all()
    assert (rollout.finish_reason == "handoff").any()
    with pytest.raises(ValueError, match="guide"):
        lock_agent(GRPO, env={"guide": None}, curriculum="uniform")


def test_two_algorithms_do_not_share_what_a_curriculum_learned():
    rule = AdaBack()
    first, second = (lock_agent(GRPO, curriculum=rule, seed=seed) for seed in (0, 1))
    first.learn(total_episodes=48)
    assert not np.isnan(first.rule.intervals).all()
    assert np.isnan(second.rule.intervals).all()
    assert not hasattr(rule, "intervals")


def test_a_failed_group_is_rescued_by_the_shortest_prefix_that_helps():
    agent = lock_agent(GRPO, rows=48, dead_groups="rescue", rescue_fractions=(0.25, 0.5, 0.75))
    ending = agent.env.lock.endings[0][0]
    with torch.no_grad():  # the policy knows the last symbol alone, and never ends a text early
        agent.policy.logits[:, 0] = -50.0
        wrong = next(token for token in range(1, 6) if token not in ending)
        for depth in range(4):
            agent.policy.logits[depth, ending[depth] if depth == 3 else wrong] = 50.0
    before = agent.num_timesteps
    rollout = agent.play()
    expected = {"dead_groups": 1.0, "dead_groups_left": 1.0, "reward_before": 0.0}
    assert agent.play_record == expected, "all succeed: no signal either"
    assert (rollout.prefix_length == 3).all()
    assert (rollout.rewards == 1).all()
    # Four plays of 48 texts: 4 + 3 + 2 + 1 policy tokens; all prefixes of a sample are of one text of the guide.
    assert agent.num_timesteps - before == 48 * 10
    assert agent.env.guide_tokens_written == 4 * len(set(rollout.sample_ids.tolist()))
    assert agent.num_episodes == 4 * 48
    # A policy that half knows the last two: groups come alive, and every success keeps its prefix.
    agent = lock_agent(GRPO, rows=48, dead_groups="rescue")
    with torch.no_grad():
        for depth in (2, 3):
            agent.policy.logits[depth, ending[depth]] = math.log(5)
    record = agent.learn(total_episodes=48).history[0]
    assert record["dead_groups"] > record["dead_groups_left"]
    lengths, rewards = agent.last_rollout.prefix_length, agent.last_rollout.rewards
    assert (lengths.view(-1, 4) == lengths.view(-1, 4)[:, :1]).all(), "a group has one prefix"
    assert (rewards.view(-1, 4).amax(1)[lengths.view(-1, 4)[:, 0] > 0] == 1).all()


def test_dead_groups_are_replaced_by_live_ones():
    played = {}
    for dead_groups in ("keep", "resample"):
        agent = lock_agent(RLOO, rows=32, env={"length": 2}, dead_groups=dead_groups, resamplings=8, seed=3)
        played[dead_groups] = agent, agent.play()
    (kept, before), (agent, after) = played["keep"], played["resample"]
    dead, left = kept.dead(before), agent.dead(after)
    assert agent.play_record["dead_groups"] == float(dead.float().mean())
    assert agent.play_record["reward_before"] == float(before.rewards.mean())
    assert dead.sum() > 0
    assert left.sum() < dead.sum()
    same = (before.input_ids == after.input_ids).all(1).view(-1, 4).all(1)
    assert torch.equal(same, ~dead | left), "live groups stay, and what takes the place of a dead one is live"
    assert agent.num_episodes > kept.num_episodes == 32


def test_dropped_groups_change_nothing_but_the_divisor():
    gradients = []
    for drop_dead in (False, True):
        agent = lock_agent(GRPO, rows=64, env={"length": 2}, seed=3, drop_dead=drop_dead, kl_coef=0.0)
        rollout = agent.play()
        dead = agent.dead(rollout)
        assert 0 < dead.sum() < len(dead)
        credit = agent.credit(rollout, agent.reference_log_probs(rollout))
        (minibatch, *_) = agent.minibatches(agent.learned_rows(rollout, credit))
        agent.backward(rollout, credit, minibatch, {})
        gradients.append(agent.policy.logits.grad)
    share = 1 - float(dead.float().mean())
    torch.testing.assert_close(gradients[0], gradients[1] * share)
    # Nothing to learn from: no step, where "keep" would take one of Adam's momentum.
    rollout.rewards[:] = 0.0
    assert agent.update(rollout, credit) == {"gradient_steps": 0, "stopped_early": 0.0}


def test_a_curriculum_opens_a_lock_that_grpo_does_not():
    def opened(**arguments):
        agent = lock_agent(GRPO, rows=64, env={"vocab_size": 12, "length": 6}, seed=0, scale="none", **arguments)
        agent.learn(total_episodes=64 * 60)
        probs = agent.policy.logits.detach().double().softmax(-1).numpy()
        return float(np.prod([probs[depth, token] for depth, token in enumerate(agent.env.lock.endings[0][0])]))

    assert opened() < 0.01
    assert opened(curriculum="adaback") > 0.9
