"""What every door accepts (docs/contracts.md): right readings, and an error that names the argument for all else."""

from __future__ import annotations

import math
import re

import gymnasium as gym
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ENV_ID, HORIZON, PROMPT_TOKENS

import textgym
from agents import PPO, SL, CausalLMPolicy, evaluate
from textgym import Guidance, Task
from textgym.decoding import Decoding
from textgym.engine import TextVectorEnv
from textgym.env import TextEnv
from textgym.models import resolve_device
from textgym.tokenization import encode_continuations, word_tokenizer

NAN, INF = math.nan, math.inf
ROWS = [{"ask": f"{word} sun", "answer": f"{word} moon"} for word in ("red", "green", "blue")]


def length(*, prompts, completions, references):
    return [float(len(text)) for text in completions]


def task(**changes):
    plain = {"name": "w", "data": ROWS, "prompt": "{ask}", "references": "answer", "reward": length}
    return Task(**{**plain, "max_prompt_tokens": 8, "max_new_tokens": 6, **changes})


def table(doors):
    """A case for each value that a door refuses, with what the error must say (the door's name, unless said)."""
    for door, values in doors.items():
        name, _, says = door.partition(": ")
        for value in values:
            shown = re.sub(" at 0x[0-9a-f]+", "", repr(value))[:40]  # the same in every process
            yield pytest.param(name, value, re.compile(says or rf"\b{re.escape(name)}\b"), id=f"{name}={shown}")


def cases(doors):
    return pytest.mark.parametrize(("name", "value", "says"), [*table(doors)])


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    def nothing_there(path, *_, **__):
        raise OSError(f"{path} is nowhere")

    monkeypatch.setattr("textgym.hub.cached_file", nothing_there)


# Environments

NOT_ONE_OF_TWO = [5, "yes", None, 1.0]
NOT_COUNTS = [0, -1, 1.5, True, "6", NAN, [4]]
MAKE = {
    "split": ["trian", 5, None, "TRAIN"],
    "source": ["nowhere/at/all", 5, b"mini", ["mini"]],
    "tokenizer": [5, b"gpt2", ["gpt2"], "./nowhere"],
    "max_prompt_tokens": NOT_COUNTS,
    "max_new_tokens": [*NOT_COUNTS, 10**13],
    "max_new_tokens: GiB of memory, and .* are free": [10**13],
    "truncation_side": ["middle", 5],
    "template": ["no place", "{prompt}{prompt}", "{prompt} {x}", None, 5, "{}"],
    "chat": [*NOT_ONE_OF_TWO, True],
    "stop": ["x", 5, None, [5], [""], [None], b"x"],
    "reward": [5, "", "nosuch", "./nowhere", "a/b/c", ["length"], lambda: 1, lambda texts: 1, lambda p, c, r: 1],
    "guide": [5, "", "./nowhere", "a/b/c", "refrences", ["references"]],
    "guidance": [5, "x", [1], {"restart": 1}, {"restart_prob": 1}],
    "handoff": [*NOT_ONE_OF_TWO, True],
    "handoff_cost": [NAN, INF, -1, "1", None],
    "min_new_tokens": [99, -1, 1.5, "2"],
    "banned_tokens": [5, "12", [10**9], [-1], [1.5], ["a"], None],
    "order": ["shuffled", 5],
    "render_mode": ["rgb_array", "x"],
    "num_envs": [4],
    "nosuch": [1],
}
MAKE_VECTOR = {
    "num_envs": [*NOT_COUNTS, 10**12],
    "parking": NOT_ONE_OF_TWO,
    "copy": NOT_ONE_OF_TWO,
    "autoreset_mode": ["x", 5],
}


@pytest.mark.filterwarnings("ignore:.*render_mode")
@cases(MAKE)
def test_arguments_of_an_environment(name, value, says):
    with pytest.raises((ValueError, TypeError), match=says):
        gym.make(ENV_ID, **{name: value})


