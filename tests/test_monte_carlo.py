"""Values from further texts: VinePPO and PAV, against the closed forms of the lock."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from test_lock import LOCK_ID, SMALL, fixed_policy, prefixes

from agents import GRPO, PAV, CausalLMPolicy, TabularPolicy, VinePPO
from agents import monte_carlo as module
from agents.evaluation import make_env
from agents.monte_carlo import monte_carlo_values
from benchmarks.comparison.combination_lock import SETTINGS, expected_reward
from textgym.guides import CallableGuide, Completion
from textgym.seeding import hash64
from textgym.tasks.lock import EOS_ID

# Writes letters and others, so that its seed matters to the reward.
GUIDE = CallableGuide(
    lambda requests: [
        Completion(token_ids=(20 + hash64(r.seed, np.arange(r.max_new_tokens)) % 200).astype(int).tolist())
        for r in requests
    ]
)
LOCKS = pytest.mark.parametrize("lock_arguments", [SMALL, SMALL | {"fork": True}], ids=["plain", "fork"])


def make_agent(rows, lock_arguments, policy=None, **arguments):
    env: Any = make_env(LOCK_ID, num_envs=rows, **lock_arguments)
    policy = policy or fixed_policy(env.lock)[0]
    return VinePPO(policy, env, **{"episodes_per_iteration": rows, "kl_coef": 0.0, "device": "cpu", **arguments})


def deviation(value, count):
    """At most this is the standard deviation of a mean of rewards in [0, 1] with this expectation."""
    return np.sqrt(value * (1 - value) / count)


@LOCKS
def test_values_are_those_of_the_closed_form(lock_arguments):
    agent = make_agent(1000, lock_arguments, rollouts_per_state=4000)
    _, probs = fixed_policy(agent.env.lock)
    states = [(sample, prefix) for sample, (_, prefix) in enumerate(prefixes(agent.env.lock))]
    values = monte_carlo_values(agent, states, 4000)[0].tolist()
    for (_, prefix), value in zip(states, values, strict=True):
        exact = agent.env.lock.value(probs, prefix)
        assert value == pytest.approx(exact, abs=4 * deviation(exact, 4000) + 1e-6), prefix
    assert max(values) > 0.3


@LOCKS
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_advantages_are_differences_of_values_up_to_the_reward(lock_arguments, tokens_per_step):
    agent = make_agent(
        200, lock_arguments, rollouts_per_state=500, tokens_per_step=tokens_per_step, normalize_advantage=False
    )
    lock, (_, probs) = agent.env.lock, fixed_policy(agent.env.lock)
    rollout = agent.play()
    rollout.sample_ids[:] = 5  # the samples of a lock are copies of one: so that all states are shared
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    firsts, ends = set(), 0
    for row, text in enumerate(rollout.input_ids[:, rollout.prompt_columns :].tolist()):
        length, reward = int(rollout.policy_tokens[row]), float(rollout.rewards[row])
        total = 0.0
        for start in range(0, length, tokens_per_step):
            end = min(start + tokens_per_step, length)
            advantages = credit.advantages[row, start:end].tolist()
            assert len(set(advantages)) == 1, "the decisions of a step are credited alike"
            before = lock.value(probs, text[:start])
            after = reward if end == length else lock.value(probs, text[:end])
            error = deviation(before, 500) + (0 if end == length else deviation(after, 500))
            assert advantages[0] == pytest.approx(after - before, abs=4.5 * error + 1e-6)
            total += advantages[0]
            ends += end == length and error == 0 and reward in (0, advantages[0])
        firsts.add(round(reward - total, 5))
    assert len(firsts) == 1, "the state that all episodes share is valued once"
    assert ends > 5


@LOCKS
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_pav_adds_the_guides_progress_to_the_advantage_in_the_group(lock_arguments, tokens_per_step):
    env: Any = make_env(LOCK_ID, num_envs=200, **lock_arguments)
    settings = {"episodes_per_iteration": 200, "group_size": 2, "kl_coef": 0.0, "device": "cpu", "progress_coef": 3.0}
    policy = fixed_policy(env.lock)[0]
    agent = PAV(policy, env, rollouts_per_state=500, tokens_per_step=tokens_per_step, **settings)
    rollout = agent.play()
    rollout.sample_ids[:] = 5
    before = env.guide_tokens_written
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    assert env.guide_tokens_written > before
    moved = 0
    for row, text in enumerate(rollout.input_ids[:, rollout.prompt_columns :].tolist()):
        length, reward = int(rollout.policy_tokens[row]), float(rollout.rewards[row])
        alone = reward - float(rollout.rewards[row // 2 * 2 : row // 2 * 2 + 2].mean())
        for start in range(0, length, tokens_per_step):
            end = min(start + tokens_per_step, length)
            value = env.lock.guide_value(text[:start])
            after = reward if end == length else env.lock.guide_value(text[:end])
            error = deviation(value, 500) + (0 if end == length else deviation(after, 500))
            for advantage in credit.advantages[row, start:end].tolist():
                assert advantage == pytest.approx(alone + 3 * (after - value), abs=3 * 4.5 * error + 1e-5)
            moved += abs(after - value) > 0.1
    assert moved > 20


def test_pav_opens_a_lock_that_grpo_does_not():
    for algorithm, arguments, opens in [(PAV, {"progress_coef": 3.0, "tokens_per_step": 1}, True), (GRPO, {}, False)]:
        env: Any = make_env(LOCK_ID, num_envs=64, vocab_size=8, length=6)
        policy = TabularPolicy.for_lock(env.lock)
        settings = {**SETTINGS, "episodes_per_iteration": 64, "minibatch_size": 64, "group_size": 4}
        agent = algorithm(
            policy, env, **{name: value for name, value in settings.items() if name != "gae_lambda"}, **arguments
        )
        agent.learn(total_episodes=64 * 40)
        assert (expected_reward(policy, env.lock) > 0.5) == opens, algorithm


@pytest.mark.parametrize("tokens_per_step", [1, 2])
def test_the_gradient_with_the_penalty_as_a_reward_is_that_of_the_objective(tokens_per_step):
    small = {"vocab_size": 4, "length": 3, "fork": True}
    agent = make_agent(
        4096,
        small,
        policy=TabularPolicy.for_lock(make_env(LOCK_ID, num_envs=1, **small).lock),
        rollouts_per_state=1000,
        tokens_per_step=tokens_per_step,
        normalize_advantage=False,
        kl_penalty="reward",
        kl_coef=0.3,
    )
    lock, logits = agent.env.lock, agent.policy.logits
    random = torch.Generator().manual_seed(0)
    for table in (logits, agent.reference.logits):
        table.data = torch.randn(table.shape, generator=random)

    # The objective as a sum over all texts.
    log_probs, reference = logits.double().log_softmax(-1), agent.reference.logits.double().log_softmax(-1)
    objective = torch.zeros((), dtype=torch.float64)
    for text in product(range(lock.vocab_size), repeat=lock.length):
        end = text.index(EOS_ID) + 1 if EOS_ID in text else lock.length
        if any(text[end:]):  # one text for each that ends early
            continue
        states = lock.states(torch.tensor([text]))[0, :end]
        log_prob = log_probs[states, list(text[:end])].sum()
        worth = dict(lock.endings).get(text, 0.0)
        penalty = log_prob.detach() - reference[states, list(text[:end])].sum()
        objective = objective + log_prob.exp() * (worth - agent.kl_coef * penalty)
    (exact,) = torch.autograd.grad(objective, logits)  # the gradient of l itself is zero in expectation

    rollout = agent.play()
    rollout.sample_ids[:] = 5
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    texts = rollout.input_ids[:, rollout.prompt_columns :]
    states = lock.states(texts)[:, :-1]
    scores = torch.nn.functional.one_hot(texts, lock.vocab_size) - log_probs.detach().exp()[states]
    scores = scores * credit.advantages[:, :, None] * rollout.decisions[:, :, None]
    gradients = torch.zeros(len(texts), *logits.shape, dtype=torch.float64)
    gradients.scatter_add_(1, states[:, :, None].expand_as(scores), scores)
    error = gradients.std(0) / len(texts) ** 0.5
    assert ((gradients.mean(0) - exact).abs() <= 4 * error + 8e-3).all()
    assert exact.abs().max() > 0.05


def test_the_texts_behind_the_values_are_counted_and_not_trained_on(monkeypatch):
    policy = TabularPolicy.for_lock(make_env(LOCK_ID, num_envs=1, **SMALL).lock)
    agent = make_agent(16, SMALL, policy, rollouts_per_state=3, tokens_per_step=2, episodes_per_iteration=32)
    played, replay = [], module.replay
    monkeypatch.setattr(module, "replay", lambda *rest, **more: played.append(replay(*rest, **more)) or played[-1])
    agent.learn(total_episodes=32)
    (record,) = agent.history
    trained = agent.last_rollout
    texts = trained.input_ids[:, trained.prompt_columns :].tolist()
    states = {
        (int(trained.sample_ids[row]), tuple(text[:start]))
        for row, text in enumerate(texts)
        for start in range(0, int(trained.policy_tokens[row]), agent.tokens_per_step)
    }
    assert sum(map(len, played)) == 3 * len(states)
    began = {
        (int(sample), tuple(text[:length].tolist()))
        for part in played
        for sample, text, length in zip(
            part.sample_ids, part.input_ids[:, part.prompt_columns :], part.prefix_length, strict=True
        )
    }
    assert began == states
    assert record["value_tokens"] == sum(int(part.policy_tokens.sum()) for part in played)
    assert record["policy_tokens"] == agent.num_timesteps == record["value_tokens"] + int(trained.policy_tokens.sum())
    assert agent.num_episodes == len(trained) == 32


@pytest.mark.parametrize("handoff", [False, True])
def test_values_depend_on_no_other_row_and_later_episodes_on_no_value(handoff, make_env, make_policy):
    states = [(sample, (270,) * length) for sample in range(3) for length in (0, 2, 5)]
    seen = []
    for rows in (4, 7, 64):
        policy = make_policy()
        if handoff:
            policy = CausalLMPolicy(policy.model, policy.tokenizer, handoff_prob=0.2)
        env = make_env(rows, guide=GUIDE, handoff=handoff)
        agent = VinePPO(policy, env, episodes_per_iteration=rows, rollouts_per_state=5, device="cpu")
        agent.play()
        before, guide_tokens_before = env.get_state(), env.guide_tokens_written
        values, policy_tokens = monte_carlo_values(agent, states, 5)
        guide_tokens = env.guide_tokens_written - guide_tokens_before
        assert (guide_tokens > 0) == handoff
        seen.append((values.tolist(), policy_tokens, guide_tokens))
        for key, value in env.get_state().items():
            assert np.array_equal(value, before[key]), key
    assert seen[0] == seen[1] == seen[2]


def test_a_short_lock_is_opened_without_a_guide():
    env: Any = make_env(LOCK_ID, num_envs=64, guide=None, **SMALL)
    policy = TabularPolicy.for_lock(env.lock)
    settings = {**SETTINGS, "episodes_per_iteration": 64, "minibatch_size": 64}
    agent = VinePPO(policy, env, tokens_per_step=1, **settings)
    assert expected_reward(policy, env.lock) < 0.01
    agent.learn(total_episodes=64 * 25)
    assert expected_reward(policy, env.lock) > 0.9


def test_what_it_cannot_do_is_named(make_env, make_policy):
    for guidance in ({"handoff_prob": 0.5}, [{"handoff_prob": 0.5}, *[{}] * 7]):
        with pytest.raises(ValueError, match="without a guidance that hands off for vine-ppo"):
            VinePPO(make_policy(), make_env(8, guide=GUIDE, guidance=guidance), episodes_per_iteration=8)
    for argument in ("rollouts_per_state", "tokens_per_step", "clip_range"):
        with pytest.raises(ValueError, match=argument):
            VinePPO(make_policy(), make_env(8), **{"episodes_per_iteration": 8, argument: 0})
