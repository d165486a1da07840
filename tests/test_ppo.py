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
from agents.reinforce import REINFORCE
from agents.rollout import collect
from textgym import Guidance
from textgym.decoding import Decoding
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


def masks(shape):
    """Any choice of entries."""
    size = int(np.prod(shape))
    return st.lists(st.booleans(), min_size=size, max_size=size).map(lambda bits: np.array(bits, bool).reshape(shape))


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
@given(ragged(), st.data(), st.floats(0.01, 0.5), st.none() | st.floats(0.01, 0.5), st.floats(0, 1), st.floats(0, 1))
def test_loss_and_gradients_are_those_of_the_formula(batch, data, clip_range, clip_range_vf, vf_coef, ent_coef):
    """Decisions and learned states may be the same tokens (PPO), others (AggreVaTeD), or none (a row without body)."""
    decisions, arrays = random_batch(*batch)
    states = decisions if data.draw(st.booleans()) else data.draw(masks(decisions.shape))
    of_decisions, of_states = (
        ("log_probs", "entropy", "old_log_probs", "advantages"),
        ("values", "old_values", "returns"),
    )
    random = np.random.default_rng(batch[0] + 1)
    for name in of_states:
        arrays[name] = np.where(states, random.normal(size=states.shape), np.nan)
    learned = ("log_probs", "values", "entropy")
    tensors = {name: torch.from_numpy(arrays[name]) for name in of_decisions + of_states}
    for name in learned:
        tensors[name].requires_grad_()
    whole = data.draw(st.booleans())
    more_decisions, more_states = (0, 0) if whole else (3, 5)  # a minibatch of which this batch is a part
    terms = ppo_loss(
        **tensors,
        decisions=torch.from_numpy(decisions),
        states=torch.from_numpy(states),
        clip_range=clip_range,
        clip_range_vf=clip_range_vf,
        vf_coef=vf_coef,
        ent_coef=ent_coef,
        num_decisions=None if whole else torch.tensor(decisions.sum() + more_decisions),
        num_states=None if whole else torch.tensor(states.sum() + more_states),
    )
    terms.loss.backward()

    count, num_states = max(decisions.sum() + more_decisions, 1), max(states.sum() + more_states, 1)
    surrogate = value_loss = entropy = clipped = approx_kl = 0.0
    gradient = {name: np.zeros(decisions.shape) for name in learned}
    for index in zip(*np.nonzero(decisions), strict=True):
        log_prob, bonus, old_log_prob, advantage = (arrays[name][index] for name in of_decisions)
        ratio = math.exp(log_prob - old_log_prob)
        bounded = min(max(ratio, 1 - clip_range), 1 + clip_range)
        surrogate += min(ratio * advantage, bounded * advantage)
        clipped += abs(ratio - 1) > clip_range
        approx_kl += ratio - 1 - math.log(ratio)
        if ratio * advantage <= bounded * advantage:
            gradient["log_probs"][index] = -ratio * advantage / count
        entropy += bonus
        gradient["entropy"][index] = -ent_coef / count
    for index in zip(*np.nonzero(states), strict=True):
        value, old_value, target = (arrays[name][index] for name in of_states)
        moved = (
            value if clip_range_vf is None else old_value + min(max(value - old_value, -clip_range_vf), clip_range_vf)
        )
        value_loss += 0.5 * max((value - target) ** 2, (moved - target) ** 2)
        inside = clip_range_vf is None or abs(value - old_value) <= clip_range_vf
        if inside or (value - target) ** 2 > (moved - target) ** 2:
            gradient["values"][index] = vf_coef * (value - target) / num_states
    assert terms.policy_loss.item() == pytest.approx(-surrogate / count)
    assert terms.value_loss.item() == pytest.approx(value_loss / num_states)
    assert terms.entropy.item() == pytest.approx(entropy / count)
    assert terms.clip_fraction.item() == pytest.approx(clipped / count)
    assert terms.approx_kl.item() == pytest.approx(approx_kl / count)
    expected = -surrogate / count + vf_coef * value_loss / num_states - ent_coef * entropy / count
    assert terms.loss.item() == pytest.approx(expected, abs=1e-9)
    for name in learned:
        grad = tensors[name].grad
        if name == "entropy" and not ent_coef:
            assert grad is None
        else:
            np.testing.assert_allclose(grad, gradient[name], atol=1e-9, err_msg=name)


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