@cases(MAKE_VECTOR)
def test_arguments_of_a_vector_environment(name, value, says):
    with pytest.raises(ValueError, match=says):
        TextVectorEnv(task=task(), **{"num_envs": 2, name: value})


NOT_SHARES = [2, -0.1, "a", NAN, True, [0.5]]
GUIDANCE = {
    "restart_prob": NOT_SHARES,
    "handoff_prob": NOT_SHARES,
    "no_body_prob": NOT_SHARES,
    "restart_length": [-1, 1.5, (3, 1), "2", (1, 2, 3)],
    "restart_fraction": [-1, 2, "a", (0.9, 0.1)],
    "handoff_length": [-1, 1.5, (3, 1), "2"],
    "handoff_rate": [0, 2, "a", NAN],
    "handoff_entropy": [0, -1, "a", NAN],
    "handoff_tokens": [0, 1.5, "2"],
    "text_seed": [-1, 1.5, "a"],
}


@cases(GUIDANCE)
def test_guidance(name, value, says):
    with pytest.raises(ValueError, match=says):
        Guidance(**{name: value})


# Tasks and data

TASK = {
    "data": [None, 5, "abc", [1, 2], ["red"], {"train": 5}, {"train": [None]}],
    "data: has no samples": [[]],
    "data: split must be": [{"test": ROWS}],
    "prompt": ["{}", "{0}", "{ask", 5, None, ("a", "b"), lambda row: None, lambda row: 5, lambda row: ("a", "b")],
    "prompt: column 'asks'.*\\['answer', 'ask'\\]": ["{asks}", "{asks[0]}", "{ask} {asks}"],
    "prompt: needs text or a number": ["{ask.__class__}", "{ask.__class__.__mro__}", "{ask[x]}"],
    "references": ["answers", 5, None, lambda row: 5, lambda row: [5]],
    "reward": [None, 5, "nope", lambda: 1],
    "max_prompt_tokens": NOT_COUNTS,
    "max_new_tokens": NOT_COUNTS,
    "truncation_side": ["x", None],
    "metrics": [("nope",), "rouge"],
    "name": [5, "", "a/b", "../x", "a\nb", "x" * 300, ".hidden"],
}
ROW = {
    "ask: null": [None, NAN, np.float64("nan")],
    "ask: needs text or a number": [["red"], [{"role": "user", "content": "red"}], {"a": 1}, b"red", (1, 2)],
    "ask: prompt": ["", "a\ud800"],
    "answer: references": [5, [5], b"moon", [["moon"]], NAN],
}


@cases(TASK)
def test_arguments_of_a_task(name, value, says):
    with pytest.raises(ValueError, match=says):
        TextEnv(task=task(**{name: value}))


@cases(ROW)
def test_rows_of_a_task(name, value, says):
    with pytest.raises(ValueError, match=says):
        TextEnv(task=task(data=[{**ROWS[0], name: value}])).reset(seed=0)


def test_what_rows_may_hold():
    row = {"ask": 7, "answer": ["moon", None]}
    _, info = TextEnv(task=task(data=[row])).reset(seed=0)
    assert (info["prompt"], info["references"]) == ("7", ("moon",))
    row = {"ask": "sun", "turns": ["a", "b"], "answer": None}
    _, info = TextEnv(task=task(data=[row], prompt="{ask} {turns[1]} {turns!r}", max_prompt_tokens=20)).reset(seed=0)
    assert (info["prompt"], info["references"]) == ("sun b ['a', 'b']", ())
    with pytest.raises(ValueError, match="task must be"):
        textgym.register("test/Dict-v0", {"name": "x"})


