"""Algorithms with a guide: who is trained on what, against slow loops over the formulas, and what must never move."""

from __future__ import annotations

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import HORIZON, PROMPT_TOKENS
from scipy import stats

from agents import ALGORITHMS, D2LOLS, LOLS, PPO, RLOO, AggreVaTeD, CausalLMPolicy, PPOPlusPlus, evaluate
from agents.evaluation import make_env as vector_env
from agents.ppo import token_rewards
from agents.rollout import collect
from textgym import Guidance
from textgym.guides import Author, CallableGuide, Completion
from textgym.guides.base import GuideRequest
from textgym.guides.local import LocalGuide
from textgym.seeding import hash64, uniform


def short_writer(requests):
    """Words by the request's seed alone; each ends the text with probability 1/4."""
    completions = []
    for request in requests:
        ids = (262 + hash64(request.seed, np.arange(request.max_new_tokens)) % 30).astype(int)
        stops = np.flatnonzero(uniform(request.seed, np.arange(request.max_new_tokens), 1) < 0.25)
        completions.append(
            Completion(token_ids=ids[: stops[0]].tolist(), finished=True)
            if len(stops)
            else Completion(token_ids=ids.tolist(), finished=False)
        )
    return completions


GUIDE = CallableGuide(short_writer)
# An algorithm, the arguments that make its first iteration of a kind, and whether the guide ends texts in it.
KINDS = {
    "ppo": (PPO, {}, False),
    "ppo++": (PPOPlusPlus, {"beta": 0.6}, False),
    "aggrevated": (AggreVaTeD, {"beta": 0.7}, True),
    "aggrevated without body": (AggreVaTeD, {"beta": 1e-9}, True),
    "lols as ppo++": (LOLS, {"tau": 1.0, "beta": 0.6}, False),
    "lols as aggrevated": (LOLS, {"tau": 0.0, "beta": 0.7}, True),
    "d2lols as aggrevated": (D2LOLS, {"tau": 1, "beta": 0.7}, True),
    "d2lols as ppo++": (D2LOLS, {"tau": 0, "beta": 0.6}, False),
}


def ready(agent, std=0.05):
    """Move the policy away from its reference, with critics that say something, and texts that often end early."""
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in agent.trainable:
            parameter.add_(torch.randn(parameter.shape, generator=random), alpha=std)
        eos = agent.policy.model.lm_head.weight[agent.env.eos_token_id]
        agent.policy.model.transformer.ln_f.bias += 4 * eos / eos.square().sum()
    return agent


# Advantages are compared as they are estimated.
PLAIN = {"normalize_advantage": False, "device": "cpu"}


def make(kind, make_env, make_policy, rows=64, **arguments):
    algorithm, own, _ = KINDS[kind]
    arguments = {**PLAIN, "episodes_per_iteration": rows, "minibatch_size": rows, **own, **arguments}
    return algorithm(make_policy(), make_env(rows, guide=GUIDE), **arguments)


def plain_values(policy, rollout, head):
    """What a head says of the state before each token: one row at a time, float64."""
    policy = copy.deepcopy(policy).double()
    values = np.zeros(rollout.authors.shape)
    with torch.no_grad():
        for row in range(len(rollout)):
            ids = rollout.input_ids[row][rollout.attention_mask[row].bool()][None]
            said = policy.heads[head](policy.model.transformer(ids).last_hidden_state[0]).squeeze(1).numpy()
            written = int((rollout.authors[row] >= 0).sum())
            values[row, :written] = said[ids.shape[1] - written - 1 : -1]
    return values


def trace(rewards, values, gamma, gae_lambda):
    """GAE as a double loop; nothing comes after the last step."""
    values = [*values, 0.0]
    errors = [reward + gamma * values[i + 1] - values[i] for i, reward in enumerate(rewards)]
    return [sum((gamma * gae_lambda) ** (j - i) * errors[j] for j in range(i, len(errors))) for i in range(len(errors))]


