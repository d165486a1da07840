"""ReLIFT: which of the guide's texts wait, when they are learned, and that the step is one of supervised learning."""

import pytest
import torch
from test_algorithms import iterate, make_agent
from test_guide_loss import lock_agent

from agents import GRPO, ReLIFT, relift

SHUT = {"vocab_size": 12, "length": 6}


@pytest.mark.parametrize("pieces", [1, 3])
def test_the_latest_texts_are_learned_by_a_step_of_their_own(pieces):
    agent = lock_agent(ReLIFT, env=SHUT, buffer_size=6, gradient_accumulation_steps=pieces)
    before = agent.policy.logits.detach().clone()
    (first,) = agent.learn(total_episodes=32).history
    assert (first["unsolved_groups"], first["buffer"]) == (1.0, 4)
    assert "supervised_loss" not in first
    assert torch.equal(agent.policy.logits, before), "groups without a success have no policy gradient"

    second = agent.learn(total_episodes=32).history[1]
    assert second["buffer"] == 2
    ((ending, _),) = agent.env.lock.endings
    prompt = agent.last_rollout.prompt_columns
    text = [*agent.last_rollout.input_ids[0, :prompt].tolist(), *ending]
    states = agent.policy.states(torch.tensor([text]))[0, prompt:-1]
    logits = before.clone().requires_grad_()
    loss = -logits[states].log_softmax(-1)[range(len(ending)), list(ending)].mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([logits], agent.max_grad_norm)
    torch.optim.Adam([logits], lr=agent.learning_rate, eps=1e-5).step()
    assert second["supervised_loss"] == pytest.approx(loss.item())
    torch.testing.assert_close(agent.policy.logits.detach(), logits.detach(), rtol=1e-4, atol=1e-5)


def test_the_latest_come_first_and_the_rest_waits(make_env, make_policy):
    agent = make_agent("relift", make_env, make_policy, group_size=4, success=2.0, buffer_size=10)
    played = []
    for _ in range(3):
        agent.learn(total_episodes=1)
        played.insert(0, agent.last_rollout.sample_ids[::4].tolist())
    expected = [sample for samples in played for sample in samples]
    texts = dict(zip(expected, agent.env.guide_texts(expected, agent.seed), strict=True))
    assert agent.history[2]["buffer"] == len(expected) - 10 == 2
    assert agent.buffer == [(sample, texts[sample]) for sample in expected[10:]]
    written = sum(map(len, texts.values()))
    assert agent.num_guide_tokens == written, "a text that is learned again is written once"


def test_texts_below_the_least_reward_do_not_wait():
    agents = []
    for min_reward in (None, 1.0):
        lock = {**SHUT, "guide_accuracy": 0.8}
        agent = lock_agent(ReLIFT, env=lock, success=2.0, min_reward=min_reward, group_size=2, buffer_size=99)
        agents.append(agent.learn(total_episodes=64))
    every, good = (agent.buffer for agent in agents)
    ((ending, _),) = agents[0].env.lock.endings
    assert good == [(sample, ids) for sample, ids in every if ids == list(ending)]
    assert 0 < len(good) < len(every) == 32
    assert agents[0].num_guide_tokens == agents[1].num_guide_tokens, "what is left out was written, too"


def test_a_step_that_fails_is_taken_again_with_the_same_texts(monkeypatch):
    agent = lock_agent(ReLIFT, env=SHUT, buffer_size=6).learn(total_episodes=32)
    waited = list(agent.buffer)
    with monkeypatch.context() as patch:
        patch.setattr(relift, "supervised_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            agent.learn(total_episodes=32)
    assert (agent.buffer, agent.iteration) == (waited, 1)
    assert agent.learn(total_episodes=32).history[1]["buffer"] == 2


def test_of_many_texts_as_many_as_a_step_takes_wait(make_env, make_policy):
    agent = make_agent("relift", make_env, make_policy, group_size=2, success=2.0, buffer_size=3)
    for _ in range(3):  # eight come each time
        agent.learn(total_episodes=1)
        assert len(agent.buffer) == 3


def test_references_are_learned_where_the_task_says_so(make_env, make_policy, monkeypatch):
    env = make_env(8, guide="references")
    monkeypatch.setattr(env, "imitates", lambda sample: sample % 2 == 0)
    agent = ReLIFT(make_policy(), env, episodes_per_iteration=16, group_size=2, success=2.0)
    iterate(agent, 3)
    assert 0 < len(agent.buffer) < 24
    assert all(sample % 2 == 0 for sample, _ in agent.buffer)


def test_solved_groups_ask_nobody(make_env, make_policy):
    agent = make_agent("relift", make_env, make_policy, group_size=4, success=0.0, buffer_size=1)
    plain = make_agent("grpo", make_env, make_policy, group_size=4, kl_coef=0.0, scale="none")
    for learner in (agent, plain):
        learner.learn(total_episodes=48)
    assert agent.num_guide_tokens == 0
    assert isinstance(plain, GRPO)
    for weight, other in zip(agent.policy.parameters(), plain.policy.parameters(), strict=True):
        assert torch.equal(weight, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"buffer_size": 0}, "buffer_size must be at least 1"),
        ({"dead_groups": "rescue"}, 'dead_groups must be "keep" for relift'),
        ({"env": {"guide": None}}, "guide that can start texts for relift"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        lock_agent(ReLIFT, **arguments)