REVIEWS = {"text": [f"a fine film number {i} with many words" for i in range(60)], "label": [i % 2 for i in range(60)]}
SETS = {"concept_set_idx": [0, 0, 1], "concepts": [["dog", "run"]] * 2 + [["cat"]], "target": ["A dog runs."] * 3}
POSTS = {"subreddit": ["a"] * 9, "title": ["t"] * 9, "post": [f"post {i}" for i in range(9)], "summary": ["s"] * 9}
FILES = {
    "imdb: text": [
        [None, *REVIEWS["text"][1:]],
        [None] * 60,
        [1] * 60,
        [b"\xff\xfe"] * 60,
        ["\xe9".encode("latin1")] * 60,
    ],
    "imdb: label": [[None] * 60, [-1, 1] * 30, [0, 1, 2] * 20, ["pos", "neg"] * 30, [0.5] * 60, [True] * 60],
    "commongen: concepts": [["dog run"] * 3, [None] * 3, [[], ["a"], ["b"]], [["a"], [None], ["b"]], [[1]] * 3],
    "commongen: target": [[1] * 3, [["A dog runs."]] * 3],
    "commongen: concept_set_idx": [["a"] * 3, [None] * 3],
    "tldr: title": [[None] * 9, [1] * 9],
    "tldr: post": [[None] * 9, [["p"]] * 9],
    "tldr: subreddit": [[None] * 9],
    "tldr: summary": [[1] * 9],
}


@cases(FILES)
def test_columns_of_files(name, value, says, tmp_path):
    good = {"imdb": REVIEWS, "commongen": SETS, "tldr": POSTS}[name]
    columns = pa.table({**good, says.pattern: pa.array(value)})
    (tmp_path / name).mkdir()
    for file in ("train", "validation", "test"):
        pq.write_table(columns, tmp_path / name / f"{file}.parquet")
    env = {"imdb": "IMDB", "commongen": "CommonGen", "tldr": "TLDR"}[name]
    with pytest.raises(ValueError, match=rf"{re.escape(str(tmp_path))}.* in column '{says.pattern}'"):
        gym.make(f"textgym/{env}-v0", source=tmp_path)


def test_utf8_is_checked_where_arrow_did_not(tmp_path):
    bad = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 3, 5], np.int32)), pa.py_buffer(b"\xff\xfe\x80ok"))
    (tmp_path / "imdb").mkdir()
    for file in ("train", "validation", "test"):
        pq.write_table(pa.table({"text": bad, "label": [0, 1]}), tmp_path / "imdb" / f"{file}.parquet")
    with pytest.raises(ValueError, match="UTF-8 in column 'text'"):
        gym.make("textgym/IMDB-v0", source=tmp_path)


# Names of special tokens are letters, but in templates.


def test_names_of_special_tokens_in_data_are_letters(words_tokenizer):
    eos, name = words_tokenizer.eos_token_id, words_tokenizer.eos_token
    prompt = f"red {name} sun"
    env = TextEnv(
        task=task(data=[{"ask": prompt, "answer": f"moon {name} sea"}], max_prompt_tokens=24), tokenizer=words_tokenizer
    )
    for options in ({}, {"prompt": prompt}, {"prefix": name[:3]}):
        observation, info = env.reset(seed=0, options=options)
        assert info["prompt"] == prompt
        ids = observation["input_ids"][observation["attention_mask"] > 0]
        assert eos not in ids
        assert words_tokenizer.decode(ids).startswith(prompt)
    assert eos not in encode_continuations(words_tokenizer, 2 * ["red"], [f"sun {name}", "sea"])[0]
    framed = TextEnv(task=env.task, tokenizer=words_tokenizer, template=f"{name}{{prompt}}{name}", max_prompt_tokens=40)
    observation, info = framed.reset(seed=0)
    ids = observation["input_ids"][observation["attention_mask"] > 0].tolist()
    assert info["prompt"] == prompt
    assert (ids[0], ids[-1], ids.count(eos)) == (eos, eos, 2)
    short = TextEnv(task=env.task, tokenizer=words_tokenizer, template=f"{name}{{prompt}}{name}", max_prompt_tokens=9)
    observation, _ = short.reset(seed=0)
    ids = observation["input_ids"][observation["attention_mask"] > 0].tolist()
    assert (len(ids), ids[0], ids[-1], ids.count(eos)) == (9, eos, eos, 2)
    # Every word of such a tokenizer is a token: there are no letters to read the name as.
    with pytest.raises(ValueError, match="a prompt must not hold"):
        TextEnv(task=env.task, tokenizer=word_tokenizer(["red", "sun"])).reset(seed=0)


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff"])
def test_halves_of_characters_are_no_text(text):
    env = TextEnv(task=task())
    for option in ("prompt", "prefix"):
        with pytest.raises(ValueError, match=option):
            env.reset(seed=0, options={option: text})


