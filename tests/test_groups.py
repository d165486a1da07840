"""RLOO and GRPO against brute force and float64 references: returns, baselines, losses, gradients, groups."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.grpo import GRPO
from agents.policy import Evaluation
from agents.policy_gradient import Credit
from agents.rloo import RLOO
from textgym.guides import CallableGuide, Completion
from textgym.seeding import hash64

GROUP = 4
GUIDE = CallableGuide(
    lambda requests: [
        Completion(token_ids=(262 + hash64(r.seed, np.arange(r.max_new_tokens)) % 30).astype(int).tolist())
        for r in requests
    ]
)


def ready(agent, std=0.1):
    """Move the policy away from its reference."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=std)
    return agent


def make(algorithm, make_env, make_policy, **arguments):
    arguments = {"episodes_per_iteration": 32, "minibatch_size": 32, "group_size": GROUP, "device": "cpu", **arguments}
    return ready(algorithm(make_policy(), make_env(16, guide=GUIDE), **arguments))


def returns_of(rollout, reference, kl_coef):
    """Reward less the weighted sum of log ratios over the body, text by text."""
    returns = []
    for row in range(len(rollout)):
        body = rollout.body[row].nonzero().flatten().tolist()
        summed = sum((rollout.log_probs[row, h] - reference[row, h]).item() for h in body)
        returns.append(rollout.rewards[row].item() - kl_coef * summed)
    return returns


@pytest.mark.parametrize("beta", [0.0, 0.8])
@pytest.mark.parametrize("kl_penalty", ["reward", "loss"])
def test_the_baseline_of_a_text_is_the_mean_of_the_others(kl_penalty, beta, make_env, make_policy):
    agent = make(RLOO, make_env, make_policy, kl_coef=0.3, kl_penalty=kl_penalty, beta=beta)
    rollout = agent.play()
    reference = agent.reference_log_probs(rollout)
    credit = agent.credit(rollout, reference)
    returns = returns_of(rollout, reference, 0.3 if kl_penalty == "reward" else 0.0)
    for row in range(32):
        first = row - row % GROUP
        others = [returns[other] for other in range(first, first + GROUP) if other != row]
        expected = returns[row] - sum(others) / (GROUP - 1)
        np.testing.assert_allclose(credit.advantages[row], expected, atol=1e-5)
    np.testing.assert_allclose(credit.advantages[:, 0].reshape(-1, GROUP).sum(1), 0, atol=1e-5)
    assert not credit.states.any()


def test_in_the_first_step_rloo_follows_the_published_gradient(make_env, make_policy):
    """1/N sum_i (R_i - mean of the others) grad log pi(y_i | x), whatever the clip range (arXiv 2402.14740, eq. 8)."""
    gradients = []
    for clip_range in (0.2, 1e-3, None):
        agent = make(RLOO, make_env, make_policy, kl_coef=0.3, clip_range=clip_range, max_grad_norm=1e9, beta=0.5)
        rollout = agent.play()
        reference = agent.reference_log_probs(rollout)
        returns = torch.tensor(returns_of(rollout, reference, 0.3)).reshape(-1, GROUP)
        total = 0.0
        for group in range(len(returns)):
            for member in range(GROUP):
                row = torch.tensor([group * GROUP + member])
                columns = rollout.columns(rollout.body)[row]
                text = agent.policy.evaluate_actions(rollout.input_ids[row], rollout.attention_mask[row], columns)
                baseline = (returns[group].sum() - returns[group, member]) / (GROUP - 1)
                total = total - (returns[group, member] - baseline) * text.log_probs.sum() / 32
        agent.policy.zero_grad()
        total.backward()
        expected = {name: p.grad.clone() for name, p in agent.policy.model.named_parameters()}
        # The ratios are 1 to within the rounding of sampling; a clip range of 1e-3 must not cut that off.
        losses = agent.update(rollout, agent.credit(rollout, reference))
        assert losses.get("clip_fraction", 0) == 0
        for name, parameter in agent.policy.model.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5, msg=name)
        gradients.append(max(gradient.abs().max() for gradient in expected.values()))
    assert min(gradients) > 1e-3


@st.composite
def minibatches(draw, horizon=5):
    """A seed, the (start, end) of each text's decisions, and which of them are the part at hand."""
    bodies = draw(st.lists(st.tuples(st.integers(0, horizon - 1), st.integers(1, horizon)), min_size=1, max_size=6))
    rows = draw(st.lists(st.booleans(), min_size=len(bodies), max_size=len(bodies)))
    return draw(st.integers(0, 2**31)), [(a, min(a + n, horizon)) for a, n in bodies], np.array(rows)