@pytest.mark.parametrize(("gamma", "gae_lambda", "kl_penalty"), [(0.9, 0.8, "reward"), (1.0, 0.95, "loss")])
@pytest.mark.parametrize("kind", KINDS)
def test_credit_is_that_of_a_slow_loop(kind, gamma, gae_lambda, kl_penalty, make_env, make_policy):
    arguments = {"kl_coef": 0.4, "gamma": gamma, "gae_lambda": gae_lambda, "kl_penalty": kl_penalty}
    agent = ready(make(kind, make_env, make_policy, **arguments))
    guided = KINDS[kind][2]
    rollout = agent.play()
    reference = agent.reference_log_probs(rollout)
    credit = agent.credit(rollout, reference)
    values = plain_values(agent.policy, rollout, "guide_value" if guided else "value")
    seen = set()
    for row in range(len(rollout)):
        authors = rollout.authors[row].tolist()
        body = [h for h, author in enumerate(authors) if author == Author.POLICY]
        prefix = int(rollout.prefix_length[row])
        completion = [h for h, author in enumerate(authors) if author == Author.GUIDE and h >= prefix]
        assert guided or not completion
        assert not (guided and prefix)
        written = body + completion
        assert written == list(range(prefix, prefix + len(written)))
        penalty = {
            h: -0.4 * (rollout.log_probs[row, h] - reference[row, h]).item() if kl_penalty == "reward" else 0.0
            for h in body
        }
        rewards = [penalty.get(h, 0.0) + (rollout.rewards[row].item() if h == written[-1] else 0.0) for h in written]
        advantages = trace(rewards, values[row, written], gamma, gae_lambda)
        expected, returns = np.zeros(HORIZON), np.zeros(HORIZON)
        states = completion if guided else body
        for h in body:
            at = written.index(h)
            if guided and h != body[-1]:
                expected[h] = rewards[at] + gamma * values[row, h + 1] - values[row, h]
            else:
                expected[h] = advantages[at]
        for h in states:
            returns[h] = advantages[written.index(h)] + values[row, h]
        np.testing.assert_allclose(credit.advantages[row], expected, atol=1e-4)
        np.testing.assert_array_equal(credit.decisions[row].nonzero().flatten(), body)
        np.testing.assert_array_equal(credit.states[row].nonzero().flatten(), states)
        np.testing.assert_allclose(credit.returns[row, states], returns[states], atol=1e-4)
        np.testing.assert_allclose(credit.values[row, states], values[row, states], atol=1e-4)
        seen.add((bool(prefix), bool(body), bool(completion), rollout.finish_reason[row]))
    if kind == "aggrevated without body":
        assert seen == {(False, False, True, "handoff")}
    elif guided:
        # No body; a body and its completion; a policy that ended the text before the hand-off, in either way.
        assert seen >= {(False, False, True, "handoff"), (False, True, True, "handoff"), (False, True, False, "stop")}
    else:
        assert {has_prefix for has_prefix, *_ in seen} == ({False} if kind == "ppo" else {False, True})


@pytest.mark.parametrize("kind", KINDS)
def test_the_objective_is_the_same_whoever_else_writes(kind, make_env, make_policy):
    """Undiscounted, every text earns r - kl_coef sum (log pi - log pi_ref), the sum over the policy's tokens."""
    agent = ready(make(kind, make_env, make_policy, kl_coef=0.4))
    rollout = agent.play()
    reference, body = agent.reference_log_probs(rollout), rollout.body
    written = body | rollout.completion
    rewards = token_rewards(rollout.rewards, rollout.log_ratio(reference), written, 0.4)
    with torch.no_grad():
        arguments = (rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.authors >= 0))
        log_ratio = (
            agent.policy.evaluate_actions(*arguments).log_probs - agent.reference.evaluate_actions(*arguments).log_probs
        )
    assert (log_ratio[written & ~body].abs() > 1e-2).any() or not (written & ~body).any()
    summed = (log_ratio * body).sum(1)
    torch.testing.assert_close(rewards.sum(1), rollout.rewards - 0.4 * summed, rtol=0, atol=1e-4)
    assert (rewards[~written] == 0).all()
    # Whatever the guide wrote carries no penalty: only the last token has a reward.
    counts = (rewards != 0).masked_fill(body, False).sum(1)
    np.testing.assert_array_equal(counts, rollout.completion.any(1) & (rollout.rewards != 0))


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_critic_of_the_iteration_learns(kind, make_env, make_policy):
    agent = ready(make(kind, make_env, make_policy, kl_coef=0.1))
    before = copy.deepcopy(agent.policy.heads)
    agent.learn(total_episodes=64)
    learning, other = ("guide_value", "value") if KINDS[kind][2] else ("value", "guide_value")
    assert agent.policy.heads[other].weight.grad is None or not agent.policy.heads[other].weight.grad.any()
    assert torch.equal(agent.policy.heads[other].weight, before[other].weight)
    assert torch.equal(agent.policy.heads[other].bias, before[other].bias)
    assert not torch.equal(agent.policy.heads[learning].weight, before[learning].weight)