# Rewards

REWARDS = {
    "number": [
        NAN,
        INF,
        -INF,
        None,
        "good",
        "1.5",
        b"1",
        1 + 2j,
        [1.0],
        np.datetime64("2020-01-01"),
        np.timedelta64(5, "m"),
    ],
}


@cases(REWARDS)
def test_a_reward_of_another_kind(name, value, says):
    env = TextEnv(task=task(reward=lambda prompts, completions, references: [value] * len(completions)))
    with pytest.raises(ValueError, match=r"reward must return (1|finite) numbers"):
        play(env)


WHOLE = {
    "reward": [
        None, 1.0, "1", [], [1.0, 2.0], [[1.0]], {}, {"a": [1.0, 2.0]}, {"a": ["1"]}, {"a": [1e308], "b": [1e308]},
        {"a": [1.0], "b": [NAN]}, {"a": [1.0], "b": None}, np.array(["1"]), np.array([5], "m8[s]"),
        np.array(["2020-01-01"], "M8[s]"), torch.ones(1, requires_grad=True), (1.0 for _ in range(1)),
    ]
}  # fmt: skip


@cases(WHOLE)
def test_rewards_of_a_batch(name, value, says):
    env = TextEnv(task=task(reward=lambda prompts, completions, references: value))
    with pytest.raises(ValueError, match=r"reward must (return|have)"):
        play(env)


@pytest.mark.parametrize("value", [True, 1, np.float32(1), torch.ones(()), np.array(1.0, object)])
def test_what_is_a_number(value):
    def clearing(prompts, completions, references):
        result = [value] * len(completions)
        prompts.clear(), completions.clear(), references.clear()
        return result

    assert play(TextEnv(task=task(reward=clearing))) == 1


def play(env):
    env.reset(seed=0)
    while True:
        _, reward, ended, _, info = env.step(5)
        if ended:
            assert isinstance(info["text"], str)
            return reward


# Resets and steps

RESET = {
    "options": [5, [("index", 1)], "index"],
    "nosuch": [1],
    "index": [-1, 10**9, "0", 1.5, True, [1, 2]],
    "prompt": [5, b"red", "", ["a", "b"]],
    "references": [["x"], 5],
    "prefix": [5, [10**9], [-1], [0], [1.5], ["a"], b"red", "red " * 50, {"a": 1}],
    "guidance": [5, {"x": 1}, {"restart_prob": 1}],
    "reset_mask": [[True]],
    "group_size": [2],
    "idle": [[True]],
}
VECTOR_RESET = {
    "index": [[1, 2], [1, 2, "3"], "0"],
    "prompt": [["a", "b"], [1, 2, 3]],
    "prefix": [["a"], ["a", "b", 5], ["a", "b", [1.5]], ["a", "b", b"c"]],
    "guidance": [[None], [1, 2, 3]],
    "reset_mask": [np.zeros(3, bool), [1, 0, 1], [True], "all"],
    "idle": [[1, 0, 1], [True]],
    "group_size": [2, 0, "a", 1.5],
}
SEEDS = {"seed": [-1, "a", 1.5, 2**70, [1, 2], [1, 2, "a"], [1, 2, -3], [1, 2, 1.5], [1, 2, True], b"abc", {1: 2}]}


@cases(RESET)
def test_options_of_a_reset(name, value, says):
    options = value if name == "options" else {name: value}
    with pytest.raises(ValueError, match=says):
        TextEnv(task=task()).reset(seed=0, options=options)


@pytest.mark.parametrize("references", ["x", [5], [None], 5])
def test_references_beside_a_prompt(references):
    with pytest.raises(ValueError, match="references"):
        TextEnv(task=task()).reset(seed=0, options={"prompt": "red", "references": references})


