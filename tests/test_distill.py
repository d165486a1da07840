"""Supervised learning on texts of the guide: what is learned, where it leads in closed form, what is counted."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from agents import SL, TabularPolicy
from textgym.guides import CallableGuide, Completion
from textgym.seeding import hash64
from textgym.tasks.lock import CombinationLock, LockGuide

LOCK = CombinationLock(vocab_size=5, length=4, guide_accuracy=0.8)
FORK = CombinationLock(vocab_size=5, length=3, fork=True)


class Author(CallableGuide):
    """Writes one to eight words and digits, too many of them for the horizon of six, and notes what it wrote."""

    def __init__(self):
        super().__init__(self.write)
        self.written = []

    def write(self, requests):
        draws = [hash64(request.seed, np.arange(1 + request.seed % 8)).astype(np.int64) % 36 for request in requests]
        texts = [np.where(draw < 24, 281 + draw % 12, 17 + draw % 10).tolist() for draw in draws]
        self.written += texts
        return [Completion(token_ids=ids) for ids in texts]


def distill(lock, guide=None, **arguments):
    """A table, with settings that bring it to the maximum of the likelihood."""
    shape = {"vocab_size": lock.vocab_size, "length": lock.length, "fork": lock.fork}
    env = gym.make_vec(
        "textgym/CombinationLock-v0",
        num_envs=4,
        parking=True,
        autoreset_mode=AutoresetMode.DISABLED,
        guide=guide or LockGuide(lock),
        **shape,
        **({} if lock.fork else {"guide_accuracy": lock.guide_accuracy}),
    ).unwrapped
    usual = {"n_epochs": 100, "learning_rate": 0.1, "weight_decay": 0.0, "patience": 999, "minibatch_size": 32}
    return SL(TabularPolicy.for_lock(lock), env, targets="guide", **{**usual, **arguments})


def probs(policy, lock):
    """The distribution of the next token, as closed forms of the lock take it."""
    table = policy.logits.detach().double().softmax(-1).numpy()
    return lambda prefix: table[lock._state(prefix)]


def numbers(history):
    """A history without its clocks."""
    return [{key: value for key, value in record.items() if "seconds" not in key} for record in history]


def test_what_is_learned_is_what_the_environment_rewards_enough_each_text_of_a_prompt_once(make_env, make_policy):
    guide = Author()
    arguments = {"targets": "guide", "samples_per_prompt": 3, "eval_prompts": 5}
    agent = SL(make_policy(), make_env(4, guide=guide), min_reward=0.6, **arguments)
    eos, horizon = agent.env.eos_token_id, agent.env.max_new_tokens
    assert len(guide.written) == 3 * (60 + 5)
    expected, stopped = [], 0
    env = make_env(1, parking=False)
    for sample in range(60):
        for ids in {tuple([*ids, eos][:horizon]) for ids in guide.written[sample:180:60]}:
            env.reset(seed=0, options={"index": sample})
            for token in ids:
                _, rewards, over, _, infos = env.step(np.array([token]))
            assert over[0]
            if rewards[0] >= 0.6:
                expected.append((sample, ids))
                stopped += infos["finish_reason"][0] == "stop"
    kept = [(sample, tuple(ids)) for sample, ids in agent.train_pairs]
    assert sorted(kept) == sorted(expected)
    assert 0 < len(kept) < 180
    assert 0 < stopped < len(kept)  # with an end token, and without

    every = SL(make_policy(), make_env(4, guide=Author()), **arguments)
    assert [pair for pair in every.train_pairs if pair in agent.train_pairs] == agent.train_pairs
    (context, target), *_ = every.encode(every.env.data, every.train_pairs[:1])
    whole = SL(make_policy(), make_env(4, guide=Author()), loss_on="text", **arguments)
    assert whole.encode(every.env.data, every.train_pairs[:1]) == [(context[:1], context[1:] + target)]


def test_equal_texts_of_a_prompt_are_learned_once(make_env, make_policy):
    guide = CallableGuide(lambda requests: [request.prompt.split()[0] for request in requests])
    agent = SL(make_policy(), make_env(4, guide=guide), targets="guide", samples_per_prompt=4, n_epochs=1).learn()
    assert [sample for sample, _ in agent.train_pairs] == list(range(60))
    assert agent.history[0]["kept_fraction"] == 1 / 4
    assert len(agent.validation_examples) == 22
    targets = [ids for _, ids in [*agent.train_pairs, *agent.validation_examples]]
    assert agent.num_guide_tokens == 4 * sum(map(len, targets))


def test_unfiltered_the_guide_is_what_the_policy_becomes():
    agent = distill(LOCK).learn()
    policy, (ending, _) = probs(agent.policy, LOCK), LOCK.endings[0]
    texts = np.array([ids for _, ids in agent.train_pairs])
    for depth in range(LOCK.length):
        here = texts[(texts[:, :depth] == ending[:depth]).all(1)]
        np.testing.assert_allclose(policy(ending[:depth]), LOCK.guide_probs(ending[:depth]), atol=2 / len(here) ** 0.5)
    assert LOCK.value(policy) == pytest.approx(LOCK.guide_value(), abs=0.1)


@pytest.mark.parametrize("lock", [LOCK, FORK], ids=["plain", "fork"])
def test_filtered_the_policy_becomes_the_guide_given_its_success(lock):
    agent = distill(lock, min_reward=0.5).learn()
    policy = probs(agent.policy, lock)
    reached = {ending: np.prod([lock.guide_probs(ending[:d])[ending[d]] for d in range(len(ending))])
               for ending, _ in lock.endings}  # fmt: skip
    for ending, _ in lock.endings:
        written = np.prod([policy(ending[:d])[ending[d]] for d in range(len(ending))])
        assert written == pytest.approx(reached[ending] / sum(reached.values()), abs=0.05)
    kept = agent.history[-1]["kept_fraction"]
    assert kept == pytest.approx(sum(reached.values()), abs=0.1)
    assert kept == len(agent.train_pairs) / 256


def test_a_filter_above_the_guides_usual_worth_surpasses_it():
    agent = distill(FORK, min_reward=1.0, samples_per_prompt=2, n_epochs=300, learning_rate=0.3).learn()
    assert FORK.value(probs(agent.policy, FORK)) > 0.97 > 0.5 > FORK.guide_value()


def test_every_token_of_the_guide_is_counted_once(make_env, make_policy):
    guide = Author()
    arguments = {"targets": "guide", "samples_per_prompt": 2, "min_reward": 0.7, "episodes_per_iteration": 8}
    agent = SL(make_policy(), make_env(4, guide=guide), eval_prompts=7, **arguments)
    asked = sum(min(len(ids) + 1, 6) for ids in guide.written)
    assert len(guide.written) == 2 * (60 + 7)
    assert agent.num_guide_tokens == asked
    agent.learn(total_episodes=24)
    assert len(guide.written) == 2 * (60 + 7)
    assert [record["guide_tokens"] for record in agent.history] == [asked, 0, 0]
    assert {record["num_guide_tokens"] for record in agent.history} == {asked}
    assert {record["guide_texts"] for record in agent.history} == {120}
    order = agent.order(0, 24)
    assert agent.num_timesteps == sum(len(agent.train_pairs[index][1]) for index in order)


def test_a_seed_has_its_texts_and_validation_texts_are_others():
    def texts(agent):
        return [ids for _, ids in agent.train_pairs]

    first, again, other = (distill(LOCK, seed=seed) for seed in (0, 0, 1))
    assert texts(first) == texts(again) != texts(other)
    assert texts(first) != [target for _, target in first.validation_examples]  # although all prompts are equal
    more = distill(LOCK, samples_per_prompt=2)
    assert {(sample, tuple(ids)) for sample, ids in first.train_pairs} <= {
        (sample, tuple(ids)) for sample, ids in more.train_pairs
    }


def test_resuming_equals_never_having_stopped(make_env, make_policy, tmp_path):
    arguments = {"targets": "guide", "min_reward": 0.6, "episodes_per_iteration": 16, "learning_rate": 3e-3, "seed": 2}
    agent = SL(make_policy(), make_env(4, guide=Author()), output_dir=tmp_path, **arguments)
    agent.learn(total_episodes=32)
    agent.output_dir = None
    agent.learn()
    env = make_env(4, guide=Author())
    resumed = SL.load(tmp_path / "last", env, output_dir=None)
    assert resumed.iteration == 2
    resumed.learn()
    assert numbers(resumed.history) == numbers(agent.history)
    for one, two in zip(agent.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(one, two)
    card = (tmp_path / "last" / "README.md").read_text()
    assert "| Guide | Author |" in card
    assert "| Reward | letters |" in card


def test_what_cannot_be_distilled_is_refused(make_env, make_policy):
    def make(guide="own", **arguments):
        guide = Author() if guide == "own" else guide
        return SL(make_policy(), make_env(4, guide=guide), **{"targets": "guide", **arguments})

    with pytest.raises(ValueError, match=r"min_reward=2 keeps none of the 120 texts .* the highest reward is 0\.\d"):
        make(min_reward=2, samples_per_prompt=2)
    with pytest.raises(ValueError, match="keeps none of the 60 texts of the guide for split 'train'; all are empty"):
        make(CallableGuide(lambda requests: [Completion(token_ids=[], finished=False)] * len(requests)))
    with pytest.raises(ValueError, match=r'env must have a guide that writes for targets="guide".* got None'):
        make(None)
    with pytest.raises(ValueError, match='references are learned with targets="references"'):
        make("references")
    with pytest.raises(ValueError, match='targets must be "references" or "guide"'):
        make(targets="guides")
    with pytest.raises(ValueError, match="samples_per_prompt must be at least 1, got 0"):
        make(samples_per_prompt=0)
    with pytest.raises(ValueError, match=r'min_reward need targets="guide", got samples_per_prompt=1, min_reward=0.5'):
        make(targets="references", min_reward=0.5)
