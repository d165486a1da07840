"""GAIL's discriminator against its formula, and what it does and does not teach."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

from agents.gail import GAIL


def make(make_env, make_policy, **arguments):
    arguments = {"episodes_per_iteration": 16, "minibatch_size": 16, "device": "cpu", **arguments}
    return GAIL(make_policy(), make_env(16), **arguments)


def outspoken(agent):
    """A discriminator that has an opinion."""
    torch.manual_seed(1)
    torch.nn.init.normal_(agent.discriminator.heads["value"].weight, std=0.5)
    torch.nn.init.constant_(agent.discriminator.heads["value"].bias, 0.2)
    return agent


def probability(discriminator, ids):
    """D of one text without padding: a sigmoid of the head after its last token, in float64."""
    hidden = discriminator.model.transformer(torch.tensor([ids])).last_hidden_state[0, -1]
    return discriminator.heads["value"](hidden).sigmoid().item()


def texts_of(rollout):
    return [ids[mask.bool()].tolist() for ids, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True)]


def test_loss_and_rewards_are_those_of_the_formula(make_env, make_policy):
    """-E[log D(reference)] - E[log(1 - D(text))], and the reward -log(1 - D(text))."""
    agent = outspoken(make(make_env, make_policy, discriminator_learning_rate=1e-3))
    rollout = super(GAIL, agent).play()
    before = copy.deepcopy(agent.discriminator).double()
    said = agent.train_discriminator(rollout)
    examples = agent.demonstrations(rollout)
    assert sorted(examples) == list(range(16))
    eos = agent.env.eos_token_id
    real, fake = [], []
    for row, text in enumerate(texts_of(rollout)):
        prompt = rollout.input_ids[row, :8][rollout.attention_mask[row, :8].bool()].tolist()
        *answer, end = examples[row].target
        assert text[: len(prompt)] == prompt
        assert agent.env.tokenizer.decode(answer).strip() == rollout.references[row][0]
        assert end == eos
        real.append(probability(before, [*prompt, *answer, end]))
        fake.append(probability(before, text))
    loss = -np.mean(np.log(real)) - np.mean(np.log1p(-np.array(fake)))
    assert said["discriminator_loss"] == pytest.approx(loss, abs=1e-5)
    accuracy = np.mean([*(np.array(real) > 0.5), *(np.array(fake) < 0.5)])
    assert said["discriminator_accuracy"] == pytest.approx(accuracy)

    agent = outspoken(make(make_env, make_policy))
    rollout = agent.play()
    after = copy.deepcopy(agent.discriminator).double()
    expected = [-math.log(1 - probability(after, text)) for text in texts_of(rollout)]
    np.testing.assert_allclose(agent.rewards(rollout), expected, atol=1e-5)
    assert agent.rewards(rollout).std() > 1e-3


def test_the_gradient_is_that_of_the_loss(make_env, make_policy):
    agent = outspoken(make(make_env, make_policy, max_grad_norm=1e9))
    rollout = super(GAIL, agent).play()
    before = copy.deepcopy(agent.discriminator)
    agent.train_discriminator(rollout)
    real = [[*example.context, *example.target] for _, example in sorted(agent.demonstrations(rollout).items())]
    loss = 0.0
    for texts, sign in ((real, 1), (texts_of(rollout), -1)):
        for ids in texts:
            hidden = before.model.transformer(torch.tensor([ids])).last_hidden_state[0, -1]
            loss = loss - torch.nn.functional.logsigmoid(sign * before.heads["value"](hidden)).squeeze() / len(texts)
    before.zero_grad()
    loss.backward()
    for name, parameter in agent.discriminator.named_parameters():
        if before.get_parameter(name).grad is not None:
            torch.testing.assert_close(parameter.grad, before.get_parameter(name).grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_discriminator_learns_to_tell_texts_from_references(make_env, make_policy):
    agent = make(make_env, make_policy, discriminator_learning_rate=3e-3)
    rollout = super(GAIL, agent).play()

    def judged():
        with torch.no_grad():
            examples = [example for _, example in sorted(agent.demonstrations(rollout).items())]
            rewards = [
                torch.nn.functional.softplus(odds).mean()
                for odds in (agent.log_odds_of(examples), agent.log_odds(rollout, torch.arange(16)))
            ]
        return [float(reward) for reward in rewards]

    start = judged()
    assert start == pytest.approx([math.log(2)] * 2), "an untrained discriminator knows nothing"
    records = [agent.train_discriminator(rollout) for _ in range(30)]
    references, texts = judged()
    assert references > 2 * start[0]
    assert texts < 0.5 * start[1]
    assert records[0]["discriminator_loss"] == pytest.approx(2 * math.log(2))
    assert records[-1]["discriminator_loss"] < 0.5
    assert records[-1]["discriminator_accuracy"] > 0.9


def test_the_tasks_reward_is_recorded_and_trains_nothing(make_env, make_policy):
    agents = []
    for worth in (0.0, 1000.0):
        env = make_env(16, reward=lambda *, prompts, completions, references, worth=worth: [
            worth * (len(text) % 3) for text in completions
        ])  # fmt: skip
        agents.append(GAIL(make_policy(), env, episodes_per_iteration=16, learning_rate=1e-3, device="cpu"))
        agents[-1].learn(total_episodes=48)
    for kind in ("policy", "discriminator"):
        one, other = (getattr(agent, kind).state_dict() for agent in agents)
        assert all(torch.equal(one[name], other[name]) for name in one)
    histories = [agent.history for agent in agents]
    assert {record["reward"] for record in histories[0]} == {0.0}
    assert all(record["reward"] > 100 for record in histories[1])
    for key in ("discriminator_reward", "discriminator_loss", "loss", "kl"):
        assert [record[key] for record in histories[0]] == [record[key] for record in histories[1]]


def test_learning_from_the_discriminator_makes_texts_like_references(make_env, make_policy):
    """References are two words and EOS; a random policy hardly ever ends. Nobody but the discriminator knows."""
    env = make_env(32, reward=lambda *, prompts, completions, references: [0.0] * len(completions))
    agent = GAIL(
        make_policy(), env, episodes_per_iteration=32, learning_rate=3e-3, n_epochs=4, kl_coef=0.0, vf_coef=0.5,
        clip_range_vf=None, discriminator_learning_rate=3e-4, device="cpu",
    )  # fmt: skip
    agent.learn(total_episodes=32 * 24)
    lengths = [record["length"] for record in agent.history]
    assert np.mean(lengths[:3]) > 5.5
    assert 2 < np.mean(lengths[-4:]) < 4.5


def test_samples_without_references_are_refused(make_env, make_policy):
    agent = make(make_env, make_policy)
    rollout = super(GAIL, agent).play()
    rollout.references[:] = [()] * 16
    with pytest.raises(ValueError, match="references"):
        agent.train_discriminator(rollout)
