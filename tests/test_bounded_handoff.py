"""Hand-offs after which the policy goes on: closed forms on the lock, and everything that follows the authors."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ENV_ID, HORIZON, PROMPT_TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agents import GRPO, PPO, RLOO, TabularPolicy, VinePPO
from agents.advantages import gae
from agents.environments import make_env as make_vec
from agents.rollout import collect
from agents.sb3 import TextVecEnv
from textgym import Guidance
from textgym.guides import Author, CallableGuide, Completion
from textgym.seeding import hash64

LOCK_ID = "textgym/CombinationLock-v0"
POLICY, GUIDE_WROTE = int(Author.POLICY), int(Author.GUIDE)
GUIDE = CallableGuide(
    lambda requests: [
        Completion(
            token_ids=(20 + hash64(r.seed, np.arange(r.max_new_tokens)) % 9).astype(int).tolist(), finished=False
        )
        for r in requests
    ]
)


def lock_agent(algorithm, rows, guidance, accuracy=0.9, **arguments):
    """An agent on a lock of five symbols, with a random policy that knows a little."""
    env = make_vec(LOCK_ID, num_envs=rows, vocab_size=5, length=5, guide_accuracy=accuracy, guidance=guidance)
    policy = TabularPolicy.for_lock(env.lock)
    policy.logits.data = torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(1))
    ((ending, _),) = env.lock.endings
    for state, token in enumerate(ending):
        policy.logits.data[state, token] += 3.0
    defaults = {"episodes_per_iteration": rows, "minibatch_size": rows, "kl_coef": 0.0, "device": "cpu"}
    groups = {"group_size": 4} if algorithm in (GRPO, RLOO) else {}
    return algorithm(policy, env, **{**defaults, **groups, **arguments})


def authors_of(pattern):
    return [POLICY if letter == "p" else GUIDE_WROTE for letter in pattern]


@pytest.mark.parametrize(
    ("guidance", "pattern"),
    [
        (Guidance(handoff_prob=1, handoff_length=1, handoff_tokens=2), "pggpp"),
        (Guidance(handoff_prob=1, handoff_length=0, handoff_tokens=1), "gpppp"),
        (Guidance(handoff_prob=1, handoff_length=2, handoff_tokens=9), "ppggg"),
        (Guidance(handoff_prob=1, handoff_rate=1.0, handoff_tokens=1), "pgpgp"),
        (Guidance(handoff_prob=1, handoff_rate=1.0), "pgggg"),
        (
            Guidance(restart_prob=1, restart_length=1, handoff_prob=1, handoff_length=1, handoff_tokens=1),
            "gpgpp",
        ),
    ],
)
def test_value_and_gradient_are_those_of_the_closed_form(guidance, pattern):
    rows = 8192
    agent = lock_agent(RLOO, rows, guidance)
    rollout = agent.play()
    ((ending, _),) = agent.env.lock.endings
    logits = agent.policy.logits.detach().double().requires_grad_()
    right = logits.log_softmax(-1)[range(5), list(ending)].exp()
    own = torch.tensor([letter == "p" for letter in pattern])
    value = right[own].prod() * 0.9 ** int((~own).sum())
    (exact,) = torch.autograd.grad(value, logits)

    solved = rollout.rewards == 1
    assert rollout.authors[solved].tolist() == [authors_of(pattern)] * int(solved.sum())
    assert stats.binomtest(int(solved.sum()), rows, float(value.detach())).pvalue > 1e-3
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    texts = rollout.input_ids[:, rollout.prompt_columns :]
    states = agent.env.lock.states(texts)[:, :-1]
    scores = torch.nn.functional.one_hot(texts, 5) - logits.detach().softmax(-1)[states]
    scores = scores * credit.advantages[:, :, None] * rollout.decisions[:, :, None]
    gradients = torch.zeros(rows, *logits.shape, dtype=torch.float64)
    gradients.scatter_add_(1, states[:, :, None].expand_as(scores), scores)
    error = gradients.std(0) / rows**0.5
    assert ((gradients.mean(0) - exact).abs() <= 4.5 * error + 1e-6).all()
    assert exact.abs().max() > 0.02


def test_with_a_rate_handoffs_follow_a_geometric_distribution():
    agent = lock_agent(RLOO, 4096, Guidance(handoff_prob=1, handoff_rate=0.3, handoff_tokens=1), group_size=2)
    agent.env.reset(seed=0, options={"guidance": Guidance(handoff_prob=1, handoff_rate=0.3, handoff_tokens=1)})
    first = agent.env._handoff_at
    for tokens in (1, 2, 3, 6):
        expected = (0.3 if tokens < 6 else 1) * 0.7 ** (tokens - 1)  # after five tokens a text is over
        assert stats.binomtest(int((first == tokens).sum()), 4096, expected).pvalue > 1e-3
    rollout = agent.play()
    whole = rollout.authors[(rollout.authors >= 0).all(1)]
    assert ((whole == GUIDE_WROTE).sum(1) > 1).any(), "again and again"
    assert not ((whole[:, 1:] == GUIDE_WROTE) & (whole[:, :-1] == GUIDE_WROTE)).any(), "a token at a time"


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1))
def test_advantages_with_gaps_are_those_without_them(seed, gamma, gae_lambda):
    random = torch.Generator().manual_seed(seed)
    mask = torch.rand(4, 7, generator=random) < 0.6
    rewards, values = torch.randn(2, 4, 7, generator=random, dtype=torch.float64)
    found = gae(rewards, values, mask, gamma, gae_lambda)
    for row in torch.nonzero(mask.any(1)).flatten().tolist():
        own = mask[row]
        compact = gae(*(part[row, own][None] for part in (rewards, values, mask)), gamma, gae_lambda)
        for spread, dense in zip(found, compact, strict=True):
            torch.testing.assert_close(spread[row, own], dense[0])
            assert (spread[row, ~own] == 0).all()


BOUNDED = Guidance(restart_prob=0.5, handoff_tokens=2)


def play(env, policy, rows=slice(None)):
    seeds, resets = hash64(1, np.arange(16))[rows], list(range(1, 17))[rows]
    return collect(env, policy, seeds=seeds, reset_seed=resets, options={"guidance": BOUNDED})


def test_a_policy_that_asks_goes_on_and_its_probabilities_are_those_of_the_sampler(make_env, make_asking):
    policy = make_asking(0.25)
    env = make_env(16, guide=GUIDE, handoff=True, handoff_cost=0.01)
    rollout = play(env, policy)
    assert (rollout.handoffs.sum(1) > 1).any(), "rows ask more than once"
    stretches = [len(list(_runs(row))) for row in rollout.authors.tolist()]
    assert max(stretches) > 3
    for row, column in torch.nonzero(rollout.handoffs).tolist():
        written = rollout.authors[row, column : column + 2]
        assert (written[: HORIZON - column] == GUIDE_WROTE).all(), "two tokens, or as many as there is room for"
        if column + 2 < HORIZON:
            goes_on = rollout.authors[row, column + 2] == POLICY or rollout.handoffs[row, column + 2]
            assert goes_on, "a decision follows"
    now = policy.evaluate_actions(
        rollout.input_ids, rollout.attention_mask, rollout.columns(rollout.decisions), rollout.handoffs
    )
    decisions = rollout.decisions
    torch.testing.assert_close(now.log_probs[decisions], rollout.log_probs[decisions], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(now.values[decisions], rollout.values[decisions], atol=1e-5, rtol=1e-4)
    paid = torch.from_numpy(rollout.reward_parts["handoff_cost"])
    completions = (rollout.guided & ~_before(rollout.prefix_length, HORIZON)).sum(1)
    torch.testing.assert_close(paid.double(), -0.01 * completions.double())


def _runs(authors):
    return [author for at, author in enumerate(authors) if at == 0 or authors[at - 1] != author]


def _before(lengths, horizon):
    return torch.arange(horizon) < lengths[:, None]


def test_an_episode_depends_on_no_other_row(make_env, make_asking):
    policy = make_asking(0.25)
    whole = play(make_env(16, guide=GUIDE, handoff=True), policy)
    for rows in (slice(0, 1), slice(3, 8), slice(8, 16)):
        part = play(make_env(len(range(16)[rows]), guide=GUIDE, handoff=True), policy, rows)
        assert torch.equal(part.input_ids, whole.input_ids[rows])
        assert torch.equal(part.handoffs, whole.handoffs[rows])
        torch.testing.assert_close(part.log_probs, whole.log_probs[rows], atol=1e-5, rtol=1e-4)


def test_each_hand_off_is_another_request(make_env):
    seen = []

    def record(requests):
        seen.extend((r.seed, r.prefix_ids, r.max_new_tokens) for r in requests)
        return GUIDE.complete(requests, None)

    env = gym.make(ENV_ID, guide=record, handoff=True, guidance={"handoff_tokens": 2})
    observation, _ = env.reset(seed=0)
    ask, length = env.action_space.n - 1, int(observation["attention_mask"][PROMPT_TOKENS:].sum())
    assert length == 0
    observation, reward, terminated, _, _ = env.step(ask)
    assert (reward, terminated) == (0.0, False)
    assert int(observation["attention_mask"][PROMPT_TOKENS:].sum()) == 2
    _, _, terminated, _, _ = env.step(21)
    asked = 1
    while not terminated:
        _, _, terminated, _, info = env.step(ask)
        asked += 1
    assert len({seed for seed, _, _ in seen}) == len(seen) == asked
    assert seen[-1][2] == (HORIZON - 3) - 2 * (asked - 2), "no more than there is room for"
    assert info["finish_reason"] == "handoff"
    assert info["authors"].tolist()[:4] == authors_of("ggpg")


@pytest.mark.parametrize(
    ("algorithm", "arguments"), [(PPO, {}), (GRPO, {"group_size": 4}), (VinePPO, {"tokens_per_step": 2})]
)
def test_who_asks_learns(algorithm, arguments, make_env, make_asking):
    env = make_env(8, guide=GUIDE, handoff=True, handoff_cost=0.01, guidance=Guidance(handoff_tokens=2))
    agent = algorithm(make_asking(0.25), env, episodes_per_iteration=16, guide_loss="likelihood", **arguments)
    (record,) = agent.learn(total_episodes=16).history
    rollout = agent.last_rollout
    assert any(len(_runs(row)) > 2 for row in rollout.authors.tolist())
    assert record["handoff_fraction"] < 1
    assert np.isfinite(record["loss"])
    assert record["guide_loss"] > 0


def test_a_guided_stretch_is_imitated_and_the_policy_then_knows_it():
    agent = lock_agent(
        PPO,
        64,
        Guidance(handoff_prob=1, handoff_rate=0.3, handoff_tokens=1),
        accuracy=1.0,
        guide_loss="likelihood",
        learning_rate=0.2,
    )
    agent.policy.logits.data.zero_()
    agent.learn(total_episodes=64 * 30)
    ((ending, _),) = agent.env.lock.endings
    right = agent.policy.logits.detach().softmax(-1)[range(1, 5), list(ending)[1:]]
    assert (right > 0.9).all(), "all but the first symbol, which the policy writes itself"


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"handoff_tokens": 0}, "Guidance.handoff_tokens must be None or an int >= 1, got 0"),
        ({"handoff_rate": 0}, r"Guidance.handoff_rate must be None or a number in \(0, 1\], got 0"),
        ({"handoff_rate": "1"}, "Guidance.handoff_rate must be"),
        ({"handoff_rate": 0.5, "handoff_length": 3}, "handoff_length and Guidance.handoff_rate exclude each other"),
    ],
)
def test_wrong_bounds_are_refused(guidance, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**guidance)


def unsure(threshold, tokens=1):
    return Guidance(handoff_prob=1, handoff_entropy=threshold, handoff_tokens=tokens)


@pytest.mark.parametrize("tokens", [1, 2])
def test_who_is_uncertain_is_helped_as_often_as_the_closed_form_says(tokens):
    rows, threshold = 8192, 1.1
    agent = lock_agent(PPO, rows, unsure(threshold, tokens))
    rollout = agent.play()
    ((ending, _),) = agent.env.lock.endings
    probs = agent.policy.logits.detach().double().softmax(-1)[:5]
    entropy = -(probs * probs.log()).sum(-1)
    asked = (entropy / threshold).clamp(max=1)
    assert asked.min() > 0.1
    assert (asked == 1).any(), "some states must always be the guide's"
    # value[t]: the probability that the rest of the text is right, from the state after t right tokens
    value = torch.ones(5 + tokens, dtype=torch.float64)
    for at in reversed(range(5)):
        helped = 0.9 ** min(tokens, 5 - at) * value[at + tokens]
        value[at] = asked[at] * helped + (1 - asked[at]) * probs[at, ending[at]] * value[at + 1]
    solved = rollout.rewards == 1
    assert stats.binomtest(int(solved.sum()), rows, float(value[0])).pvalue > 1e-3
    first = rollout.authors[:, 0] == GUIDE_WROTE
    assert stats.binomtest(int(first.sum()), rows, float(asked[0])).pvalue > 1e-3

    texts = rollout.input_ids, rollout.attention_mask
    now = agent.policy.evaluate_actions(*texts, rollout.columns(rollout.body))
    assert torch.equal(rollout.decisions, rollout.body), "what the environment decides is no action of the policy"
    for recorded, evaluated in ((rollout.log_probs, now.log_probs), (rollout.entropies, now.entropy)):
        torch.testing.assert_close(recorded, evaluated)
        assert (recorded[~rollout.body] == 0).all()


def test_uncertain_language_models_are_helped_row_by_row(make_env, make_policy):
    policy = make_policy()

    def played(rows):
        env = make_env(len(range(16)[rows]), guide=GUIDE)
        # Guidance of its own for each row: every second one is left alone.
        guidance = [unsure(6.0) if row % 2 else Guidance() for row in range(16)[rows]]
        seeds, resets = hash64(1, np.arange(16))[rows], list(range(1, 17))[rows]
        return collect(env, policy, seeds=seeds, reset_seed=resets, options={"guidance": guidance})

    whole = played(slice(None))
    helped = whole.guided.any(1)
    assert helped[1::2].any()
    assert not helped[::2].any()
    now = policy.evaluate_actions(whole.input_ids, whole.attention_mask, whole.columns(whole.body))
    torch.testing.assert_close(whole.entropies, now.entropy, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.log_probs, now.log_probs, atol=1e-4, rtol=1e-4)
    for rows in (slice(1, 2), slice(3, 8)):
        part = played(rows)
        assert torch.equal(part.input_ids, whole.input_ids[rows])
        torch.testing.assert_close(part.entropies, whole.entropies[rows], atol=1e-5, rtol=1e-4)


def test_a_single_environment_is_told_the_entropy():
    env = gym.make(ENV_ID, guide=GUIDE, guidance=unsure(1.0, tokens=2))
    env.reset(seed=0)
    for wrong in ({}, {"entropy": -1.0}, {"entropy": float("nan")}):
        with pytest.raises(ValueError, match=r"entropies must be numbers of at least 0 of shape \(1,\) in nats"):
            env.unwrapped.step(21, **wrong)
    authors, over, entropies = "", False, (0.0, 5.0)
    while not over:
        _, _, over, _, info = env.unwrapped.step(21, entropy=entropies[len(authors) % 3 == 1])
        authors += "p" if len(authors) % 3 != 1 else "gg"
    assert info["authors"].tolist() == authors_of(authors)[:HORIZON]


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"handoff_entropy": 0}, "Guidance.handoff_entropy must be None or a number above 0, in nats, got 0"),
        ({"handoff_entropy": 1.0, "handoff_rate": 0.5}, "handoff_rate and Guidance.handoff_entropy exclude each other"),
        ({"handoff_entropy": 1.0, "no_body_prob": 0.5}, "no_body_prob must be 0 with a handoff_entropy, got 0.5"),
    ],
)
def test_wrong_entropies_are_refused(guidance, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**guidance)


def test_entropies_that_nobody_needs_are_not_asked_for(make_env, make_asking):
    env = make_env(4, guidance=Guidance(handoff_entropy=1.0))
    assert not env.watches_entropy
    with pytest.raises(ValueError, match=r"Guidance.handoff_entropy and handoff=True exclude each other"):
        make_env(4, guide=GUIDE, handoff=True, guidance=unsure(1.0))
    with pytest.raises(ValueError, match=r"without Guidance.handoff_entropy: Stable-Baselines3 tells no entropies"):
        TextVecEnv(make_env(4, guide=GUIDE, guidance=unsure(1.0), parking=False))
