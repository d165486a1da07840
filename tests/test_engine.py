"""The engine against Gymnasium's own vectorisation, its rules of restart and hand-off, and its errors."""

from __future__ import annotations

import copy
import json
import pickle
import re
from dataclasses import asdict, replace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import textgym
from textgym import Guidance, Task, seeding
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.guides import Author, CallableGuide, Completion
from textgym.tasks.parities import ChainOfParitiesVectorEnv
from textgym.tokenization import train_tokenizer

WORDS = ["red", "green", "blue", "one", "two", "three", "sun", "moon", "star", "sea", "hill", "tree"]
HORIZON = 6
ROWS = [
    {"ask": " ".join(WORDS[i % 7 : i % 7 + 1 + i % 4]), "answer": [WORDS[i % 12] + f" {WORDS[i % 5]}"]}
    for i in range(23)
]
TOKENIZER = train_tokenizer([" ".join(WORDS), " " + " ".join(reversed(WORDS))] * 3)
EOS = TOKENIZER.eos_token_id


def reward(*, prompts, completions, references):
    return {
        "length": [len(completion) / 10 for completion in completions],
        "prompt": [len(prompt) / 100 for prompt in prompts],
    }


TASK = Task("colours", ROWS, "{ask}", "answer", max_prompt_tokens=8, max_new_tokens=HORIZON, reward=reward)


def random_writer(requests):
    """Writes tokens by the request's seed alone; each ends the text with probability 1/4."""
    completions = []
    for request in requests:
        draws = seeding.uniform(request.seed, np.arange(request.max_new_tokens))
        stops = np.flatnonzero(draws < 0.25)
        ids = (2 + draws * (len(TOKENIZER) - 2)).astype(int)
        if len(stops):
            ids = np.append(ids[: stops[0]], EOS)
        completions.append(Completion(token_ids=ids.tolist()))
    return completions


GUIDE = CallableGuide(random_writer)
FULL = Guidance(restart_prob=0.6, handoff_prob=0.6)


def vector(n=4, **arguments):
    return TextVectorEnv(n, task=TASK, tokenizer=TOKENIZER, **arguments)


def single(**arguments):
    return TextEnv(task=TASK, tokenizer=TOKENIZER, **arguments)


gym.register("test/Colours-v0", single)


def some_actions(rng, n, handoff=False):
    actions = rng.integers(2, len(TOKENIZER) + handoff, n)
    actions[rng.random(n) < 0.15] = EOS
    if handoff:
        actions[rng.random(n) < 0.15] = len(TOKENIZER)
    return actions


def assert_same_infos(a, b):
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], dict):
            assert_same_infos(a[key], b[key])
        elif key == "final_obs":
            assert data_equivalence(a[key], b[key], exact=True)
        else:
            assert a[key].dtype == b[key].dtype, key
            assert a[key].shape == b[key].shape, key
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("guided", [None, FULL, replace(FULL, restart_fraction=(0.2, 0.9))])
def test_rows_equal_single_environments_and_sync_vector_env(mode, guided):
    arguments = {"guide": GUIDE, "guidance": guided, "handoff": True, "handoff_cost": 0.01} if guided else {}
    n = 5
    ours = vector(n, autoreset_mode=mode, **arguments)
    theirs = SyncVectorEnv([lambda: single(**arguments)] * n, autoreset_mode=mode)
    rng = np.random.default_rng(0)
    obs, infos = ours.reset(seed=11)
    expected_obs, expected_infos = theirs.reset(seed=11)
    ended = 0
    for _ in range(150):
        assert data_equivalence(obs, expected_obs, exact=True)
        assert_same_infos(infos, expected_infos)
        actions = some_actions(rng, n, guided is not None)
        obs, rewards, terminations, truncations, infos = ours.step(actions)
        expected_obs, expected_rewards, expected_terminations, expected_truncations, expected_infos = theirs.step(
            actions
        )
        np.testing.assert_array_equal(rewards, expected_rewards)
        np.testing.assert_array_equal(terminations, expected_terminations)
        np.testing.assert_array_equal(truncations, expected_truncations)
        ended += terminations.sum()
        if mode == AutoresetMode.DISABLED and terminations.any():
            assert_same_infos(infos, expected_infos)
            obs, infos = ours.reset(options={"reset_mask": terminations})
            expected_obs, expected_infos = theirs.reset(options={"reset_mask": terminations.copy()})
    assert ended > 50