def arrays_of(seed, bodies, horizon=5):
    random = np.random.default_rng(seed)
    decisions = np.zeros((len(bodies), horizon), bool)
    for row, (start, end) in enumerate(bodies):
        decisions[row, start:end] = True
    names = ("log_probs", "old_log_probs", "reference_log_probs", "entropy")
    arrays = {name: np.where(decisions, random.normal(size=decisions.shape) / 3, np.nan) for name in names}
    arrays["advantages"] = np.repeat(random.normal(size=(len(bodies), 1)), horizon, 1)
    return decisions, arrays


def loss_of(agent, decisions, arrays, rows):
    """What an algorithm says of the rows at hand, and the gradients of its loss."""
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    nothing = torch.zeros_like(tensors["advantages"])
    whole = Credit(
        decisions=torch.from_numpy(decisions),
        log_probs=tensors["old_log_probs"],
        reference_log_probs=tensors["reference_log_probs"],
        advantages=tensors["advantages"],
        states=torch.zeros(decisions.shape, dtype=torch.bool),
        values=nothing,
        returns=nothing,
    )
    part = torch.from_numpy(rows)
    now = Evaluation(tensors["log_probs"][part].requires_grad_(), tensors["entropy"][part], nothing)
    terms = agent.loss(now, whole[part], whole)
    if rows.any():
        terms["loss"].backward()
    return {name: float(term.detach()) for name, term in terms.items()}, now.log_probs.grad


def bare(algorithm, **attributes):
    """An algorithm with nothing but what its loss reads."""
    agent = object.__new__(algorithm)
    vars(agent).update(env=SimpleNamespace(max_new_tokens=5), kl_coef=0.4, imitation=None, **attributes)
    return agent


@settings(deadline=None, max_examples=100)
@given(
    minibatches(),
    st.sampled_from(["text", "batch", "horizon"]),
    st.sampled_from(["loss", "reward"]),
    st.floats(0.05, 0.4),
)
def test_grpos_loss_and_gradient_are_those_of_the_formula(batch, length_norm, kl_penalty, clip_range):
    seed, bodies, rows = batch
    decisions, arrays = arrays_of(seed, bodies)
    agent = bare(GRPO, clip_range=clip_range, length_norm=length_norm, kl_penalty=kl_penalty)
    terms, gradients = loss_of(agent, decisions, arrays, rows)
    policy_loss = kl_loss = clipped = 0.0
    expected = np.zeros(decisions.shape)
    for row in np.flatnonzero(rows):
        weight = {
            "text": 1 / decisions[row].sum() / len(bodies),
            "batch": 1 / decisions.sum(),
            "horizon": 1 / 5 / len(bodies),
        }[length_norm]
        for h in np.flatnonzero(decisions[row]):
            log_prob, old, reference = (
                arrays[name][row, h] for name in ("log_probs", "old_log_probs", "reference_log_probs")
            )
            advantage, ratio = arrays["advantages"][row, 0], math.exp(log_prob - old)
            bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
            policy_loss -= weight * min(ratio * advantage, bounded * advantage)
            if ratio * advantage <= bounded * advantage:
                expected[row, h] -= weight * ratio * advantage
            clipped += abs(ratio - 1) > clip_range
            towards = math.exp(reference - log_prob)
            kl_loss += weight * (towards - 1 - math.log(towards))
            if kl_penalty == "loss":
                expected[row, h] += 0.4 * weight * (1 - towards)
    loss = policy_loss + (0.4 * kl_loss if kl_penalty == "loss" else 0)
    assert terms["loss"] == pytest.approx(loss, rel=1e-6, abs=1e-6)
    assert terms["policy_loss"] == pytest.approx(policy_loss, rel=1e-6, abs=1e-6)
    assert terms.get("kl_loss", kl_loss) == pytest.approx(kl_loss, rel=1e-6, abs=1e-6)
    assert terms["clip_fraction"] == pytest.approx(clipped / decisions.sum(), rel=1e-6)
    if rows.any():
        np.testing.assert_allclose(gradients, expected[rows], atol=1e-6)