@pytest.mark.parametrize("kind", ["ppo++", "aggrevated"])
def test_a_critic_starts_at_the_mean_return(kind, make_env, make_policy):
    """Penalty and discount included, over the states that it learns; it is moved once, and ranks states as before."""
    agent = ready(make(kind, make_env, make_policy, kl_coef=0.4, gamma=0.9))
    head = "guide_value" if KINDS[kind][2] else "value"
    rollout = agent.play()
    before = plain_values(agent.policy, rollout, head)
    reference = agent.reference_log_probs(rollout)
    credit = agent.credit(rollout, reference)
    written = rollout.body | rollout.completion
    rewards = token_rewards(rollout.rewards, rollout.log_ratio(reference), written, 0.4)
    returns = np.zeros(before.shape)
    for row, last in enumerate((rollout.authors >= 0).sum(1).tolist()):
        for h in reversed(range(last)):
            returns[row, h] = float(rewards[row, h]) + 0.9 * (returns[row, h + 1] if h + 1 < last else 0.0)
    learned = credit.states.numpy()
    shift = (returns - before)[learned].mean()
    assert abs(shift) > 0.1
    np.testing.assert_allclose(credit.values.numpy()[learned], (before + shift)[learned], atol=1e-4)
    agent.credit(rollout, reference)
    now = plain_values(agent.policy, rollout, head)
    np.testing.assert_allclose(now[learned], (before + shift)[learned], atol=1e-4, err_msg="moved twice")


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_second_critic_starts_as_a_copy_of_the_first(critic, make_env, make_policy, tmp_path):
    """The network's features serve the critic that has learned; values recorded by a head that has not are not used."""
    arguments = {"episodes_per_iteration": 64, "minibatch_size": 64, "critic": critic, **PLAIN}
    agent = ready(D2LOLS(make_policy(), make_env(64, guide=GUIDE), tau=1, beta=0.7, kl_coef=0.4, **arguments))
    agent.learn(total_episodes=64)
    assert agent.value_function.started == ["guide"]
    assert agent.phase.continuation == "policy"
    agent.save(tmp_path / "checkpoint")
    agent = D2LOLS.load(tmp_path / "checkpoint", agent.env, device="cpu")
    rollout = agent.play()
    network = agent.value_function.network
    before = plain_values(network, rollout, "guide_value")
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    assert agent.value_function.started == ["guide", "policy"]
    states = credit.states.numpy()
    moved = credit.values.numpy()[states] - before[states]
    np.testing.assert_allclose(moved, moved.mean(), atol=1e-4)
    assert torch.equal(network.heads["value"].weight, network.heads["guide_value"].weight)
    np.testing.assert_allclose(plain_values(network, rollout, "value")[states], credit.values[states], atol=1e-4)
    agent.save(tmp_path / "checkpoint")
    loaded = D2LOLS.load(tmp_path / "checkpoint", agent.env, device="cpu")
    assert loaded.value_function.started == ["guide", "policy"]


def test_rows_without_body_move_no_policy_gradient(make_env, make_policy):
    """With a critic of its own and no body anywhere, there is nothing to train the policy on."""
    agent = make("aggrevated without body", make_env, make_policy, critic="separate")
    agent.learn(total_episodes=128)
    for name, value in agent.reference.state_dict().items():
        assert torch.equal(agent.policy.state_dict()[name], value), name
    assert agent.value_function.network.heads["guide_value"].weight.any()
    assert agent.num_timesteps == 0 < agent.num_guide_tokens
    assert agent.history[-1]["guide_tokens"] == agent.num_guide_tokens - agent.history[0]["num_guide_tokens"]


