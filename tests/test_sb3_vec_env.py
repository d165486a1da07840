"""The vector environment for Stable-Baselines3 is what a DummyVecEnv over single environments is, and batched."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from conftest import ENV_ID, HORIZON, WORDS
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode
from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecMonitor

from agents.sb3 import TextVecEnv
from textgym import Guidance

ROWS = 4


def a_few_words(requests):
    """A guide that is a pure function of its request."""
    return [f" {WORDS[request.seed % 12]}" * (1 + request.seed % 4) for request in requests]


GUIDED = {
    "guide": a_few_words,
    "guidance": Guidance(restart_prob=0.5, handoff_prob=0.5),
    "handoff": True,
    "handoff_cost": 0.01,
}


@pytest.fixture
def make_pair(words_tokenizer):
    """Make our vector environment and Stable-Baselines3's."""

    def make(**arguments):
        arguments["tokenizer"] = words_tokenizer
        ours = TextVecEnv(gym.make_vec(ENV_ID, num_envs=ROWS, **arguments))
        return ours, DummyVecEnv([lambda: gym.make(ENV_ID, **arguments)] * ROWS)

    return make


def assert_same(ours, theirs):
    assert type(ours) is type(theirs)
    assert data_equivalence(ours, theirs, exact=True)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.DISABLED])
@pytest.mark.parametrize("arguments", [{}, GUIDED], ids=["alone", "guided"])
def test_equals_dummy_vec_env(arguments, mode, make_pair, words_tokenizer):
    _, theirs = make_pair(**arguments)
    ours = TextVecEnv(gym.make_vec(ENV_ID, num_envs=ROWS, tokenizer=words_tokenizer, autoreset_mode=mode, **arguments))
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.seed(7) == theirs.seed(7)
    rng = np.random.default_rng(0)
    ended = 0
    for options in (
        None,
        {"index": 3},
        [{"prompt": WORDS[i], "references": ["sea"], "prefix": " sun"} for i in range(4)],
    ):
        ours.set_options(options)
        theirs.set_options(options)
        assert_same(dict(ours.reset()), dict(theirs.reset()))
        assert_same(ours.reset_infos, theirs.reset_infos)
        for _ in range(3 * HORIZON):
            actions = rng.integers(0, ours.action_space.n, ROWS)
            actions[rng.random(ROWS) < 0.2] = words_tokenizer.eos_token_id
            (obs, *results), (expected_obs, *expected) = ours.step(actions), theirs.step(actions)
            assert_same(dict(obs), dict(expected_obs))
            assert [("episode" in info) for info in results[2]] == results[1].tolist()
            for info in results[2]:
                info.pop("episode", None)  # which takes a Monitor there
            for one, other in zip(results, expected, strict=True):
                assert_same(one, other)
            assert results[0].dtype == expected[0].dtype
            assert_same(ours.reset_infos, theirs.reset_infos)
            ended += results[1].sum()
    assert ended > 20


def test_unseeded_rows_go_on_and_differ(make_pair):
    ours, _ = make_pair()
    ours.seed(0)
    first, second = ours.reset(), ours.reset()
    assert (first["input_ids"] != second["input_ids"]).any()
    ours.seed(0)
    assert_same(ours.reset(), first)


@pytest.mark.parametrize("wrap", [lambda envs: envs, VecMonitor], ids=["by itself", "VecMonitor"])
def test_monitors_agree(make_pair, words_tokenizer, wrap):
    ours, _ = make_pair()
    ours = wrap(ours)
    theirs = DummyVecEnv([lambda: Monitor(gym.make(ENV_ID, tokenizer=words_tokenizer))] * ROWS)
    ours.seed(1)
    theirs.seed(1)
    ours.reset()
    theirs.reset()
    rng, episodes = np.random.default_rng(0), []
    for _ in range(2 * HORIZON):
        actions = rng.integers(0, ours.action_space.n, ROWS)
        infos, expected = ours.step(actions)[3], theirs.step(actions)[3]
        for info, other in zip(infos, expected, strict=True):
            assert ("episode" in info) == ("episode" in other)
            if "episode" in info:
                episodes.append((info["episode"]["r"], info["episode"]["l"]))
                assert episodes[-1] == (pytest.approx(other["episode"]["r"], abs=1e-6), other["episode"]["l"])
    assert len(episodes) >= 2 * ROWS


def test_attributes_and_methods_of_rows(make_pair):
    ours, theirs = make_pair(render_mode="ansi", min_new_tokens=2, banned_tokens=[5], **GUIDED)
    for envs in (ours, theirs):
        envs.seed(2)
        envs.reset()
        envs.step(np.full(ROWS, 7))
    for name in ("action_space", "observation_space", "render_mode", "guidance"):
        assert ours.get_attr(name) == theirs.get_attr(name)
        assert ours.get_attr(name, indices=[2, 1]) == theirs.get_attr(name, indices=[2, 1])
    assert ours.env_method("render") == theirs.env_method("render")
    assert ours.env_method("render", indices=1) == theirs.env_method("render", indices=1)
    assert ours.env_is_wrapped(Monitor, indices=[0, 2]) == [True, True]
    assert ours.env_is_wrapped(gym.wrappers.TimeLimit) == [False] * ROWS
    assert not ours.has_attr("nothing of the kind")
    assert is_masking_supported(ours)
    np.testing.assert_array_equal(get_action_masks(ours), get_action_masks(theirs))
    np.testing.assert_array_equal(ours.get_attr("action_masks")[3](), theirs.get_attr("action_masks")[3]())
    ours.set_attr("note", "of all")
    assert ours.get_attr("note") == ["of all"] * ROWS
    with pytest.raises(ValueError, match="all rows"):
        ours.set_attr("note", "of one", indices=0)
    with pytest.raises(AttributeError, match="reset"):
        ours.env_method("reset")
    assert ours.get_images() == [None] * ROWS
    assert ours.render() is None


def test_the_reward_is_called_once_for_all_that_end(words_tokenizer):
    calls = []

    def reward(*, prompts, completions, references):
        calls.append(len(prompts))
        return [1.0] * len(prompts)

    ours = TextVecEnv(gym.make_vec(ENV_ID, num_envs=ROWS, tokenizer=words_tokenizer, reward=reward))
    ours.reset()
    for _ in range(2 * HORIZON):
        ours.step(np.full(ROWS, 9))
    assert calls == [ROWS, ROWS]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"parking": True}, "parking=False"),
        ({"order": "sequential"}, "order='random'"),
        ({"copy": False}, "copy=True"),
        ({"autoreset_mode": AutoresetMode.SAME_STEP}, "SAME_STEP"),
    ],
)
def test_environments_that_do_not_suit_are_refused(arguments, match, words_tokenizer):
    with pytest.raises(ValueError, match=match):
        TextVecEnv(gym.make_vec(ENV_ID, num_envs=2, tokenizer=words_tokenizer, **arguments))


def test_wrappers_and_other_environments_are_refused(words_tokenizer):
    with pytest.raises(ValueError, match="TextVectorEnv"):
        TextVecEnv(gym.make_vec(ENV_ID, num_envs=2, vectorization_mode="sync", tokenizer=words_tokenizer))