def losses_of(policy, rollout, rows, advantages, left=0, right=0):
    """The loss of some rows, padded with junk, and the gradient of every parameter."""
    input_ids = torch.nn.functional.pad(rollout.input_ids[rows], (left, right), value=3)
    attention_mask = torch.nn.functional.pad(rollout.attention_mask[rows], (left, right))
    columns = torch.where(rollout.body, rollout.columns(rollout.body) + left, -1)
    now = policy.evaluate_actions(input_ids, attention_mask, columns[rows])
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


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)], ids=str)
def test_loss_and_gradients_do_not_depend_on_padding_order_or_split(dtype, tolerance, make_env, make_policy):
    policy = make_policy()
    torch.nn.init.normal_(policy.heads["value"].weight, std=0.1)
    env = make_env(8, guide=guide_writing([20, 21, 22, 23, 24, 25]))
    rollout = play(env, policy, guidance=Guidance(restart_prob=0.5))
    policy.to(dtype)
    advantages = torch.randn(8, env.max_new_tokens, generator=torch.Generator().manual_seed(0), dtype=dtype)
    rows, order = torch.arange(8), torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])
    loss, gradients = losses_of(policy, rollout, rows, advantages)
    assert loss.dtype == dtype
    for other_rows, left, right in ((rows, 5, 0), (rows, 0, 4), (rows, 2, 9), (order, 0, 0)):
        other_loss, other_gradients = losses_of(policy, rollout, other_rows, advantages, left, right)
        torch.testing.assert_close(other_loss, loss, rtol=0, atol=tolerance)
        for gradient, other in zip(gradients, other_gradients, strict=True):
            torch.testing.assert_close(other, gradient, rtol=tolerance, atol=tolerance)

    # A mean over credited tokens: two halves, weighted by their tokens, are the whole.
    body = rollout.body
    halves = [losses_of(policy, rollout, half, advantages)[0] * body[half].sum() for half in (rows[:3], rows[3:])]
    torch.testing.assert_close(sum(halves) / body.sum(), loss, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "decoding",
    [
        Decoding(top_k=2),
        Decoding(top_p=0.05),
        Decoding(temperature=0.3),
        Decoding(temperature=3.0, min_new_tokens=5),
        Decoding(greedy=True),
    ],
    ids=str,
)
def test_truncated_sampling_records_untruncated_log_probs_that_stay_finite(decoding, make_env, make_policy):
    policy = make_policy()
    agent = PPO(policy, make_env(16), episodes_per_iteration=16, decoding=decoding, learning_rate=1e-6, device="cpu")
    rollout = agent.play()
    assert (rollout.authors >= 0).sum(1).min() >= min(decoding.min_new_tokens, 6)
    arguments = (rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.decisions))
    recorded = rollout.log_probs
    torch.testing.assert_close(recorded, policy.evaluate_actions(*arguments).log_probs, rtol=0, atol=1e-4)
    assert (recorded[rollout.body].exp() < 0.5).any(), "the truncated distribution would be more certain"
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    random = torch.Generator().manual_seed(0)
    for scale in (0.1, 1.0, 10.0):
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=random), alpha=scale)
        now = policy.evaluate_actions(*arguments)
        assert torch.isfinite(now.log_probs).all()
        assert torch.isfinite((now.log_probs - recorded).exp()).all()
        terms = agent.loss(now, credit, credit)
        policy.zero_grad()
        terms["loss"].backward()
        assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_sampling_and_evaluation_agree_so_that_first_ratios_are_one(make_env, make_policy):
    policy = make_policy()
    torch.nn.init.normal_(policy.heads["value"].weight, std=0.1)
    env = make_env(16, guide=guide_writing([20, 21, 22, 23, 24, 25]))
    rollout = play(env, policy, guidance=Guidance(restart_prob=0.5))
    now = policy.evaluate_actions(rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.body))
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