def test_lols_tosses_a_coin_and_d2lols_switches_once(make_env, make_policy):
    for tau in (0.0, 0.3, 0.8, 1.0):
        agent = LOLS(make_policy(), make_env(8, guide=GUIDE), tau=tau, beta=0.7, episodes_per_iteration=8, seed=3)
        tosses = []
        for agent.iteration in range(600):
            tosses.append(agent.phase.continuation == "policy")
            restarts, ends = Guidance(restart_prob=0.7), Guidance(handoff_prob=1.0, no_body_prob=1 - 0.7)
            assert agent.phase.guidance == (restarts if tosses[-1] else ends)
        assert stats.binomtest(sum(tosses), 600, tau).pvalue > 1e-3
        runs = 1 + sum(a != b for a, b in pairwise(tosses))
        assert runs > 100 or tau in (0.0, 1.0), "tosses are independent"
    agent = D2LOLS(make_policy(), make_env(8, guide=GUIDE), tau=3, episodes_per_iteration=8)
    assert agent.beta == 0.8
    agent.learn(total_episodes=8 * 5)
    ended = [record["handoff_fraction"] > 0 for record in agent.history]
    assert ended == [True, True, True, False, False]


@pytest.mark.parametrize("name", ["ppo", "ppo++", "dr-po", "lols", "d2lols", "rloo", "grpo"])
def test_restarts_are_cut_as_published(name, make_env, make_policy):
    """With probability beta t tokens, t uniform on {0..L-1}; here every text to start from has L = 3 tokens."""
    three = CallableGuide(lambda requests: [Completion(token_ids=[270, 271], finished=True) for _ in requests])
    env = make_env(2000, guide="references" if name == "dr-po" else three)
    arguments = {} if name == "ppo" else {"beta": 0.7}
    arguments |= {"lols": {"tau": 1.0}, "d2lols": {"tau": 0}}.get(name, {})
    agent = ALGORITHMS[name](make_policy(), env, episodes_per_iteration=2000, device="cpu", **arguments)
    options = {"guidance": agent.phase.guidance or Guidance(), "prompt": "red", "references": ["green blue"]}
    _, infos = env.reset(seed=1, options=options)
    counts, beta = np.bincount(infos["prefix_length"], minlength=HORIZON), arguments.get("beta", 0.0)
    assert counts[3:].sum() == 0
    expected = np.array([1 - beta + beta / 3, beta / 3, beta / 3])
    assert name == "ppo" or stats.chisquare(counts[:3], 2000 * expected).pvalue > 1e-3
    assert name != "ppo" or counts[0] == 2000
    assert not infos["parked"].any()


def test_hand_offs_are_scheduled_as_published(make_env, make_policy):
    """With probability beta t policy tokens, t uniform on {1..T}; else none."""
    rows = 2000
    env = make_env(rows, guide=GUIDE)
    agent = AggreVaTeD(make_policy(), env, beta=0.7, episodes_per_iteration=rows, device="cpu")
    env.reset(seed=1, options={"guidance": agent.phase.guidance})
    for _ in range(HORIZON):
        *_, infos = env.step(np.full(rows, 270))
    counts = np.bincount(infos["policy_tokens"], minlength=HORIZON + 1)
    assert stats.chisquare(counts, rows * np.array([0.3] + [0.7 / HORIZON] * HORIZON)).pvalue > 1e-3


GUIDED = {
    "ppo++": {"beta": 1.0},
    "aggrevated": {"beta": 0.8},
    "lols": {"tau": 0.5, "seed": 1},
    "d2lols": {"tau": 1},
    "dr-po": {"beta": 1.0},
    "rloo": {"beta": 1.0},
    "grpo": {"beta": 1.0},
}


