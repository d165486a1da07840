"""PPO's formulas against an independent float64 reference, its invariants, and that it learns."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents.advantages import gae, masked_mean, whiten
from agents.ppo import PPO, ppo_loss, token_rewards
from agents.ppo_plus_plus import PPOPlusPlus
from agents.rollout import collect
from textgym import Guidance
from textgym.guides import Author, CallableGuide, Completion
from textgym.guides.local import LocalGuide
from textgym.seeding import hash64


@st.composite
def ragged(draw):
    """A seed and bodies: for each row a start and a length within T columns (a length of 0 is a row without a body)."""
    horizon = draw(st.integers(1, 7))
    rows = draw(st.lists(st.tuples(st.integers(0, horizon - 1), st.integers(0, horizon)), min_size=1, max_size=5))
    bodies = [(start, min(start + length, horizon)) for start, length in rows]
    return draw(st.integers(0, 2**31)), horizon, bodies


def random_batch(seed, horizon, bodies):
    random = np.random.default_rng(seed)
    mask = np.zeros((len(bodies), horizon), bool)
    for row, (start, end) in enumerate(bodies):
        mask[row, start:end] = True
    names = ("rewards", "values", "log_probs", "old_log_probs", "old_values", "entropy", "advantages", "returns")
    arrays = {name: random.normal(size=mask.shape) for name in names}
    for array in arrays.values():
        array[~mask] = np.nan  # whatever stands outside of a body must not matter
    return mask, arrays


@settings(deadline=None, max_examples=100)
@given(ragged(), st.floats(0, 1), st.floats(0, 1))
def test_advantages_are_sums_of_discounted_errors(batch, gamma, gae_lambda):
    mask, arrays = random_batch(*batch)
    rewards, values = arrays["rewards"], arrays["values"]
    advantages, returns = gae(*(torch.from_numpy(a) for a in (rewards, values, mask)), gamma, gae_lambda)
    expected = np.zeros(mask.shape)
    for row, (start, end) in enumerate(batch[2]):
        value = [*values[row, start:end], 0.0]
        errors = [rewards[row, start + i] + gamma * value[i + 1] - value[i] for i in range(end - start)]
        for i in range(end - start):
            expected[row, start + i] = sum((gamma * gae_lambda) ** (j - i) * errors[j] for j in range(i, end - start))
    np.testing.assert_allclose(advantages, expected, atol=1e-12)
    np.testing.assert_allclose(returns, np.where(mask, expected + np.nan_to_num(values), 0), atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(ragged(), st.floats(0.1, 1))
def test_with_lambda_one_returns_are_discounted_rewards_to_go(batch, gamma):
    mask, arrays = random_batch(*batch)
    _, returns = gae(
        *(torch.from_numpy(arrays[name]) for name in ("rewards", "values")), torch.from_numpy(mask), gamma, 1
    )
    for row, (start, end) in enumerate(batch[2]):
        for h in range(start, end):
            expected = sum(gamma ** (k - h) * arrays["rewards"][row, k] for k in range(h, end))
            assert returns[row, h] == pytest.approx(expected)


@settings(deadline=None, max_examples=50)
@given(ragged())
def test_whitening_and_means_read_credited_tokens_only(batch):
    mask, arrays = random_batch(*batch)
    values, mask = torch.from_numpy(arrays["advantages"]), torch.from_numpy(mask)
    credited = values[mask].numpy()
    white = whiten(values, mask)
    assert (white[~mask] == 0).all()
    if len(credited):
        assert masked_mean(values, mask) == pytest.approx(credited.mean())
        np.testing.assert_allclose(white[mask], (credited - credited.mean()) / (credited.std() + 1e-8), atol=1e-9)
    else:
        assert masked_mean(values, mask) == 0


@settings(deadline=None, max_examples=100)
@given(ragged(), st.floats(0.01, 0.5), st.none() | st.floats(0.01, 0.5), st.floats(0, 1), st.floats(0, 1))
def test_loss_and_gradients_are_those_of_the_formula(batch, clip_range, clip_range_vf, vf_coef, ent_coef):
    mask, arrays = random_batch(*batch)
    names = ("log_probs", "values", "entropy", "old_log_probs", "old_values", "advantages", "returns")
    tensors = {name: torch.from_numpy(arrays[name]) for name in names}
    for name in names[:3]:
        tensors[name].requires_grad_()
    terms = ppo_loss(
        **tensors,
        decisions=torch.from_numpy(mask),
        states=torch.from_numpy(mask),
        clip_range=clip_range,
        clip_range_vf=clip_range_vf,
        vf_coef=vf_coef,
        ent_coef=ent_coef,
    )
    terms.loss.backward()

    count = max(mask.sum(), 1)
    surrogate = value_loss = entropy = clipped = 0.0
    gradient = {name: np.zeros(mask.shape) for name in names[:3]}
    for index in zip(*np.nonzero(mask), strict=True):
        log_prob, value, bonus, old_log_prob, old_value, advantage, target = (arrays[name][index] for name in names)
        ratio = math.exp(log_prob - old_log_prob)
        bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
        surrogate += min(ratio * advantage, bounded * advantage)
        clipped += abs(ratio - 1) > clip_range
        if ratio * advantage <= bounded * advantage:
            gradient["log_probs"][index] = -ratio * advantage / count
        moved = (
            value if clip_range_vf is None else old_value + min(max(value - old_value, -clip_range_vf), clip_range_vf)
        )
        value_loss += 0.5 * max((value - target) ** 2, (moved - target) ** 2)
        inside = clip_range_vf is None or abs(value - old_value) <= clip_range_vf
        if inside or (value - target) ** 2 > (moved - target) ** 2:
            gradient["values"][index] = vf_coef * (value - target) / count
        entropy += bonus
        gradient["entropy"][index] = -ent_coef / count
    assert terms.policy_loss.item() == pytest.approx(-surrogate / count)
    assert terms.value_loss.item() == pytest.approx(value_loss / count)
    assert terms.entropy.item() == pytest.approx(entropy / count)
    assert terms.clip_fraction.item() == pytest.approx(clipped / count)
    assert terms.loss.item() == pytest.approx((-surrogate + vf_coef * value_loss - ent_coef * entropy) / count)
    for name in names[:3]:
        np.testing.assert_allclose(tensors[name].grad, gradient[name], atol=1e-9, err_msg=name)


def test_the_task_reward_is_on_the_last_body_token_and_the_penalty_on_every_one():
    body = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
    log_ratio = torch.where(body, torch.arange(12.0).reshape(3, 4), torch.nan)
    rewards = token_rewards(torch.tensor([100.0, 200.0, 300.0]), log_ratio, body, 0.5)
    np.testing.assert_allclose(rewards, [[0, -0.5, 99, 0], [-2, -2.5, -3, 196.5], [0, 0, 0, 0]])


def guide_writing(tokens):
    """A guide that always writes these tokens."""
    return CallableGuide(lambda requests: [Completion(token_ids=tokens[: r.max_new_tokens]) for r in requests])


def play(env, policy, seed=0, guidance=None):
    seeds = hash64(seed, np.arange(env.num_envs))
    return collect(env, policy, seeds=seeds, reset_seed=seed, options={"guidance": guidance or Guidance()})


def losses_of(policy, rollout, rows, advantages, padding=0):
    """The loss of some rows, and the gradient of every parameter."""
    padded = [
        torch.nn.functional.pad(tensor[rows], (padding, padding))
        for tensor in (rollout.input_ids, rollout.attention_mask)
    ]
    columns = torch.where(rollout.body, rollout.columns(rollout.body) + padding, -1)
    now = policy.evaluate(*padded, columns[rows])
    terms = ppo_loss(
        log_probs=now.log_probs,
        values=now.values,
        entropy=now.entropy,
        old_log_probs=rollout.log_probs[rows] + 0.05,
        old_values=rollout.values[rows],
        advantages=advantages[rows],
        returns=advantages[rows],
        decisions=rollout.decisions[rows],
        states=rollout.decisions[rows],
        clip_range=0.2,
        clip_range_vf=0.2,
        vf_coef=0.5,
        ent_coef=0.1,
    )
    policy.zero_grad()
    terms.loss.backward()
    return terms.loss, [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


def test_loss_and_gradients_do_not_depend_on_padding_order_or_split(make_env, make_policy):
    policy = make_policy()
    torch.nn.init.normal_(policy.heads["value"].weight, std=0.1)
    env = make_env(8, guide=guide_writing([20, 21, 22, 23, 24, 25]))
    rollout = play(env, policy, guidance=Guidance(restart_prob=0.5))
    advantages = torch.randn(8, env.max_new_tokens, generator=torch.Generator().manual_seed(0))
    rows, order = torch.arange(8), torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    loss, gradients = losses_of(policy, rollout, rows, advantages)
    for other_rows, padding in ((rows, 2), (order, 0)):
        other_loss, other_gradients = losses_of(policy, rollout, other_rows, advantages, padding)
        torch.testing.assert_close(other_loss, loss, rtol=1e-5, atol=1e-6)
        for gradient, other in zip(gradients, other_gradients, strict=True):
            torch.testing.assert_close(other, gradient, rtol=1e-4, atol=1e-6)

    # A mean over credited tokens: two halves, weighted by their tokens, are the whole.
    body = rollout.body
    halves = [losses_of(policy, rollout, half, advantages)[0] * body[half].sum() for half in (rows[:3], rows[3:])]
    torch.testing.assert_close(sum(halves) / body.sum(), loss, rtol=1e-5, atol=1e-6)


def test_sampling_and_evaluation_agree_so_that_first_ratios_are_one(make_env, make_policy):
    policy = make_policy()
    torch.nn.init.normal_(policy.heads["value"].weight, std=0.1)
    env = make_env(16, guide=guide_writing([20, 21, 22, 23, 24, 25]))
    rollout = play(env, policy, guidance=Guidance(restart_prob=0.5))
    now = policy.evaluate(rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.body))
    torch.testing.assert_close(now.log_probs, rollout.log_probs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(now.values, rollout.values, rtol=1e-4, atol=1e-5)


def test_a_row_is_the_same_episode_alone_or_in_any_batch(make_env, make_policy):
    policy = make_policy()
    together = play(make_env(16), policy)
    env = make_env(1)
    for row in (0, 7):
        seeds = hash64(0, np.array([row]))
        alone = collect(env, policy, seeds=seeds, options={"index": [int(together.sample_ids[row])]})
        assert alone.texts[0] == together.texts[row]
        assert (alone.input_ids[0] == together.input_ids[row]).all()


def test_ppo_plus_plus_starts_where_the_guide_left_off_and_never_moves_it(make_env, make_policy):
    policy = make_policy()
    guide = LocalGuide(policy.model, tokenizer=policy.tokenizer, device="cpu")
    before, start = guide.fingerprint, policy.model.lm_head.weight.clone()
    env = make_env(32, guide=guide)
    agent = PPOPlusPlus(policy, env, beta=1.0, episodes_per_iteration=32, learning_rate=1e-2, n_epochs=1, device="cpu")
    rollouts = []
    agent.learn(total_episodes=64, callback=lambda scope, _: rollouts.append(scope["self"].last_rollout))
    for rollout in rollouts:
        for row in range(32):
            prefix = int(rollout.prefix_length[row])
            authors = rollout.authors[row].tolist()
            assert authors[:prefix] == [Author.GUIDE] * prefix
            assert Author.GUIDE not in authors[prefix:]
        assert (rollout.log_probs[~rollout.body] == 0).all()
        assert (rollout.values[~rollout.body] == 0).all()
    assert sum(int(rollout.guide_tokens.sum()) for rollout in rollouts) == agent.num_guide_tokens > 0
    assert len({int(length) for length in rollouts[0].prefix_length}) > 2
    assert guide.fingerprint == before
    assert not torch.equal(policy.model.lm_head.weight, start)
    with pytest.raises(ValueError, match="guide"):
        PPOPlusPlus(make_policy(), make_env(4), device="cpu")


def test_ppo_learns(make_env, make_policy):
    agent = PPO(make_policy(), make_env(32), episodes_per_iteration=32, learning_rate=3e-3, kl_coef=0.0, device="cpu")
    agent.learn(total_episodes=32 * 25)
    rewards = [record["reward"] for record in agent.history]
    assert np.mean(rewards[:2]) < 0.4
    assert np.mean(rewards[-3:]) > 0.9


def test_a_constant_added_to_every_reward_changes_nothing(make_env, make_policy):
    weights = []
    for constant in (0.0, 100.0):

        def shifted(*, prompts, completions, references, constant=constant):
            return [constant + len(text) / 64 for text in completions]  # exact in float32

        agent = PPO(make_policy(), make_env(16, reward=shifted), episodes_per_iteration=16, device="cpu")
        weights.append(agent.learn(total_episodes=48).policy.model.lm_head.weight)
    torch.testing.assert_close(*weights, rtol=1e-3, atol=1e-5)


def test_the_kl_penalty_holds_the_policy(make_env, make_policy):
    kl = {}
    for kl_coef in (0.0, 1.0):
        agent = PPO(
            make_policy(), make_env(32), episodes_per_iteration=32, learning_rate=3e-3, kl_coef=kl_coef, device="cpu"
        )
        agent.learn(total_episodes=32 * 16)
        kl[kl_coef] = agent.history[-1]["kl"]
        assert agent.history[0]["kl"] == pytest.approx(0, abs=1e-4)
    assert kl[1.0] < 0.25 * kl[0.0]