@cases(VECTOR_RESET)
def test_options_of_a_vector_reset(name, value, says):
    with pytest.raises(ValueError, match=says):
        TextVectorEnv(3, task=task()).reset(seed=0, options={name: value})


@cases(SEEDS)
def test_seeds(name, value, says):
    env = TextVectorEnv(3, task=task())
    with pytest.raises((ValueError, gym.error.Error), match=r"(?i)seed"):
        env.reset(seed=value)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(3, int))


ACTIONS = {
    "action": [-1, 10**9, 2**63, 1.5, "a", None, True, [1, 2], [], {}, NAN, b"1", 1 + 0j, np.float32(3), np.int8(-1)],
}
VECTOR_ACTIONS = {
    "actions": [
        5, [1, 2], [1, 2, 3, 4], [1.0, 2.0, 3.0], ["1", "2", "3"], [[1], [2], [3]], [True] * 3, [None] * 3, [1, 2, -1],
        [1, 2, 10**9], np.array([1, 2, 2**63], np.uint64), np.array([1, 2, -1], np.int8),
    ]
}  # fmt: skip


@cases(ACTIONS)
def test_actions(name, value, says):
    env = TextEnv(task=task())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=name):
        env.step(value)


@cases(VECTOR_ACTIONS)
def test_actions_of_rows(name, value, says):
    env = TextVectorEnv(3, task=task())
    env.reset(seed=0)
    with pytest.raises(ValueError, match=name):
        env.step(value)


def test_actions_of_any_type_of_integers():
    env = TextVectorEnv(3, task=task())
    env.reset(seed=0)
    for kind in (np.int8, np.uint8, np.int32, np.uint64):
        env.step(np.array([5, 6, 7], kind))


def test_control_characters_are_shown_and_not_obeyed(words_tokenizer):
    hostile = "red\x1b]0;title\x07\x9b31m\r\u202esun"
    env = TextEnv(task=task(max_prompt_tokens=40), tokenizer=words_tokenizer, render_mode="ansi")
    env.reset(seed=0, options={"prompt": hostile, "prefix": "\x1b[2J"})
    frame = re.sub(r"\x1b\[\d+m", "", env.render())
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", frame)
    assert "\\x1b]0;title\\x07\\x9b31m\\r\\u202esun" in frame


# Algorithms

NOT_POSITIVE = [0, -1, "8", True, None]
ALGORITHM = {
    "episodes_per_iteration": [*NOT_POSITIVE, 2.5, 3],
    "minibatch_size": [*NOT_POSITIVE, 2.5],
    "n_epochs": [*NOT_POSITIVE, 2.5],
    "learning_rate": [0, -1, NAN, INF, "1e-4"],
    "kl_coef": [-1, NAN, "a"],
    "gamma": [2, -1, NAN],
    "gae_lambda": [2, -1, NAN],
    "clip_range": [-1, NAN, 0],
    "vf_coef": [-1, NAN],
    "max_grad_norm": [0, -1, NAN],
    "seed": [-1, "a", 1.5],
    "eval_every": [-1, 1.5],
    "eval_prompts": [0, -1],
    "device": ["nosuch", 5, "cuda:99"],
    "decoding": ["x", 5, {"top_k": 5}],
    "env": [5, None],
    "policy": [5, None, "./nowhere"],
    "nosuch": [1],
}


@cases(ALGORITHM)
def test_arguments_of_an_algorithm(name, value, says, make_env, make_policy):
    if (name, value) == ("policy", "./nowhere"):
        says = re.compile("model './nowhere' must be a hub id or a folder")
    arguments = {"policy": make_policy(), "env": make_env(8), "episodes_per_iteration": 8, "device": "cpu"}
    with pytest.raises((ValueError, TypeError), match=says):
        PPO(**{**arguments, name: value})