def run_to_end(env, actions, **reset):
    """Drive a parking environment with fixed actions (N, steps) until all rows terminate."""
    env.reset(**reset)
    for step in range(actions.shape[1]):
        obs, rewards, terminations, _, infos = env.step(actions[:, step])
        if terminations.any():
            assert terminations.all()
            return obs, rewards, infos
    raise AssertionError("no row terminated")


def test_parking_changes_when_rows_end_and_nothing_else():
    calls = []

    def counting(requests):
        calls.append(len(requests))
        return random_writer(requests)

    n, rng = 16, np.random.default_rng(1)
    actions = np.stack([some_actions(rng, n, True) for _ in range(HORIZON)], 1)
    arguments = {"guidance": FULL, "handoff": True}
    parked = run_to_end(vector(n, guide=CallableGuide(counting), parking=True, **arguments), actions, seed=3)
    assert len(calls) == 2  # one batch of prefixes, one of completions
    for row in range(n):
        env = single(guide=GUIDE, **arguments)
        env.reset(seed=3 + row)
        for action in actions[row]:
            obs, value, terminated, _, info = env.step(action)
            if terminated:
                break
        np.testing.assert_array_equal(obs["input_ids"], parked[0]["input_ids"][row])
        assert value == parked[1][row]
        assert info["text"] == parked[2]["text"][row]
        assert info["finish_reason"] == parked[2]["finish_reason"][row]


def test_rows_without_body_are_parked_from_reset_on():
    env = vector(
        4, guide=GUIDE, guidance=Guidance(handoff_prob=1, handoff_length=0), parking=True, autoreset_mode="NextStep"
    )
    _, infos = env.reset(seed=0)
    assert infos["parked"].all()
    for _ in range(3):  # a reset cannot return a finished episode, so it takes a step, in autoresets too
        _, _, terminations, _, infos = env.step(np.full(4, 5))
        assert terminations.all()
        assert (infos["policy_tokens"] == 0).all()
        assert (infos["finish_reason"] == "handoff").all()
        _, _, terminations, _, infos = env.step(np.full(4, 5))
        assert not terminations.any()
        assert "text" not in infos
    with pytest.raises(ValueError, match="parking=True"):
        vector(4, guide=GUIDE, guidance={"handoff_prob": 1, "handoff_length": 0})


def test_restart_follows_the_published_rule():
    """Drawing t first and redrawing when the guide ends early is uniform on {0..L-1}, as if it had written all L."""
    n = 4000
    env = vector(n, guide=GUIDE, guidance=Guidance(restart_prob=1))
    _, infos = env.reset(seed=5)
    # The guide's own law of L: geometric with 1/4, at most T; P(t) = sum over L > t of P(L) / L.
    lengths = np.arange(1, HORIZON + 1)
    law = 0.25 * 0.75 ** (lengths - 1)
    law[-1] = 0.75 ** (HORIZON - 1)
    expected = np.array([(law / lengths)[lengths > t].sum() for t in range(HORIZON)])
    counts = np.bincount(infos["prefix_length"], minlength=HORIZON)
    assert stats.chisquare(counts, expected * n).pvalue > 1e-3
    written = infos["authors"] != Author.NONE
    np.testing.assert_array_equal(written.sum(1), infos["prefix_length"])
    assert (infos["authors"][written] == Author.GUIDE).all()


def test_handoff_is_scheduled_uniformly_and_completes_the_text():
    n = 3000
    env = vector(n, guide=GUIDE, guidance=Guidance(handoff_prob=1), parking=True)
    env.reset(seed=2)
    for _ in range(HORIZON):
        _, rewards, terminations, _, infos = env.step(np.full(n, 7))
    assert terminations.all()
    counts = np.bincount(infos["policy_tokens"], minlength=HORIZON + 1)[1:]
    assert stats.chisquare(counts).pvalue > 1e-3
    handed = infos["finish_reason"] == "handoff"
    np.testing.assert_array_equal(handed, infos["policy_tokens"] < HORIZON)
    assert (infos["guide_tokens"][handed] > 0).all()
    assert (infos["guide_tokens"][~handed] == 0).all()
    np.testing.assert_allclose(rewards, sum(v for k, v in infos["reward_parts"].items() if k[0] != "_"))


