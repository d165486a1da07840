"""Our wrappers, and Gymnasium's own around our environments."""

from __future__ import annotations

import pickle

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ENV_ID, HORIZON, WORDS, letters
from gymnasium.envs.registration import EnvSpec
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import NumpyToTorch, RecordEpisodeStatistics, TimeLimit, TransformReward
from gymnasium.wrappers.vector import RecordEpisodeStatistics as VectorRecordEpisodeStatistics

from textgym import Guidance
from textgym.guides import CallableGuide
from textgym.tasks.lock import CombinationLock, LockGuide
from textgym.wrappers import AnyText, DenseReward, FrozenPrompts, RecordEpisodes, TextObservation

IDS = ["textgym/IMDB-v0", "textgym/CommonGen-v0", "textgym/TLDR-v0", "textgym/CombinationLock-v0"]


@pytest.fixture
def env(words_tokenizer):
    return gym.make(ENV_ID, tokenizer=words_tokenizer)


def episode(env, seed=0, **reset):
    """Rewards and the last info of an episode of random tokens."""
    rng, rewards = np.random.default_rng(seed), []
    env.reset(seed=seed, **reset)
    while True:
        _, reward, terminated, truncated, info = env.step(int(rng.integers(1, min(200, env.action_space.n))))
        rewards.append(reward)
        if terminated or truncated:
            return rewards, info


@pytest.mark.parametrize("id", IDS)
@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")
@pytest.mark.filterwarnings("error")
def test_text_observations_are_the_prompt_and_what_is_written(id):
    plain, env = gym.make(id), TextObservation(gym.make(id))
    check_env(env, skip_render_check=True)
    text, info = env.reset(seed=1)
    plain.reset(seed=1)
    assert text.strip() == info["prompt"].strip()
    rng = np.random.default_rng(0)
    for _ in range(8):
        token = int(rng.integers(2, min(300, env.action_space.n)))
        text, *_ = env.step(token)
        observation, *_ = plain.step(token)
        tokenizer = plain.unwrapped.tokenizer
        valid = observation["input_ids"][observation["attention_mask"] == 1]
        assert text == tokenizer.decode(valid, skip_special_tokens=True)
        assert text in env.observation_space
    assert env.observation_space.sample(mask=None) in env.observation_space


def test_any_text_holds_texts_of_any_characters_up_to_its_length():
    space = AnyText(4, seed=0)
    assert "löß☃" in space
    assert "" in space
    assert "12345" not in space
    assert 3 not in space
    assert space.sample() in space
    assert space == pickle.loads(pickle.dumps(space))


def test_dense_rewards_add_up_to_the_reward(env):
    on_the_way = 0
    for seed in range(10):
        sparse, info = episode(env, seed)
        dense, dense_info = episode(DenseReward(env), seed)
        assert dense_info["text"] == info["text"]
        assert sparse[:-1] == [0] * (len(sparse) - 1)
        start = letters(prompts=[""], completions=[""], references=[()])[0]
        assert sum(dense) == pytest.approx(sum(sparse) - start)
        on_the_way += np.count_nonzero(dense[:-1])
    assert on_the_way > 10


def test_dense_rewards_of_a_potential_keep_discounted_returns(env):
    gamma = 0.8

    def potential(*, prompts, completions, references):
        assert references[0]
        return {"length": [len(text) for text in completions], "prompt": [len(prompt) for prompt in prompts]}

    def discounted(rewards):
        return sum(gamma**step * reward for step, reward in enumerate(rewards))

    for seed in range(5):
        sparse, _ = episode(env, seed, options={"prefix": " sun moon"})
        dense, _ = episode(DenseReward(env, potential, gamma), seed, options={"prefix": " sun moon"})
        _, info = env.reset(seed=seed)
        first = len(" sun moon") + len(info["prompt"])
        assert discounted(dense) == pytest.approx(discounted(sparse) - first)
    with pytest.raises(ValueError, match="gamma"):
        DenseReward(env, gamma=1.5)


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")
def test_frozen_prompts_take_turns(env):
    frozen = FrozenPrompts(env, [7, 3, 11])
    seen = [frozen.reset(seed=0 if turn == 0 else None)[1]["sample_id"] for turn in range(7)]
    assert seen == [7, 3, 11, 7, 3, 11, 7]
    assert frozen.reset(seed=1)[1]["sample_id"] == 7
    assert frozen.reset(options={"prefix": " sun"})[1]["prefix_length"] == 1
    check_env(FrozenPrompts(env.unwrapped, [0]), skip_render_check=True)
    with pytest.raises(ValueError, match="index"):
        frozen.reset(options={"index": 1})
    for indices in ([], [60], [-1]):
        with pytest.raises(ValueError, match="indices"):
            FrozenPrompts(env, indices)


@pytest.mark.parametrize("wrapper", [TextObservation, DenseReward, lambda env: FrozenPrompts(env, [0])])
def test_other_environments_are_refused(wrapper):
    with pytest.raises(ValueError, match="text environment"):
        wrapper(gym.make("CartPole-v1"))


def test_our_wrappers_are_pickled_and_part_of_a_specification():
    env = FrozenPrompts(DenseReward(TextObservation(gym.make("textgym/CommonGen-v0", guide="references"))), [2, 5])
    again = gym.make(EnvSpec.from_json(env.spec.to_json()))
    twin = pickle.loads(pickle.dumps(env))
    rewards, info = episode(env)
    for other in (again, twin):
        assert type(other) is FrozenPrompts
        other_rewards, other_info = episode(other)
        assert other_rewards == rewards
        assert other_info["text"] == info["text"]


