"""Losses on the guide's tokens, mixed groups and their baselines, against closed forms on the combination lock."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agents import ALGORITHMS, GRPO, HPT, LUFFY, MENTOR, PPO, RLOO, UFT, PPOPlusPlus, PrefixRFT, ReLIFT, TabularPolicy
from agents.curriculum import Mixed, Stages
from agents.environments import make_env
from agents.guide_loss import Clipped, GuideLoss, Likelihood, Shaped, Uncertain
from agents.policy import Evaluation
from agents.policy_gradient import Credit
from textgym.guides import Author
from textgym.tasks.lock import EOS_ID

LOCK = {"vocab_size": 6, "length": 4, "guide_accuracy": 1.0}
LOSSES = [Likelihood(), Uncertain(), Shaped(gamma=0.3), Clipped(share=0.5, clip_range=0.1)]


def lock_agent(algorithm, rows=32, env=None, **arguments):
    """An agent whose policy is random, on a lock whose guide knows the way."""
    made = make_env("textgym/CombinationLock-v0", num_envs=rows, **{**LOCK, **(env or {})})
    policy = TabularPolicy.for_lock(made.lock)
    policy.logits.data = torch.randn(policy.logits.shape, generator=torch.Generator().manual_seed(3))
    defaults = {"episodes_per_iteration": rows, "minibatch_size": rows, "kl_coef": 0.0, "learning_rate": 0.5}
    return algorithm(policy, made, **{**defaults, "device": "cpu", **arguments})


@st.composite
def minibatches(draw, horizon=6):
    """A seed; of each text where the guide's prefix and the policy's part end; which texts are the part at hand."""
    ends = draw(st.lists(st.tuples(st.integers(0, horizon - 1), st.integers(1, horizon)), min_size=1, max_size=6))
    part = draw(st.lists(st.booleans(), min_size=len(ends), max_size=len(ends)))
    return draw(st.integers(0, 2**31)), [(a, min(a + n, horizon)) for a, n in ends], torch.tensor(part)


@settings(deadline=None, max_examples=100)
@given(minibatches(), st.sampled_from(LOSSES), st.sampled_from(["text", "batch", "horizon"]), st.floats(0, 2))
def test_losses_and_gradients_are_those_of_the_formulas(batch, kind, length_norm, coef):
    seed, ends, part = batch
    random, shape = np.random.default_rng(seed), (len(ends), 6)
    guided, decisions = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, (prefix, end) in enumerate(ends):
        guided[row, :prefix], decisions[row, prefix:end] = True, True
    now, before = (np.where(guided | decisions, -random.exponential(size=shape), np.nan) for _ in range(2))
    advantages = np.repeat(random.normal(size=(len(ends), 1)), 6, 1)
    agent = object.__new__(GRPO)
    kind = replace(kind, coef=coef)
    vars(agent).update(env=SimpleNamespace(max_new_tokens=6), length_norm=length_norm, imitation=kind)
    whole = Credit(*map(torch.from_numpy, (decisions, before, before, advantages, decisions & False, now, now, guided)))
    log_probs = torch.from_numpy(now.copy())[part].requires_grad_()
    evaluation = Evaluation(log_probs, torch.zeros_like(log_probs), torch.zeros_like(log_probs))
    zero = {"loss": torch.zeros((), dtype=torch.float64)}
    terms = agent.with_guide_loss(zero, evaluation, whole[part], whole, kind)
    expected, gradients = 0.0, np.zeros(shape)
    for row, column in zip(*np.nonzero(guided & part.numpy()[:, None]), strict=True):
        p, advantage, ratio = (
            np.exp(now[row, column]),
            advantages[row, 0],
            np.exp(now[row, column] - before[row, column]),
        )
        weight = {
            "text": 1 / len(ends) / (guided | decisions)[row].sum(),
            "batch": 1 / (guided | decisions).sum(),
            "horizon": 1 / len(ends) / 6,
        }[length_norm]
        if not kind.credited:
            weight = 1 / guided.sum()
        if isinstance(kind, Likelihood):
            value, slope = -np.log(p), -1.0
        elif isinstance(kind, Uncertain):
            value, slope = -p * (1 - p) * np.log(p), -p * (1 - p)
        elif isinstance(kind, Shaped):
            value, slope = -advantage * p / (p + 0.3), -advantage * 0.3 * p / (p + 0.3) ** 2
        else:
            bounded = min(max(ratio, 0.9), 1.1)
            value, slope = -min(ratio * advantage, bounded * advantage), 0.0
            if ratio * advantage <= bounded * advantage:
                slope = -ratio * advantage
        expected += weight * value
        gradients[row, column] = weight * slope
    assert float(terms["guide_loss"].detach()) == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert float(terms["loss"].detach()) == pytest.approx(coef * expected, rel=1e-6, abs=1e-9)
    if part.any():
        terms["loss"].backward()
        np.testing.assert_allclose(log_probs.grad, coef * gradients[part.numpy()], atol=1e-9)


@pytest.mark.parametrize("kind", LOSSES, ids=lambda kind: kind.name)
def test_on_the_lock_the_gradient_is_that_of_the_objective(kind):
    agent = lock_agent(
        GRPO, group_size=4, curriculum=Mixed(guided=0.5), guide_loss=kind, scale="none", length_norm="batch"
    )
    rollout = agent.play()
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    agent.credit_guide(rollout, credit, agent.imitation)
    own = torch.where(credit.decisions, 0.0, torch.randn(credit.advantages.shape[0], 1).expand(credit.decisions.shape))
    credit.advantages = own  # so that the guide's tokens alone have a gradient, with any advantage
    agent.backward(rollout, credit, torch.arange(len(rollout)), {})

    ((ending, _),) = agent.env.lock.endings
    logits = agent.policy.logits.detach().double().requires_grad_()
    log_probs = logits.log_softmax(-1)
    # The guide's part of every second pair of texts: the ending, without its last symbol, from states 0, 1, 2.
    guided = torch.tensor([row for row in range(len(rollout)) if row % 4 < 2])
    scores = log_probs[[0, 1, 2], list(ending[:3])]
    entropy = -(log_probs.exp() * log_probs).sum(-1)[:3]
    advantages, tokens = own[guided, 0].double(), torch.ones(3, dtype=torch.bool)
    if kind.name == "likelihood":
        objective = -scores.mean()
    elif kind.name == "uncertain":
        objective = -(scores.exp() * (1 - scores.exp())).detach().mul(scores).mean()
    elif kind.name == "shaped":
        objective = -(advantages[:, None] * (scores.exp() / (scores.exp() + 0.3))).sum()
    else:  # before the first step the ratio is 1: the gradient of the likelihood, at two of three tokens
        tokens = entropy >= entropy.sort().values[1]
        objective = -(advantages[:, None] * scores[tokens]).sum()
    if kind.credited:
        objective = objective / (credit.decisions.sum() + len(guided) * tokens.sum())
    assert torch.equal(credit.guided[guided, :3], tokens.expand(len(guided), 3))
    assert credit.guided.sum() == len(guided) * tokens.sum()
    (exact,) = torch.autograd.grad(objective, logits)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(agent.policy.logits.grad.double(), exact, atol=1e-6, rtol=1e-4)


def every_group(policy, lock, prefixes):
    """All groups of texts from given prefixes: returns (n, k), probabilities (n,), scores (n, k, ...) of the logits."""
    log_probs = policy.logits.detach().double().log_softmax(-1)
    worth, choices = dict(lock.endings), []
    for prefix in prefixes:
        texts = []
        for rest in product(range(lock.vocab_size), repeat=lock.length - len(prefix)):
            end = rest.index(EOS_ID) + 1 if EOS_ID in rest else len(rest)
            if any(rest[end:]):
                continue
            text = (*prefix, *rest)
            states = lock.states(torch.tensor([text]))[0, len(prefix) : len(prefix) + end]
            score = torch.zeros_like(log_probs)
            score.index_put_((states, torch.tensor(rest[:end])), torch.ones(end, dtype=score.dtype), accumulate=True)
            score.index_put_((states,), -log_probs[states].exp(), accumulate=True)
            texts.append((worth.get(text, 0.0), float(log_probs[states, list(rest[:end])].sum().exp()), score))
        choices.append(texts)
    groups = list(product(*choices))
    rewards = torch.tensor([[text[0] for text in group] for group in groups], dtype=torch.float64)
    probabilities = torch.tensor([np.prod([text[1] for text in group]) for group in groups])
    return rewards, probabilities, torch.stack([torch.stack([text[2] for text in group]) for group in groups])


@pytest.mark.parametrize("algorithm", [RLOO, GRPO])
def test_the_bias_of_each_baseline_in_a_mixed_group(algorithm):
    """Exact expectations over all groups of two texts with a prefix and two without."""
    agent = lock_agent(algorithm, rows=4, group_size=4, env={"vocab_size": 3, "length": 2})
    lock = agent.env.lock
    ((ending, _),) = lock.endings
    prefixes = [ending[:1], ending[:1], (), ()]
    rewards, probabilities, scores = every_group(agent.policy, lock, prefixes)
    assert float(probabilities.sum()) == pytest.approx(1)
    starts = torch.tensor([[1, 1, 0, 0]]).expand(len(rewards), 4).flatten()
    rollout = SimpleNamespace(prefix_length=starts, guided=starts[:, None] > 0)
    exact = torch.einsum("n,nk,nk...->k...", probabilities, rewards, scores)  # of each text's expected reward
    assert exact.abs().amax((1, 2)).min() > 0.01
    # GRPO's mean contains the text's own return, which shortens its gradient; over fewer texts it does so more.
    factors = {
        (RLOO, "group"): [1, 1, 1, 1],
        (RLOO, "start"): [1, 1, 1, 1],
        (GRPO, "group"): [3 / 4] * 4,
        (GRPO, "start"): [1 / 2] * 4,
        (RLOO, "unguided"): [None, None, 1, 1],
        (GRPO, "unguided"): [None, None, 1 / 2, 1 / 2],
    }
    for baseline in ("group", "start", "unguided"):
        agent.baseline = baseline
        advantages = agent.relative(rollout, rewards, leave_one_out=algorithm is RLOO)
        expected = torch.einsum("n,nk,nk...->k...", probabilities, advantages, scores)
        for text, factor in enumerate(factors[algorithm, baseline]):
            if factor is not None:
                torch.testing.assert_close(expected[text], factor * exact[text])
        if baseline == "unguided":  # guided texts have no negative advantage; where it is positive, it is r - mean
            reference = rewards[:, 2:].mean(1, keepdim=True)
            torch.testing.assert_close(advantages[:, :2], (rewards[:, :2] - reference).clamp(min=0))
            assert not torch.allclose(expected[0], exact[0])


def test_a_text_with_nobody_to_compare_with_has_no_advantage():
    agent = lock_agent(RLOO, rows=4, group_size=4, baseline="start")
    starts = torch.tensor([3, 0, 0, 0])
    rollout = SimpleNamespace(prefix_length=starts, guided=starts[:, None] > 0)
    returns = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    advantages = agent.relative(rollout, returns, leave_one_out=True)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, -0.5, 1.0, -0.5]]))


def test_mixed_groups_have_the_guides_text_and_own_texts():
    agent = lock_agent(LUFFY, rows=32)
    rollout = agent.play()
    ((ending, _),) = agent.env.lock.endings
    first = torch.arange(32) % 8 == 0
    assert torch.equal(rollout.prefix_length > 0, first)
    assert (rollout.prefix_length[first] == 3).all(), "the last token is the policy's"
    assert rollout.input_ids[first][:, rollout.prompt_columns :][:, :3].tolist() == [list(ending[:3])] * 4
    assert (rollout.sample_ids.reshape(4, 8) == rollout.sample_ids.reshape(4, 8)[:, :1]).all()
    record = agent.learn(total_episodes=32).history[0]
    assert {"guide_loss", "guide_probability", "reward_without_prefix"} <= set(record)
    shorter = lock_agent(PrefixRFT, rows=32, curriculum={"name": "mixed", "high": 0.95, "low": 0.05, "iterations": 2})
    assert shorter.play().prefix_length.max() == 3
    shorter.iteration = 2
    assert shorter.play().prefix_length.max() == 0, "5% of four tokens"


def test_failed_groups_imitate_and_others_do_not():
    agent = lock_agent(HPT, rows=32, group_size=4, env={"vocab_size": 4, "length": 2}, scale="none")
    agent.policy.logits.data.zero_()
    rollout = agent.play()
    guided = rollout.prefix_length > 0
    assert 0 < agent.failed.sum() < 8
    assert torch.equal(guided, (torch.arange(32) % 4 == 0) & agent.failed.repeat_interleave(4))
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    agent.credit_guide(rollout, credit, agent.imitation)
    assert torch.equal(credit.guided.any(1), guided)
    assert (credit.advantages[agent.failed.repeat_interleave(4)] == 0).all()
    assert (credit.advantages[~agent.failed.repeat_interleave(4)] != 0).any()
    assert agent.play_record["imitated_groups"] == float(agent.failed.float().mean())
    assert agent.num_episodes == 32 + int(agent.failed.sum())


@pytest.mark.parametrize("algorithm", [UFT, LUFFY, PrefixRFT, HPT, ReLIFT, MENTOR])
def test_guide_tokens_open_a_lock_that_grpo_does_not(algorithm):
    def opened(algorithm, **arguments):
        agent = lock_agent(algorithm, rows=64, group_size=8, env={"vocab_size": 12, "length": 6}, **arguments)
        last = agent.learn(total_episodes=64 * 60).history[-1]
        return last.get("reward_alone", last.get("reward_without_prefix", last["reward"]))

    assert opened(GRPO) < 0.05
    settings = {UFT: {"curriculum": {"name": "cosine", "iterations": 40}}, ReLIFT: {"buffer_size": 8}}
    assert opened(algorithm, **settings.get(algorithm, {})) > 0.8


def test_dead_groups_that_imitate_are_not_dropped():
    agents = {}
    for kind in ("likelihood", "shaped"):
        agent = lock_agent(GRPO, group_size=4, curriculum=Mixed(guided=0.25), guide_loss=kind, drop_dead=True)
        rollout = agent.play()
        rollout.rewards[:] = 0
        credit = agent.credit(rollout, agent.reference_log_probs(rollout))
        agent.credit_guide(rollout, credit, agent.imitation)
        agents[kind] = len(agent.learned_rows(rollout, credit))
    assert agents == {"likelihood": 32, "shaped": 0}


def test_the_token_at_a_hand_off_is_the_policys_decision(make_env, make_policy):
    from test_algorithms import GUIDE

    policy = make_policy()
    policy = type(policy)(policy.model, policy.tokenizer, handoff_prob=0.3)
    agent = PPO(policy, make_env(8, guide=GUIDE, handoff=True), episodes_per_iteration=16, guide_loss="likelihood")
    rollout = agent.play()
    tokens = agent.guide_tokens(rollout)
    assert rollout.handoffs.any()
    assert not (tokens & rollout.handoffs).any()
    assert torch.equal(tokens | rollout.handoffs, rollout.guided | rollout.handoffs)
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    agent.credit_guide(rollout, credit, agent.imitation)
    everywhere = agent.policy.evaluate_actions(
        rollout.input_ids,
        rollout.attention_mask,
        rollout.columns(rollout.authors != int(Author.NONE)),
        rollout.handoffs,
    )
    now = agent.evaluate_actions(rollout, credit, torch.arange(16))
    torch.testing.assert_close(now.log_probs[tokens], everywhere.log_probs[tokens])
    assert agent.learn(total_episodes=16).history[0]["guide_loss"] > 0


@pytest.mark.parametrize(
    ("algorithm", "arguments", "message"),
    [
        (GRPO, {"guide_loss": "likelihod"}, r"guide_loss must be one of \['likelihood', .* got 'likelihod'"),
        (GRPO, {"guide_loss": {"name": "shaped", "gama": 1}}, "Shaped has no argument 'gama'; did you mean gamma"),
        (GRPO, {"guide_loss": {"name": "shaped", "gamma": 0}}, "guide_loss gamma must be a number above 0, got 0"),
        (GRPO, {"guide_loss": {"name": "clipped", "share": "all"}}, r"guide_loss share must be a number in \(0, 1\]"),
        (GRPO, {"guide_loss": {"name": "likelihood", "coef": -1}}, "guide_loss coef must be a number of at least 0"),
        (PPOPlusPlus, {"guide_loss": "shaped"}, "guide_loss 'shaped' needs an algorithm with groups, .* got ppo"),
        (GRPO, {"guide_loss": "likelihood", "env": {"guide": None}}, "guide that can start texts for guide_loss"),
        (GRPO, {"baseline": "prefix"}, "baseline must be one of"),
        (HPT, {"gate": 1.0}, r"gate must be in \[0, 1\)"),
        (HPT, {"dead_groups": "rescue"}, 'dead_groups must be "keep" for hpt'),
        (GRPO, {"curriculum": {"name": "mixed", "guided": 2}}, "guided must be"),
    ],
)
def test_wrong_guide_losses_are_refused(algorithm, arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        lock_agent(algorithm, **arguments)


def test_one_loss_serves_several_algorithms():
    kind = Shaped(gamma=0.2)
    assert GuideLoss.of(kind) == kind == GuideLoss.of({"name": "shaped", "gamma": 0.2})
    assert {"uft", "luffy", "prefix-rft", "hpt", "relift", "mentor"} <= set(ALGORITHMS)
    assert lock_agent(RLOO, group_size=4, curriculum=Stages((0.5,)), guide_loss=kind).learn(total_episodes=32).history