def same_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("source", ["object", "folder"])
@pytest.mark.parametrize("name", GUIDED)
def test_guide_and_reference_stay_where_the_policy_started(name, source, make_env, make_policy, tmp_path):
    """The original code changed its guide along with the policy, or started them from other weights."""
    policy = make_policy()
    if source == "folder":
        policy.save_pretrained(tmp_path / "start")
        policy = CausalLMPolicy.from_pretrained(tmp_path / "start", device="cpu")
    model = policy.model if source == "object" else tmp_path / "start"
    guide = LocalGuide(model, tokenizer=policy.tokenizer, device="cpu")
    request = GuideRequest("red sun", tuple(policy.tokenizer("red sun")["input_ids"]), "", (), 6, 7)
    text, start = guide.complete([request], policy.tokenizer)[0].token_ids, copy.deepcopy(policy)
    env = make_env(16, guide="references" if name == "dr-po" else guide)
    agent = ALGORITHMS[name](
        policy, env, episodes_per_iteration=16, learning_rate=1e-2, kl_coef=0.05, device="cpu", **GUIDED[name]
    )
    assert same_weights(guide._model, start.model)
    assert same_weights(agent.reference, start)
    assert agent.policy is policy
    rollouts = []
    agent.learn(total_episodes=48, callback=lambda scope, _: rollouts.append(scope["self"].last_rollout))
    assert not same_weights(policy.model, start.model)
    assert same_weights(guide._model, start.model)
    assert same_weights(agent.reference, start)
    assert guide.complete([request], policy.tokenizer)[0].token_ids == text
    # The reference that the penalty is counted from is the start: nothing is off at first, and later its own words are.
    assert agent.history[0]["kl"] == pytest.approx(0, abs=1e-4)
    with torch.no_grad():
        rollout = rollouts[-1]
        judged = start.evaluate_actions(rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.body))
    torch.testing.assert_close(agent.reference_log_probs(rollout), judged.log_probs, rtol=0, atol=1e-5)
    assert agent.history[-1]["kl"] != pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("guidance", [Guidance(0.6), Guidance(0, None, 1.0, None, 0.3), Guidance(0.5, None, 0.5)])
def test_no_episode_shows_padding_between_its_tokens(guidance, make_env, make_policy):
    env = make_env(64, guide=GUIDE)
    rollout = collect(env, make_policy(), seeds=hash64(2, np.arange(64)), options={"guidance": guidance})
    written = rollout.authors >= 0
    assert (written.int().diff(dim=1) <= 0).all()
    assert torch.equal(rollout.attention_mask[:, PROMPT_TOKENS:].bool(), written)
    assert torch.equal(
        rollout.body | rollout.completion, written & (torch.arange(HORIZON) >= rollout.prefix_length[:, None])
    )
    assert torch.equal(rollout.body.sum(1), rollout.policy_tokens)
    assert torch.equal((rollout.authors == Author.GUIDE).sum(1), rollout.guide_tokens)
    before = (torch.arange(HORIZON) < rollout.prefix_length[:, None]) & (rollout.authors == Author.GUIDE)
    assert torch.equal(before.sum(1), rollout.prefix_length)


def test_the_guidance_that_an_environment_was_made_with_is_kept(make_env, make_policy):
    made = Guidance(restart_prob=1.0, restart_length=1)
    for algorithm in (PPO, RLOO):
        agent = algorithm(make_policy(), make_env(8, guide=GUIDE, guidance=made), episodes_per_iteration=8)
        assert (agent.play().prefix_length > 0).any()
        assert (evaluate(agent, agent.env, num_prompts=8).guide_tokens, agent.env.guidance) == (0, Guidance())
        assert (agent.play().prefix_length > 0).any()
    agent = AggreVaTeD(make_policy(), make_env(8, guide=GUIDE, guidance=made), episodes_per_iteration=8)
    assert (agent.play().prefix_length == 0).all(), "who writes is its own to say"


def test_what_nobody_should_imitate_is_no_place_to_start_from():
    env = vector_env("textgym/IMDB-v0", num_envs=64, guide="references", guidance={"restart_prob": 1.0})
    _, infos = env.reset(seed=0)
    positive = np.array([env.data.rows[sample]["label"] == 1 for sample in infos["sample_id"].tolist()])
    assert 10 < positive.sum() < 54
    assert (infos["prefix_length"][~positive] == 0).all()
    assert (infos["prefix_length"][positive] > 0).mean() > 0.8