def test_some_scheduled_episodes_have_no_body():
    n = 4000
    guidance = Guidance(handoff_prob=0.5, handoff_length=(2, 3), no_body_prob=0.4)
    env = vector(n, guide=GUIDE, guidance=guidance, parking=True)
    _, infos = env.reset(seed=4)
    skipped = infos["parked"]
    for _ in range(HORIZON):
        _, _, terminations, _, infos = env.step(np.full(n, 7))
    assert terminations.all()
    tokens = infos["policy_tokens"]
    np.testing.assert_array_equal(tokens == 0, skipped)
    assert set(tokens) == {0, 2, 3, HORIZON}
    counts = [(tokens == length).sum() for length in (0, 2, 3, HORIZON)]
    assert stats.chisquare(counts, n * np.array([0.2, 0.15, 0.15, 0.5])).pvalue > 1e-3
    assert (infos["finish_reason"][tokens < HORIZON] == "handoff").all()
    assert (infos["guide_tokens"][skipped] > 0).all()


def test_episodes_without_body_leave_the_others_as_they_were():
    """The draw is one of its own: a row that has a body is the single environment's, whatever its neighbours do."""
    n, rng = 24, np.random.default_rng(3)
    actions = np.stack([some_actions(rng, n) for _ in range(HORIZON)], 1)
    schedule = {"restart_prob": 0.5, "handoff_prob": 0.7}
    env = vector(n, guide=GUIDE, parking=True, guidance={**schedule, "no_body_prob": 0.5})
    obs, rewards, infos = run_to_end(env, actions, seed=3)
    skipped = infos["policy_tokens"] == 0
    assert 3 < skipped.sum() < n - 3
    for row in range(n):
        alone = single(guide=GUIDE, guidance=schedule)
        alone.reset(seed=3 + row)
        for action in actions[row]:
            expected, value, terminated, _, info = alone.step(action)
            if terminated:
                break
        same = np.array_equal(obs["input_ids"][row], expected["input_ids"])
        assert same or skipped[row]
        assert infos["prefix_length"][row] == info["prefix_length"]
        if skipped[row]:
            assert infos["authors"][row].max() == Author.GUIDE
            assert Author.POLICY not in infos["authors"][row]
        else:
            assert (rewards[row], infos["text"][row]) == (value, info["text"])
    fewer = vector(5, guide=GUIDE, parking=True, guidance={**schedule, "no_body_prob": 0.5})
    obs_of_fewer, rewards_of_fewer, _ = run_to_end(fewer, actions[:5], seed=3)
    np.testing.assert_array_equal(obs_of_fewer["input_ids"], obs["input_ids"][:5])
    np.testing.assert_array_equal(rewards_of_fewer, rewards[:5])


def test_a_group_has_a_body_or_has_none():
    env = vector(40, guide=GUIDE, guidance=Guidance(0, None, 1, None, 0.5), parking=True)
    _, infos = env.reset(seed=3, options={"group_size": 4})
    groups = infos["parked"].reshape(-1, 4)
    assert (groups == groups[:, :1]).all()
    assert 0 < groups.mean() < 1


def test_episodes_without_body_need_parking():
    often = Guidance(handoff_prob=0.5, no_body_prob=0.1)
    for make in (vector, single):
        with pytest.raises(ValueError, match="parking=True"):
            make(guide=GUIDE, guidance=often)
        env = make(guide=GUIDE, guidance=Guidance(no_body_prob=0.1))  # nothing is scheduled, so nothing is skipped
        with pytest.raises(ValueError, match="parking=True"):
            env.reset(seed=0, options={"guidance": often})
        env.reset(seed=0)
    for value in (-0.1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="no_body_prob must be a number in"):
            Guidance(no_body_prob=value)


