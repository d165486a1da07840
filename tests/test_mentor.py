"""MENTOR: who is helped, what its texts are credited with, and when the guide retires."""

import numpy as np
import pytest
import torch
from test_guide_loss import lock_agent

from agents import MENTOR
from agents.mentor import FIRST_THRESHOLD, SMALLEST_THRESHOLD

OPEN = {"vocab_size": 4, "length": 3, "guide_accuracy": 0.9}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_of_the_formula(scale):
    agent = lock_agent(MENTOR, rows=64, env=OPEN, scale=scale, guided_texts=3, iterations=10)
    agent.threshold, agent.iteration = 2.0, 4
    rollout = agent.play()
    rewards, wrote = (part.view(8, 8).numpy() for part in (rollout.rewards, rollout.guided.any(1)))
    guided = np.broadcast_to(np.arange(8) < 3, (8, 8))
    assert wrote[:, :3].any()
    assert not wrote[:, 3:].any()
    alone = [row[~helped] for row, helped in zip(rewards, guided, strict=True)]
    means = np.array([part.mean() for part in alone])
    together = np.concatenate([part - part.mean() for part in alone])
    expected = np.zeros((8, 8))
    for group, member in np.ndindex(8, 8):
        difference = rewards[group, member] - means[group]
        if guided[group, member]:
            expected[group, member] = 0.5 * (1 + np.cos(np.pi * 0.4)) * max(0, difference)
        else:
            deviation = {"group": alone[group].std(ddof=1), "batch": together.std(ddof=1), "none": 1 - 1e-4}[scale]
            expected[group, member] = difference / (deviation + 1e-4)
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    for row in range(64):
        np.testing.assert_allclose(credit.advantages[row], expected.flat[row], rtol=1e-4, atol=1e-6)
    assert (expected[guided] > 0).any()
    assert (expected[~guided] != 0).any()


def test_the_threshold_is_a_quantile_of_the_policys_entropies():
    agent = lock_agent(MENTOR, rows=32, env=OPEN, quantile=0.5)
    (first,) = agent.learn(total_episodes=32).history
    assert first["entropy_threshold"] == FIRST_THRESHOLD
    rollout = agent.last_rollout
    own = rollout.entropies.view(4, 8, -1)[:, 4:][rollout.body.view(4, 8, -1)[:, 4:]]
    assert agent.threshold == float(np.quantile(own.numpy(), 0.5))
    assert 0 < agent.threshold < np.log(4)
    second = agent.learn(total_episodes=32).history[1]
    assert second["entropy_threshold"] == float(np.quantile(own.numpy(), 0.5))
    rollout = agent.last_rollout
    assert rollout.guided.view(4, 8, -1)[:, :4].any(2).float().mean() > 0.8, "half of the states are the guide's"
    assert second["reward_alone"] == float(rollout.rewards.view(4, 8)[:, 4:].mean())


def test_the_guide_retires_and_certainty_needs_none():
    agent = lock_agent(MENTOR, rows=32, env=OPEN, iterations=3)
    history = agent.learn(total_episodes=32 * 5).history
    assert [round(record["guided_weight"], 2) for record in history] == [1.0, 0.75, 0.25, 0.0, 0.0]
    assert [record["guide_tokens"] > 0 for record in history[1:]] == [True, True, False, False]
    certain = lock_agent(MENTOR, rows=32, env=OPEN)
    certain.policy.logits.data *= 1e4
    history = certain.learn(total_episodes=64).history
    assert (certain.threshold, history[1]["guide_tokens"]) == (SMALLEST_THRESHOLD, 0)
    certain.policy.logits.data /= 1e4
    assert certain.learn(total_episodes=32).history[-1]["guide_tokens"] > 0


def test_the_guides_tokens_have_a_gradient():
    agent = lock_agent(MENTOR, rows=32, env=OPEN)
    agent.threshold = 2.0
    rollout = agent.play()
    credit = agent.credit(rollout, agent.reference_log_probs(rollout))
    agent.credit_guide(rollout, credit, agent.imitation)
    assert torch.equal(credit.guided, rollout.guided), "every one of them, whatever its entropy"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guided_texts": 7}, r"guided_texts must be in \{1..group_size - 2 = 6\}"),
        ({"quantile": 1.5}, r"quantile must be in \[0, 1\]"),
        ({"baseline": "group"}, "baseline must be 'unguided' for mentor"),
        ({"curriculum": "uniform"}, "curriculum must be None for mentor"),
        ({"dead_groups": "rescue"}, "dead_groups must be 'keep' for mentor"),
        ({"beta": 0.5}, "beta must be 0 for mentor"),
        ({"env": {"guide": None}}, "guide that can complete texts"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lock_agent(MENTOR, **arguments)