@pytest.mark.parametrize("id", IDS)
def test_gymnasium_wrappers(id):
    env = RecordEpisodeStatistics(gym.make(id, max_episode_steps=5))
    rewards, info = episode(env)
    assert info["episode"]["l"] == len(rewards) <= 5
    assert info["episode"]["r"] == pytest.approx(sum(rewards))
    short = TimeLimit(gym.make(id), 3)
    short.reset(seed=0)
    assert [short.step(2)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]

    plain, doubled = gym.make(id), TransformReward(gym.make(id), lambda reward: 2 * reward)
    assert sum(episode(doubled)[0]) == pytest.approx(2 * sum(episode(plain)[0]))
    tensors = NumpyToTorch(gym.make(id))
    observation, _ = tensors.reset(seed=0)
    expected, _ = plain.reset(seed=0)
    assert observation["input_ids"].dtype == torch.int64
    np.testing.assert_array_equal(observation["input_ids"].numpy(), expected["input_ids"])
    observation, *_ = tensors.step(torch.tensor(5))
    np.testing.assert_array_equal(observation["input_ids"].numpy(), plain.step(5)[0]["input_ids"])


def test_statistics_of_the_native_vector_environment(words_tokenizer):
    envs = VectorRecordEpisodeStatistics(gym.make_vec(ENV_ID, num_envs=3, tokenizer=words_tokenizer))
    envs.reset(seed=0)
    for _ in range(HORIZON):
        _, rewards, terminations, _, infos = envs.step(np.full(3, 260))
    assert terminations.all()
    np.testing.assert_array_equal(infos["episode"]["l"], HORIZON)
    np.testing.assert_allclose(infos["episode"]["r"], rewards)


@pytest.mark.slow
def test_async_vector_env_equals_the_native_one():
    arguments = {"guide": "references", "guidance": Guidance(restart_prob=0.5)}
    ours = gym.make_vec("textgym/CommonGen-v0", num_envs=2, **arguments)
    theirs = gym.make_vec("textgym/CommonGen-v0", num_envs=2, vectorization_mode="async", **arguments)
    try:
        (obs, infos), (expected, expected_infos) = ours.reset(seed=4), theirs.reset(seed=4)
        rng = np.random.default_rng(0)
        for _ in range(45):
            assert data_equivalence(obs, expected, exact=True)
            assert data_equivalence(infos, expected_infos)
            actions = rng.integers(2, 300, 2)
            obs, rewards, terminations, _, infos = ours.step(actions)
            expected, expected_rewards, expected_terminations, _, expected_infos = theirs.step(actions)
            np.testing.assert_allclose(rewards, expected_rewards)
            np.testing.assert_array_equal(terminations, expected_terminations)
    finally:
        theirs.close()


def a_guide(requests):
    return [f" {WORDS[0]}" for _ in requests]


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
def test_specifications_are_json_unless_an_argument_is_an_object(make):
    settings = {
        "guide": "references",
        "guidance": Guidance(restart_prob=0.5, restart_length=(1, 3)),
        "max_prompt_tokens": 32,
        "min_new_tokens": 2,
        "source": "mini",
    }
    env = make("textgym/IMDB-v0", **settings)
    spec = EnvSpec.from_json(env.spec.to_json())
    again = make(spec)
    assert data_equivalence(env.reset(seed=0), again.reset(seed=0), exact=True)
    assert again.unwrapped.guidance == Guidance(restart_prob=0.5, restart_length=(1, 3))
    assert again.spec.to_json() == env.spec.to_json()
    for name, value in (
        ("guide", a_guide),
        ("guide", CallableGuide(a_guide)),
        ("guide", LockGuide(CombinationLock())),
        ("reward", letters),
    ):
        with pytest.raises(ValueError, match=f"{name} must be plain data"):
            make("textgym/IMDB-v0", **{name: value}).spec.to_json()


def test_episodes_are_recorded_as_pages_that_show_every_step(words_tokenizer, tmp_path):
    def attack(requests):
        return ["<script>alert(1)</script> \x1b[2J" for _ in requests]

    arguments = {"tokenizer": words_tokenizer, "guide": CallableGuide(attack), "guidance": {"restart_prob": 1.0}}
    env = RecordEpisodes(
        gym.make(ENV_ID, render_mode="html", **arguments), tmp_path / "new", lambda number: number != 1
    )
    plain = gym.make(ENV_ID, render_mode="html", **arguments)
    for seed in range(3):
        rewards, _ = episode(env, seed)
        assert episode(plain, seed)[0] == rewards
        if seed != 1:
            page = (tmp_path / "new" / f"episode-{seed}.html").read_text()
            assert page.count("<section") == 1 + len(rewards)
            assert f"<section class=shown><p>step {len(rewards)}, reward {rewards[-1]:g}</p>{plain.render()}" in page
            assert "<script" not in page
            assert "\x1b" not in page
    env.reset(seed=3)
    env.step(1)
    env.reset(seed=4)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["episode-0.html", "episode-2.html"]
    with pytest.raises(ValueError, match=r"render_mode must be that of .*render_mode=\"html\", got 'ansi'"):
        RecordEpisodes(gym.make(ENV_ID, tokenizer=words_tokenizer, render_mode="ansi"), tmp_path)