@pytest.mark.parametrize(
    "guidance", [Guidance(0.3, (1, 2), 0.7, None, 0.4), Guidance(1, restart_fraction=(0.1, 0.5), text_seed=3), FULL]
)
def test_a_saved_state_keeps_the_guidance(guidance):
    env = vector(30, guide=GUIDE, guidance=guidance, parking=True, autoreset_mode="Disabled")
    env.reset(seed=6)
    state = pickle.loads(pickle.dumps(env.get_state()))
    plain = {**state, "guidance": [json.loads(json.dumps(asdict(one))) for one in state["guidance"]]}
    expected = env.reset()
    for saved in (state, plain):
        fresh = vector(30, guide=GUIDE, parking=True, autoreset_mode="Disabled")
        fresh.set_state(saved)
        assert fresh.guidance == guidance
        assert data_equivalence(fresh.reset(), expected, exact=True)


def test_guidance_stays_in_force_until_replaced():
    env = vector(8, guide=GUIDE, autoreset_mode="SameStep")
    env.reset(seed=0, options={"guidance": Guidance(restart_prob=1, restart_length=3)})
    seen = []
    for _ in range(12):
        _, _, terminations, _, infos = env.step(np.full(8, 5))
        if terminations.any():
            seen += infos["prefix_length"][terminations].tolist()
    assert max(seen) == 3  # autoresets restart too
    mixed = [None, *[Guidance()] * 7]
    _, infos = env.reset(seed=0, options={"guidance": mixed})
    assert env.guidance[0].restart_prob == 1
    assert (infos["prefix_length"][1:] == 0).all()


def test_groups_share_prompt_prefix_and_draw_but_not_completions():
    calls = []

    def counting(requests):
        calls.append(len(requests))
        return random_writer(requests)

    env = vector(12, guide=CallableGuide(counting), guidance=Guidance(1, None, 1, (1, 2)), parking=True)
    obs, infos = env.reset(seed=9, options={"group_size": 4})
    assert calls[0] <= 3
    for first in range(0, 12, 4):
        for key in ("prompt", "sample_id", "prefix_length"):
            assert len(set(infos[key][first : first + 4])) == 1
        assert (obs["input_ids"][first : first + 4] == obs["input_ids"][first]).all()
    assert len(set(infos["sample_id"])) > 1
    for _ in range(2):
        obs, *_, infos = env.step(np.full(12, 5))
    handed = infos["finish_reason"] == "handoff"
    assert len(np.unique(obs["input_ids"][handed], axis=0)) > 3
    with pytest.raises(ValueError, match="group_size"):
        env.reset(options={"group_size": 5})
    with pytest.raises(ValueError, match="whole groups"):
        env.reset(options={"group_size": 4, "reset_mask": np.arange(12) < 3})


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("n", [1, 4, 23, 30])
def test_sequential_order_visits_every_sample_once(mode, n):
    env = vector(n, order="sequential", autoreset_mode=mode)
    rng = np.random.default_rng(n)
    for _ in range(2):  # a finished pass is followed by another
        _, infos = env.reset()
        visited = infos["sample_id"].tolist()
        for _ in range(23 * HORIZON * 2):
            if env.exhausted:
                break
            _, _, terminations, _, infos = env.step(some_actions(rng, n))
            if mode == AutoresetMode.DISABLED and terminations.any() and not env.exhausted:
                _, infos = env.reset(options={"reset_mask": terminations})
            if "sample_id" in infos:
                visited += infos["sample_id"][infos["_sample_id"]].tolist()
        assert env.exhausted
        assert sorted(sample for sample in visited if sample >= 0) == list(range(23))


def test_users_own_prompt_prefix_and_sample():
    env = single()
    obs, info = env.reset(options={"prompt": "red sun", "references": ["moon"], "prefix": " blue hill"})
    assert (info["prompt"], info["references"], info["sample_id"]) == ("red sun", ("moon",), -1)
    ids = TOKENIZER(" blue hill")["input_ids"]
    assert info["prefix_length"] == len(ids)
    assert info["authors"][: len(ids)].tolist() == [Author.USER] * len(ids)
    assert obs["input_ids"][8 : 8 + len(ids)].tolist() == ids
    obs_ids, _ = env.reset(options={"prompt": "red sun", "prefix": ids})
    assert data_equivalence(obs, obs_ids, exact=True)
    assert env.reset(options={"index": 7})[1]["sample_id"] == 7
    _, infos = vector(3).reset(options={"index": [4, None, 6], "prefix": [None, " sea", [5, 6]]})
    assert infos["sample_id"][[0, 2]].tolist() == [4, 6]
    assert infos["prefix_length"][[0, 2]].tolist() == [0, 2]