def ready(agent, std=0.05):
    """Move the policy away from its reference, with a critic that says something."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=std)
    return agent


def test_the_gradient_of_reinforce_is_the_score_function(make_env, make_policy):
    """E[(G - V) grad log pi], with G the discounted sum of what followed, task reward and KL penalty."""
    agent = ready(
        REINFORCE(
            make_policy(),
            make_env(16),
            episodes_per_iteration=16,
            gamma=0.9,
            kl_coef=0.3,
            vf_coef=0.0,
            max_grad_norm=1e9,
            device="cpu",
        )
    )
    rollout = agent.play()
    reference = agent.reference_log_probs(rollout)
    credit = agent.credit(rollout, reference)
    body, gains = rollout.body, torch.zeros(16, 6, dtype=torch.float64)
    for row in range(16):
        steps = body[row].nonzero().flatten().tolist()
        rewards = [-0.3 * float(rollout.log_probs[row, h] - reference[row, h]) for h in steps]
        rewards[-1] += float(rollout.rewards[row])
        for at, h in enumerate(steps):
            gains[row, h] = sum(0.9**k * reward for k, reward in enumerate(rewards[at:]))
    advantages = (gains - rollout.values - rollout.rewards.mean())[body]
    torch.testing.assert_close(credit.returns[body].double(), gains[body], rtol=0, atol=1e-5)
    white = torch.zeros(16, 6)
    white[body] = ((advantages - advantages.mean()) / advantages.std(correction=0)).float()
    agent.policy.zero_grad()
    now = agent.policy.evaluate_actions(rollout.input_ids, rollout.attention_mask, rollout.columns(body))
    (-(white * now.log_probs).sum() / body.sum()).backward()
    expected = {name: p.grad.clone() for name, p in agent.policy.model.named_parameters()}
    agent.update(rollout, credit)
    for name, parameter in agent.policy.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [1, 1, 1, 1, 1, 1]),
        ("linear", [1, 0.75, 0.5, 0.25, 0, 0]),
        ("cosine", [(1 + math.cos(math.pi * share)) / 2 for share in (0, 0.25, 0.5, 0.75, 1, 1)]),
    ],
)
def test_schedules_take_their_values_whether_resumed_or_not(
    schedule, shares, make_env, make_policy, tmp_path, monkeypatch
):
    clip_ranges = []

    def spy(**arguments):
        clip_ranges.append(arguments["clip_range"])
        return ppo_loss(**arguments)

    monkeypatch.setattr("agents.ppo.ppo_loss", spy)
    arguments = {"learning_rate": 1e-3, "lr_schedule": schedule, "clip_range": 0.3, "clip_schedule": schedule}
    sizes = {"episodes_per_iteration": 8, "minibatch_size": 8, "n_epochs": 1, "schedule_episodes": 32}
    agent = PPO(make_policy(), make_env(8), **arguments, **sizes, device="cpu")
    agent.learn(total_episodes=24)
    agent.save(tmp_path / "middle")
    agent = PPO.load(tmp_path / "middle", make_env(8), device="cpu").learn(total_episodes=24)
    assert [record["learning_rate"] for record in agent.history] == pytest.approx([1e-3 * share for share in shares])
    assert clip_ranges == pytest.approx([0.3 * share for share in shares])
    with pytest.raises(ValueError, match="schedule_episodes"):
        PPO(make_policy(), make_env(8), episodes_per_iteration=8, clip_schedule="linear")
    with pytest.raises(ValueError, match="schedule_episodes"):
        PPO(make_policy(), make_env(8), episodes_per_iteration=8, lr_schedule="cosine")


def test_target_kl_ends_an_iteration_before_the_step_that_is_too_far(make_env, make_policy):
    weights = []
    for arguments in ({"n_epochs": 1}, {"n_epochs": 5, "target_kl": 1e-5}, {"n_epochs": 5, "target_kl": 1e5}):
        agent = PPO(
            make_policy(), make_env(16), episodes_per_iteration=16, learning_rate=1e-2, device="cpu", **arguments
        )
        agent.learn(total_episodes=16)
        weights.append(agent.policy.model.lm_head.weight.detach().clone())
        steps, stopped = (agent.history[0][key] for key in ("gradient_steps", "stopped_early"))
        assert (steps, stopped) == ((5, 0) if arguments.get("target_kl") == 1e5 else (1, len(arguments) - 1))
    # The first step cannot be too far (its ratios are 1); the second is, and is not taken.
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_target_kl_is_exceeded_at_one_and_a_half_of_it(make_env, make_policy):
    agent = PPO(make_policy(), make_env(16), episodes_per_iteration=16, n_epochs=1, learning_rate=1e-2, device="cpu")
    rollout = agent.play()
    rollout.log_probs -= 0.3  # every ratio is exp(0.3)
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    distance = math.exp(0.3) - 1 - 0.3
    for share, steps in ((0.99, 0), (1.01, 1)):
        agent.target_kl = share * distance / 1.5
        losses = agent.update(rollout, credit)
        assert (losses["gradient_steps"], losses["stopped_early"]) == (steps, 1 - steps)
        weights = (agent.policy.model.lm_head.weight, agent.reference.model.lm_head.weight)
        assert torch.equal(*weights) == (steps == 0)
    assert losses["approx_kl"] == pytest.approx(distance, abs=1e-4)


def test_the_kl_coefficient_follows_its_target(make_env, make_policy):
    agent = PPO(
        make_policy(),
        make_env(16),
        episodes_per_iteration=16,
        learning_rate=3e-3,
        kl_coef=0.02,
        kl_target=0.1,
        device="cpu",
    )
    agent.learn(total_episodes=16 * 8)
    kls, coefs = ([record[key] for record in agent.history] for key in ("kl", "kl_coef"))
    assert coefs[0] == 0.02
    for kl, before, after in zip(kls, coefs, [*coefs[1:], agent.kl_coef], strict=True):
        assert after == pytest.approx(before * (1 + 0.1 * min(max((kl - 0.1) / 0.1, -0.2), 0.2)))
        assert (after > before) == (kl > 0.1)
    assert min(kls) < 0.1 < max(kls), "the test needs both directions"


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_a_separate_critic_leaves_the_policy_alone(critic, make_env, make_policy, tmp_path):
    """With no advantage and no bonus nothing but the value loss pulls."""
    agent = PPO(
        make_policy(), make_env(16), episodes_per_iteration=16, critic=critic, vf_coef=1.0, learning_rate=1e-2,
        device="cpu",
    )  # fmt: skip
    ready(agent)
    before = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    rollout = agent.play()
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    credit.advantages = torch.zeros_like(credit.advantages)
    losses = [agent.update(rollout, credit)["value_loss"] for _ in range(8)]
    assert losses[-1] < losses[0]
    moved = {name for name, value in agent.policy.state_dict().items() if not torch.equal(value, before[name])}
    if critic == "shared":
        assert "model.transformer.h.0.mlp.c_fc.weight" in moved
        return
    assert not moved
    agent.save(tmp_path / "checkpoint")
    loaded = PPO.load(tmp_path / "checkpoint", agent.env, device="cpu")
    first, second = agent.value_function.network, loaded.value_function.network
    assert second is not loaded.policy
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
    assert not torch.equal(second.heads["value"].weight, loaded.policy.heads["value"].weight)
    states = rollout.decisions
    values = [each.value_function.of_states(rollout, states, "policy") for each in (agent, loaded)]
    assert torch.equal(*values)