@pytest.mark.parametrize(
    "total",
    [
        {},
        {"total_timesteps": 5, "total_episodes": 5},
        *({"total_episodes": v} for v in (0, -5, "8", NAN)),
        {"total_episodes": 8, "callback": 5},
    ],
)
def test_arguments_of_learn(total, make_env, make_policy):
    agent = PPO(make_policy(), make_env(8), episodes_per_iteration=8, device="cpu")
    with pytest.raises(ValueError, match=r"total_|callback"):
        agent.learn(**total)
    assert agent.iteration == 0


EVALUATE = {
    "num_prompts": [0, -1, 1.5, "5"],
    "num_envs": [0, 1.5],
    "best_of": [0, "2"],
    "samples_per_prompt": [0, 1.5],
    "metrics": [["nope"], "rouge"],
    "split": ["nope"],
    "seed": [-1, "a", 1.5],
    "nosuch": [1],
    "handoff": [True],
    "env": [5, None],
    "agent": [5, None, "gpt2"],
}


@cases(EVALUATE)
def test_arguments_of_evaluate(name, value, says, make_policy):
    with pytest.raises((ValueError, TypeError), match=says):
        evaluate(**{"agent": make_policy(), "env": ENV_ID, name: value})


GENERATE = {
    "prompts": ["red sun", b"red", 5, [5], [None], ["red", b"sun"], [""]],
    "max_new_tokens": [0, -1, 1.5, "3", None],
    "max_new_tokens: positions": [99],
}


@cases(GENERATE)
def test_arguments_of_generate(name, value, says, make_policy):
    says = re.compile("prompt") if name == "prompts" else says
    with pytest.raises(ValueError, match=says):
        make_policy().generate(**{"prompts": ["red"], "max_new_tokens": 3, name: value})


DECODING = {
    "temperature": [0, -1, NAN, INF, "1"],
    "top_p": [0, 2, NAN, "1"],
    "top_k": [-1, 1.5, "1", True],
    "num_beams": [0, 1.5, "2"],
    "min_new_tokens": [-1, 1.5],
    "greedy": [1, "yes"],
}


@cases(DECODING)
def test_decoding(name, value, says):
    with pytest.raises(ValueError, match=says):
        Decoding(**{name: value})


def test_texts_that_are_too_long_for_the_policy_are_refused_at_once(make_env, make_policy):
    policy = make_policy()
    assert policy.model.config.max_position_embeddings == PROMPT_TOKENS + HORIZON
    long = make_env(8, max_prompt_tokens=PROMPT_TOKENS + 1)
    for use in (
        lambda: PPO(policy, long, episodes_per_iteration=8, device="cpu"),
        lambda: SL(policy, long, device="cpu"),
        lambda: evaluate(policy, long),
    ):
        with pytest.raises(ValueError, match=r"15 tokens long, but .* has 14 positions: lower max_prompt_tokens"):
            use()


def test_weights_that_are_not_finite_are_named(make_policy):
    policy = make_policy()
    policy.model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = NAN
    copied = type(policy.model)(policy.model.config)
    copied.load_state_dict(policy.model.state_dict())
    with pytest.raises(
        ValueError, match=r"finite weights; GPT2LMHeadModel has none in transformer.h.0.mlp.c_fc.weight"
    ):
        CausalLMPolicy(copied, policy.tokenizer)


def test_devices_that_are_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"device must be .*no CUDA device"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("cuda:1").index == 1
    with pytest.raises(ValueError, match="one of 2 CUDA devices"):
        resolve_device("cuda:2")


def test_the_page_says_of_every_door_what_it_accepts():
    page = (textgym.__path__[0] + "/../docs/contracts.md").replace("//", "/")
    text = open(page, encoding="utf-8").read()  # noqa: SIM115
    doors = {**MAKE, **MAKE_VECTOR, **GUIDANCE, **TASK, **RESET, **VECTOR_RESET, **EVALUATE, **GENERATE, **DECODING}
    names = {door.partition(": ")[0] for door in doors} - {"nosuch", "options"}
    assert {name for name in names if f"`{name}`" not in text} == set()