def test_references_can_start_an_episode_but_not_finish_it():
    _, infos = vector(64, guide="references", guidance=Guidance(1, (1, 5))).reset(seed=0)
    for row in range(64):
        length = infos["prefix_length"][row]
        ids = TOKENIZER(" " + infos["references"][row][0])["input_ids"]
        assert length == min(length, len(ids))
        assert (infos["authors"][row, :length] == Author.REFERENCE).all()
    assert infos["prefix_length"].max() > 0
    with pytest.raises(ValueError, match="hands off"):
        vector(guide="references", guidance=Guidance(handoff_prob=1))


def test_text_of_a_guide_is_encoded_as_a_continuation():
    env = single(
        guide=lambda requests: ["sun moon"] * len(requests), guidance=Guidance(handoff_prob=1, handoff_length=1)
    )
    env.reset(options={"prompt": "red"})
    obs, _, terminated, _, info = env.step(TOKENIZER(" blue")["input_ids"][0])
    assert terminated
    assert info["text"].endswith(" sun moon")
    tokens = obs["input_ids"][obs["attention_mask"] == 1]
    assert tokens[-1] == EOS  # a plain string is a finished text
    assert info["authors"][0] == Author.POLICY


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"guide": GUIDE, "guidance": Guidance(restart_prob=1)},
        {"guide": GUIDE, "guidance": FULL, "handoff": True, "handoff_cost": 0.1},
    ],
)
@pytest.mark.filterwarnings("error")
def test_gymnasium_check_env(arguments):
    env = gym.make("test/Colours-v0", **arguments)
    check_env(env.unwrapped, skip_render_check=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), steps=st.integers(0, 12))
def test_copies_pickles_and_state_continue_identically(seed, steps):
    env = vector(3, guide=GUIDE, guidance=FULL, handoff=True)
    rng = np.random.default_rng(seed)
    env.reset(seed=seed)
    for _ in range(steps):
        env.step(some_actions(rng, 3, True))
    twins = [env, copy.deepcopy(env), pickle.loads(pickle.dumps(env))]
    actions = [some_actions(rng, 3, True) for _ in range(8)]
    results = [[twin.step(action) for action in actions] for twin in twins]
    for result in results[1:]:
        assert data_equivalence(results[0], result, exact=True)
    fresh = vector(3, guide=GUIDE, handoff=True)
    fresh.set_state(pickle.loads(pickle.dumps(env.get_state())))
    assert data_equivalence(env.reset(), fresh.reset(), exact=True)


def test_observations_are_fresh_unless_views_are_asked_for():
    env = vector(2, copy=False)
    obs, _ = env.reset(seed=0)
    later, *_ = env.step(np.array([5, 6]))
    assert obs["input_ids"] is later["input_ids"]
    env = vector(2)
    obs, _ = env.reset(seed=0)
    before = obs["input_ids"].copy()
    env.step(np.array([5, 6]))
    np.testing.assert_array_equal(obs["input_ids"], before)


def test_render_colours_authors_apart():
    env = single(guide=GUIDE, render_mode="ansi")
    env.reset(seed=0, options={"prompt": "red sun", "prefix": " blue"})
    env.step(TOKENIZER(" hill")["input_ids"][0])
    frame = env.render()
    assert "\x1b[2mred sun\x1b[0m" in frame
    assert frame.count("\x1b[33m") == 1
    assert frame.count("\x1b[32m") == 1