@settings(deadline=None, max_examples=100)
@given(minibatches(), st.none() | st.floats(0.05, 0.4), st.sampled_from(["loss", "reward"]))
def test_rloos_loss_and_gradient_treat_a_text_as_one_action(batch, clip_range, kl_penalty):
    seed, bodies, rows = batch
    decisions, arrays = arrays_of(seed, bodies)
    terms, gradients = loss_of(bare(RLOO, clip_range=clip_range, kl_penalty=kl_penalty), decisions, arrays, rows)
    policy_loss = kl_loss = 0.0
    expected = np.zeros(decisions.shape)
    for row in np.flatnonzero(rows):
        steps, advantage = np.flatnonzero(decisions[row]), arrays["advantages"][row, 0]
        ratio = math.exp(sum(arrays["log_probs"][row, steps] - arrays["old_log_probs"][row, steps]))
        bounded = ratio if clip_range is None else min(max(ratio, 1 - clip_range), 1 + clip_range)
        policy_loss -= min(ratio * advantage, bounded * advantage) / len(bodies)
        if ratio * advantage <= bounded * advantage:
            expected[row, steps] -= ratio * advantage / len(bodies)
        for h in steps:
            towards = math.exp(arrays["reference_log_probs"][row, h] - arrays["log_probs"][row, h])
            kl_loss += (towards - 1 - math.log(towards)) / len(bodies)
            if kl_penalty == "loss":
                expected[row, h] += 0.4 * (1 - towards) / len(bodies)
    assert terms["policy_loss"] == pytest.approx(policy_loss, rel=1e-6, abs=1e-9)
    assert terms["loss"] == pytest.approx(policy_loss + (0.4 * kl_loss if kl_penalty == "loss" else 0), abs=1e-6)
    if rows.any():
        np.testing.assert_allclose(gradients, expected[rows], atol=1e-9)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("kl_penalty", ["reward", "loss"])
def test_grpos_advantages_are_relative_to_the_group(scale, kl_penalty, make_env, make_policy):
    agent = make(GRPO, make_env, make_policy, kl_coef=0.3, kl_penalty=kl_penalty, scale=scale)
    rollout = agent.play()
    reference = agent.reference_log_probs(rollout)
    advantages = agent.credit(rollout, reference).advantages
    returns = np.array(returns_of(rollout, reference, 0.3 if kl_penalty == "reward" else 0.0)).reshape(-1, GROUP)
    for row in range(32):
        group = returns[row // GROUP]
        unit = {
            "group": group.std(ddof=1),
            "batch": (returns - returns.mean(1, keepdims=True)).std(ddof=1),
            "none": 1.0,
        }[scale]
        expected = (returns.flat[row] - group.mean()) / (unit + (scale != "none") * 1e-4)
        np.testing.assert_allclose(advantages[row], expected, rtol=1e-4, atol=1e-4)


def test_a_group_that_earns_the_same_learns_nothing(make_env, make_policy):
    for algorithm in (RLOO, GRPO):
        agent = make(algorithm, make_env, make_policy, kl_coef=0.0)
        rollout = agent.play()
        rollout.rewards[:] = 0.3
        advantages = agent.credit(rollout, agent.reference_log_probs(rollout)).advantages
        np.testing.assert_allclose(advantages, 0, atol=1e-3)


@pytest.mark.parametrize("algorithm", [RLOO, GRPO])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_groups_share_prompt_and_prefix_and_nothing_else(algorithm, beta, make_env, make_policy):
    agent = make(algorithm, make_env, make_policy, beta=beta)
    rollout = agent.play()
    assert len(rollout) == 32
    starts, prefixes = set(), []
    for first in range(0, 32, GROUP):
        rows = slice(first, first + GROUP)
        (length,) = set(rollout.prefix_length[rows].tolist())
        context = rollout.input_ids[rows, : rollout.prompt_columns + length]
        assert (context == context[0]).all()
        assert len(set(rollout.sample_ids[rows])) == 1
        assert len({tuple(ids.tolist()) for ids in rollout.input_ids[rows]}) > 1
        starts.add(tuple(context[0].tolist()))
        prefixes.append(length)
    assert len(starts) > 4
    assert (max(prefixes) > 0) == (beta > 0)
    assert (rollout.completion == 0).all()
    agent.learn(total_episodes=32)
    assert len(agent.last_rollout) == 32


def test_wrong_groups_are_refused(make_env, make_policy):
    env = make_env(16)
    with pytest.raises(ValueError, match="group_size must be at least 2"):
        RLOO(make_policy(), env, group_size=1, episodes_per_iteration=16)
    with pytest.raises(ValueError, match="group_size must be a divisor of 16 rows"):
        GRPO(make_policy(), env, group_size=5, episodes_per_iteration=16)
    with pytest.raises(ValueError, match="guide"):
        GRPO(make_policy(), env, beta=0.5, episodes_per_iteration=16)
    for name in ("scale", "length_norm"):
        with pytest.raises(ValueError, match=name):
            GRPO(make_policy(), env, episodes_per_iteration=16, **{name: "tokens"})