def test_render_for_notebooks_names_authors_and_runs_nothing():
    env = single(guide=GUIDE, render_mode="html")
    env.reset(seed=0, options={"prompt": "red <b>sun", "prefix": " blue"})
    env.step(TOKENIZER(" hill")["input_ids"][0])
    page = env.render()._repr_html_()
    assert re.findall(r'title="(\w+)"', page) == ["prompt", "user", "policy"]
    assert "red &lt;b&gt;sun" in page
    assert "<b>" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, r"split must be one of .*'train'.*got 'dev'"),
        ({"order": "shuffled"}, r"order must be one of .*got 'shuffled'"),
        ({"max_new_tokens": 0}, r"max_new_tokens must be an int >= 1, got 0"),
        ({"max_prompt_tokens": 2.5}, r"max_prompt_tokens must be an int >= 1, got 2.5"),
        ({"truncation_side": "middle"}, r"truncation_side must be one of .*got 'middle'"),
        ({"render_mode": "rgb_array"}, r"render_mode must be one of .*got 'rgb_array'"),
        ({"handoff": 1}, r"handoff must be one of .*got 1"),
        ({"handoff": True}, r"handoff=True needs a guide"),
        ({"handoff_cost": -1}, r"handoff_cost must be .*got -1"),
        ({"guidance": {"restart": 1}}, r"guidance has unknown keys \['restart'\]"),
        ({"guidance": {"restart_prob": 1}}, r"needs a guide"),
        ({"guidance": {"restart_prob": 1.5}}, r"restart_prob must be .*got 1.5"),
        ({"guide": 3}, r"guide must be .*got int"),
        ({"guide": "refrences"}, r"guide must be 'references', .*got 'refrences'"),
        ({"reward": "no such reward"}, r"reward must be .*no such reward"),
        ({"source": "/no/such/folder"}, r"source .*/no/such/folder"),
        ({"tokenizer": 3}, r"tokenizer must be .*got int"),
    ],
)
def test_wrong_arguments_name_what_came_and_what_is_allowed(arguments, message):
    task = Task("data", TASK.data, "{ask}", "answer", 8, 6, reward)
    with pytest.raises(ValueError, match=message):
        TextVectorEnv(2, **{"task": task, "tokenizer": TOKENIZER, **arguments})


@pytest.mark.parametrize("name", ["num_envs", "parking", "autoreset_mode", "copy"])
def test_single_environment_refuses_vector_arguments(name):
    with pytest.raises(ValueError, match=f"{name} is an argument of the vector environment only"):
        single(**{name: 1})


def test_wrong_steps_and_options_are_errors():
    env = vector(2, autoreset_mode="Disabled")
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.array([1, 2]))
    env.reset(seed=0)
    for actions in (np.array([1, len(TOKENIZER)]), np.array([1.0, 2.0]), np.array([1]), np.array([-1, 1])):
        with pytest.raises(ValueError, match="actions must be"):
            env.step(actions)
    env.step(np.array([EOS, 5]))
    with pytest.raises(gym.error.ResetNeeded, match=r"rows \[0\]"):
        env.step(np.array([5, 5]))
    for options, message in [
        ({"idx": 1}, "unknown keys"),
        ({"index": 99}, "index"),
        ({"index": [1]}, "one entry per row"),
        ({"references": ["a"]}, "prompt"),
        ({"prefix": [0, 3]}, "no EOS"),
        ({"prefix": [3] * 6}, "leave a token"),
        ({"guidance": Guidance(restart_prob=1)}, "needs a guide"),
    ]:
        with pytest.raises(ValueError, match=message):
            env.reset(options=options)

    env.reset(seed=0)
    before = env.step(np.array([5, 6]))[0]["input_ids"]
    with pytest.raises(ValueError, match="index"):
        env.reset(options={"index": 99})
    assert (env.step(np.array([7, 7]))[0]["input_ids"][:, :-5] == before[:, :-5]).all(), "the episodes go on"


def test_a_failed_step_can_be_tried_again():
    failures = iter([True])

    def fails_once(*, prompts, completions, references):
        if next(failures, False):
            raise RuntimeError("out of memory")
        return [0.0] * len(prompts)

    task = Task("colours", ROWS, "{ask}", "answer", 8, HORIZON, fails_once)
    env = TextVectorEnv(1, task=task, tokenizer=TOKENIZER, guide=lambda requests: [[5]] * len(requests), handoff=True)
    env.reset(seed=0)
    ask = np.array([len(TOKENIZER)])
    with pytest.raises(RuntimeError):
        env.step(ask)
    *_, infos = env.step(ask)
    assert infos["guide_tokens"].tolist() == [1]

    env = vector(2)
    env.reset(seed=0)
    env.step(np.array([EOS, 5]))
    with pytest.raises(ValueError, match="actions must be"):
        env.step(np.array([0, 9999]))
    *_, infos = env.step(np.array([7, 5]))
    assert infos["_prompt"].tolist() == [True, False]  # the autoreset is told by the step that succeeds


def test_refused_guidance_is_not_in_force():
    env = vector(2, guide="references")
    with pytest.raises(ValueError, match="hands off"):
        env.reset(seed=0, options={"guidance": [Guidance(restart_prob=1), Guidance(handoff_prob=1)]})
    assert env.guidance == Guidance()


def test_registered_environments_pickle():
    textgym.register("test/Pickled-v0", TASK)
    for env in (
        gym.make("test/Pickled-v0", tokenizer=TOKENIZER).unwrapped,
        gym.make_vec("test/Pickled-v0", num_envs=2, tokenizer=TOKENIZER),
    ):
        twin = pickle.loads(pickle.dumps(env))
        assert data_equivalence(env.reset(seed=1), twin.reset(seed=1), exact=True)


class WordsInOrder:
    """A reward that is none for texts whose tokens do not rise, and says so."""

    def __call__(self, *, prompts, completions, references):
        return [float(self.last(text) >= 0) for text in completions]

    @staticmethod
    def last(text):
        ids = TOKENIZER(text)["input_ids"]
        return (ids or [0])[-1] if ids == sorted(ids) else -1

    def allowed_tokens(self, *, prompts, completions, references, tokenizer):
        assert len(prompts) == len(completions) == len(references)
        allowed = np.arange(len(tokenizer)) >= np.array([self.last(text) for text in completions])[:, None]
        allowed[:, tokenizer.eos_token_id] = True
        return allowed


def test_action_masks_leave_out_what_is_not_allowed():
    banned = [40, 41]
    env = vector(
        3,
        guide=GUIDE,
        guidance=Guidance(restart_prob=0.5, restart_length=2),
        handoff=True,
        parking=True,
        min_new_tokens=3,
        banned_tokens=banned,
        reward=WordsInOrder(),
        autoreset_mode=AutoresetMode.DISABLED,
    )
    rng, parked, seen = np.random.default_rng(0), 0, 0
    for seed in range(12):
        _, info = env.reset(seed=seed)
        length = info["prefix_length"].copy()
        while True:
            masks = env.action_masks()
            assert masks.shape == (3, len(TOKENIZER) + 1)
            for row in range(3):
                if info["parked"][row]:
                    assert masks[row].all()
                    parked += 1
                    continue
                assert masks[row, EOS] == (length[row] >= 3)
                assert masks[row, -1], "the guide may always be asked"
                assert not masks[row, banned].any()
                last = WordsInOrder.last(TOKENIZER.decode(env._tokens(row)))
                others = np.setdiff1d(np.arange(2, len(TOKENIZER)), banned)
                np.testing.assert_array_equal(masks[row, others], others >= last)
                seen += masks[row, EOS]
            actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
            actions = np.where(actions == EOS, actions, np.where(rng.random(3) < 0.8, 200 + length, actions))
            length += ~info["parked"]
            _, _, terminations, _, info = env.step(actions)
            if terminations.all():
                break
        assert env.action_masks().all(), "nothing is read from rows that are done"
    assert parked
    assert seen
    alone = single(min_new_tokens=1, banned_tokens=[5])
    alone.reset(seed=0)
    assert np.flatnonzero(~alone.action_masks()).tolist() == [EOS, 5]
    _, _, terminated, _, _ = alone.step(EOS)
    assert terminated, "masks advise, and step takes every action"


def test_what_masks_leave_out_is_checked():
    for arguments in ({"min_new_tokens": -1}, {"min_new_tokens": HORIZON + 1}, {"min_new_tokens": True}):
        with pytest.raises(ValueError, match="min_new_tokens"):
            vector(2, **arguments)
    for tokens in ([len(TOKENIZER)], [-1], ["the"]):
        with pytest.raises(ValueError, match="banned_tokens"):
            vector(2, banned_tokens=tokens)
    env = vector(2, banned_tokens=range(len(TOKENIZER)))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="leave out all"):
        env.action_masks()


def test_prefixes_by_fraction_are_cut_from_one_text_of_the_guide():
    asked = []

    def counted(requests):
        asked.extend(requests)
        return random_writer(requests)

    env = vector(6, guide=CallableGuide(counted), guidance=Guidance(restart_prob=1, restart_fraction=(0, 1)))
    lengths = set()
    for seed in range(0, 300, 6):
        observation, infos = env.reset(seed=seed)
        texts = env.guide_texts(infos["sample_id"])
        for row, text in enumerate(texts):
            length = infos["prefix_length"][row]
            assert observation["input_ids"][row, 8 : 8 + length].tolist() == text[:length]
            assert length < len(text), "a prefix never ends the text"
            lengths.add(length)
    assert lengths == set(range(HORIZON))
    assert len(asked) == len({request.prompt for request in asked}) <= len(ROWS), "each text is written once"
    assert all(request.max_new_tokens == HORIZON and not request.prefix_ids for request in asked)

    assert env.guide_tokens_written == sum(map(len, env.guide_texts(range(len(ROWS)))))
    # Another environment that is given the texts asks for none of them.
    asked.clear()
    heir = vector(6, guide=CallableGuide(counted))
    heir.keep_texts(pickle.loads(pickle.dumps(env.kept_texts())))
    assert heir.guide_texts(range(len(ROWS))) == env.guide_texts(range(len(ROWS)))
    assert (asked, heir.guide_tokens_written) == ([], 0)
    # Those of another guide are not taken for its own.
    puzzles = [
        ChainOfParitiesVectorEnv(1, length=4, guide_accuracy=accuracy, train_problems=8) for accuracy in (0.0, 1.0)
    ]
    wrong, right = (puzzle.guide_texts(range(8)) for puzzle in puzzles)
    puzzles[1].keep_texts(puzzles[0].kept_texts())
    assert puzzles[1].guide_texts(range(8)) == right != wrong

    # By the definition, each row with its own fraction; another environment sees the same texts.
    fractions = np.linspace(0, 1, 6)
    other = vector(6, guide=CallableGuide(random_writer))
    guidance = [{"restart_prob": 1, "restart_fraction": fraction} for fraction in fractions]
    _, infos = other.reset(seed=5, options={"index": 3, "guidance": guidance})
    (text,) = env.guide_texts([3])
    assert infos["prefix_length"].tolist() == [min(int(f * len(text) + 1e-9), len(text) - 1) for f in fractions]
    assert env.guide_texts([3], text_seed=1) == env.guide_texts([3], text_seed=1)
    assert any(env.guide_texts([i]) != env.guide_texts([i], text_seed=1) for i in range(len(ROWS)))
    # A fraction of a reference is a cut of it, too.
    references = vector(2, guide="references", guidance={"restart_prob": 1, "restart_fraction": 0.5})
    observation, infos = references.reset(seed=0)
    for row, (ids, length) in enumerate(
        zip(references.guide_texts(infos["sample_id"]), infos["prefix_length"], strict=True)
    ):
        assert length == len(ids) // 2
        assert observation["input_ids"][row, 8 : 8 + length].tolist() == ids[:length]


def test_idle_rows_have_no_sample_and_change_no_other_row():
    idle = np.array([True, True, False, False, True, True])
    plain, some = (vector(6, parking=True, autoreset_mode=AutoresetMode.DISABLED) for _ in range(2))
    plain.reset(seed=1, options={"group_size": 2})
    _, infos = some.reset(seed=1, options={"group_size": 2, "idle": idle})
    assert infos["sample_id"].tolist()[:2] == [-2, -2]
    assert (infos["sample_id"][2:4] >= 0).all()
    actions = np.full(6, EOS)
    _, rewards, _, _, _ = plain.step(actions)
    _, rested, terminations, _, ended = some.step(actions)
    assert terminations.tolist() == (~idle).tolist()
    assert rested[~idle].tolist() == rewards[~idle].tolist()
    assert not rested[idle].any()
    assert ended["_text"].tolist() == (~idle).tolist()
    for env in (plain, some):
        _observation, infos = env.reset()
        assert (infos["sample_id"] >= 0).all()
    with pytest.raises(ValueError, match=r"options\['idle'\] must be True for whole groups of group_size=2"):
        some.reset(options={"group_size": 2, "idle": np.arange(6) < 1})
