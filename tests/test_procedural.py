"""Puzzles: solutions earn 1, the verifiers are exact, the scripted guides are what they say, splits are disjoint."""

from __future__ import annotations

import copy
import itertools
import pickle
from dataclasses import fields
from fractions import Fraction

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from hypothesis import given, settings
from hypothesis import strategies as st

import textgym  # noqa: F401
from agents.environments import make_env, sibling_env
from textgym.guides.base import GuideRequest
from textgym.task import SPLITS
from textgym.tasks.countdown import Countdown
from textgym.tasks.parities import ChainOfParities
from textgym.tasks.procedural import Puzzle, ScriptedGuide
from textgym.tasks.star_graph import StarGraph

IDS = {
    "textgym/ChainOfParities-v0": {"length": 6, "train_length": (2, 3)},
    "textgym/Countdown-v0": {"search": True, "train_problems": 64},
    "textgym/StarGraph-v0": {"nodes": 20},
}
SMALL = {"train_problems": 12, "test_problems": 6}
PUZZLES = st.one_of(
    st.builds(
        ChainOfParities,
        length=st.integers(5, 8),
        train_length=st.none() | st.lists(st.integers(4, 9), min_size=1, max_size=3),
        copies_input=st.booleans(),
        fork=st.booleans(),
        **{name: st.just(count) for name, count in SMALL.items()},
        problem_seed=st.integers(0, 99),
    ),
    st.builds(
        Countdown,
        numbers=st.integers(2, 4),
        train_numbers=st.none() | st.just((2, 3)),
        max_value=st.integers(20, 60),
        search=st.booleans(),
        **{name: st.just(count) for name, count in SMALL.items()},
        problem_seed=st.integers(0, 99),
    ),
    st.builds(
        StarGraph,
        degree=st.integers(2, 4),
        path_length=st.sampled_from([2, 5, (3, 4)]),
        train_degree=st.none() | st.just((2, 3)),
        nodes=st.integers(17, 30),
        **{name: st.just(count) for name, count in SMALL.items()},
        problem_seed=st.integers(0, 99),
    ),
)


def score(puzzle, prompt, *texts):
    return puzzle.reward(prompts=[prompt] * len(texts), completions=texts, references=[()] * len(texts))


def continued(puzzle, prompt, prefix="", seeds=(0,), limit=100):
    requests = [GuideRequest(prompt, (), prefix, (), limit, seed) for seed in seeds]
    return [f"{prefix} {made.text}".strip() for made in ScriptedGuide(puzzle).complete(requests, None)]


@given(puzzle=PUZZLES, split=st.sampled_from(SPLITS), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_solutions_earn_one_and_the_guide_works_every_prefix_out(puzzle: Puzzle, split, seed):
    object.__setattr__(puzzle, "guide_accuracy", 1.0)
    rows = puzzle.rows(split).rows
    assert len(rows) == (12 if split == "train" else 6)
    vocabulary = set(puzzle.words)
    for row in rows[:4]:
        prompt, words = row["prompt"], row["solution"].split()
        assert {*prompt.split(), *words} <= vocabulary
        assert len(prompt.split()) <= puzzle.max_prompt_tokens
        assert len(words) < puzzle.max_new_tokens
        assert score(puzzle, prompt, row["solution"]) == [1]
        assert score(puzzle, "what is this", row["solution"]) == [0]
        for cut in range(len(words) + 1):
            (text,) = continued(puzzle, prompt, " ".join(words[:cut]), [seed])
            fork = getattr(puzzle, "fork", False) and not cut
            assert score(puzzle, prompt, text)[0] in ((0.5, 1) if fork else (1,)), (text, cut)
            assert len(text.split()) < puzzle.max_new_tokens


@given(puzzle=PUZZLES, data=st.data(), seed=st.integers(0, 2**62))
@settings(max_examples=60, deadline=None)
def test_a_guide_continues_anything_and_hangs_on_its_request_alone(puzzle: Puzzle, data, seed):
    prompts = [row["prompt"] for row in puzzle.rows("test").rows] + ["0", "what is this"]
    prefixes = st.lists(st.sampled_from(puzzle.words), max_size=12).map(" ".join)
    made = st.builds(
        GuideRequest, st.sampled_from(prompts), st.just(()), prefixes, st.just(()), st.integers(1, 30), st.just(seed)
    )
    requests, guide = data.draw(st.lists(made, max_size=5)), ScriptedGuide(puzzle)
    together = guide.complete(requests, None)
    assert [guide.complete([request], None)[0] for request in requests] == together
    assert pickle.loads(pickle.dumps(guide)).complete(requests, None) == together
    assert copy.deepcopy(guide).complete(requests, None) == together
    for request, completion in zip(requests, together, strict=True):
        words = completion.text.split()
        assert {*words} <= set(puzzle.words)
        assert len(words) + completion.finished <= request.max_new_tokens


@pytest.mark.parametrize(
    ("puzzle", "expected"),
    [
        (ChainOfParities(5, guide_accuracy=0.8), 0.8**5),
        (ChainOfParities(5, guide_accuracy=0.8, copies_input=True), 0.8**5),
        (ChainOfParities(5, guide_accuracy=0.8, fork=True), 0.8 * 0.5 + 0.2 * 0.8**5),
        (ChainOfParities(4, guide_accuracy=0.0), 0.0),
        (ChainOfParities(5, guide_accuracy=0.8, guide_links=3), 0.8**3 * 0.5**2),
        (StarGraph(3, 4, guide_accuracy=0.8), 0.8**3),
    ],
)
def test_the_guide_is_as_good_as_its_accuracy(puzzle, expected):
    prompt, count = puzzle.rows("test").rows[0]["prompt"], 4000
    mean = np.mean(score(puzzle, prompt, *continued(puzzle, prompt, seeds=range(count))))
    assert abs(mean - expected) <= 4 * np.sqrt(0.25 / count)


@pytest.mark.parametrize("search", [False, True])
def test_a_worse_guide_of_countdown_earns_less(search):
    means = []
    for accuracy in (0.0, 0.5, 0.9, 1.0):
        puzzle = Countdown(search=search, guide_accuracy=accuracy, test_problems=60)
        rows = puzzle.rows("test").rows
        texts = [continued(puzzle, row["prompt"], seeds=range(5)) for row in rows]
        means.append(np.mean([score(puzzle, row["prompt"], *some) for row, some in zip(rows, texts, strict=True)]))
    assert means == sorted(means)
    assert means[0] < 0.3
    assert means[-1] == 1


@pytest.mark.parametrize("copies_input", [False, True])
@pytest.mark.parametrize("fork", [False, True])
def test_one_wrong_bit_spoils_a_chain(copies_input, fork):
    puzzle = ChainOfParities(5, copies_input=copies_input, fork=fork)
    for row in puzzle.rows("test").rows:
        words = row["solution"].split()
        width = 3 if copies_input else 2
        for place in range(fork, len(words)):
            if (place - fork) % width:
                wrong = [*words]
                wrong[place] = "10"[int(wrong[place])]
                assert score(puzzle, row["prompt"], " ".join(wrong)) == [0]
        texts = (words[:-1], [*words, "0"], [*words[:-1], ":"], [])
        assert score(puzzle, row["prompt"], *map(" ".join, texts)) == [0] * 4
        x = row["prompt"][:-2]
        assert score(puzzle, row["prompt"], f"easy {x}", x, f"hard {x}", f"easy {x} 0") == [0.5 * fork, 0, 0, 0]


def test_chance_of_a_chain():
    """Of all texts of 2L bits 2^L are right: those of any Y."""
    puzzle = ChainOfParities(3, test_problems=3)
    for row in puzzle.rows("test").rows:
        texts = [" ".join(bits) for bits in itertools.product("01", repeat=6)]
        assert np.mean(score(puzzle, row["prompt"], *texts)) == 2**-3
    env = make_env("textgym/ChainOfParities-v0", num_envs=4000, length=3, guide=None)
    env.reset(seed=0)
    bits = np.random.default_rng(0).integers(1, 3, (6, 4000))
    for actions in [*bits, np.zeros(4000, np.int64)]:
        _, rewards, *_ = env.step(actions)
    assert abs(rewards.mean() - 2**-3) < 4 * np.sqrt(0.11 / 4000)


def evaluated(words, numbers):
    """A second reader of expressions: shunting-yard on words; None for what is no expression of these numbers."""
    left, values, signs, operand = [*numbers], [], [], True
    rank = {"+": 1, "-": 1, "*": 2, "/": 2}

    def apply():
        sign, b, a = signs.pop(), values.pop(), values.pop()
        values.append({"+": a + b, "-": a - b, "*": a * b}[sign] if sign != "/" else a / b)

    try:
        for word in words:
            if operand and word == "(":
                signs.append(word)
            elif operand and word.isdigit():
                left.remove(int(word))
                values.append(Fraction(int(word)))
                operand = False
            elif not operand and word == ")":
                while signs[-1] != "(":
                    apply()
                signs.pop()
            elif not operand and word in rank:
                while signs and signs[-1] != "(" and rank[signs[-1]] >= rank[word]:
                    apply()
                signs.append(word)
                operand = True
            else:
                return None
        if operand:
            return None
        while signs:
            if signs[-1] == "(":
                return None
            apply()
    except (ValueError, IndexError, ZeroDivisionError):
        return None
    return values[0]


@given(words=st.lists(st.sampled_from(["2", "3", "4", "+", "-", "*", "/", "(", ")"]), max_size=9), data=st.data())
@settings(max_examples=500, deadline=None)
def test_countdown_reads_as_an_independent_reader(words, data):
    if data.draw(st.booleans()):  # else hardly any would be an expression
        signs = data.draw(st.lists(st.sampled_from("+-*/"), min_size=2, max_size=2))
        a, b, c = data.draw(st.permutations("234"))
        words = data.draw(st.sampled_from([[a, signs[0], b, signs[1], c], [a, signs[0], "(", b, signs[1], c, ")"]]))
    value = evaluated(words, [2, 3, 4])
    target = int(value) if value is not None and value.denominator == 1 and value >= 0 else 7
    prompt = f"2 3 4 = {target} :"
    assert score(Countdown(), prompt, " ".join(words)) == [float(value == target)]
    assert score(Countdown(search=True), prompt, "=> " + " ".join(words)) == [float(value == target)]


HOSTILE = (
    "9**9**9", "9 ** 9", "__import__ ( 'os' )", "a", "(" * 90 + "9" + ")" * 9, "(" * 100_000 + "9", "\u0669", "\uff19",
    "9.0", "1_0", "--9", "+ 9", "09",
    "0x9", "9 if 9 else 9", "[ 9 ]", "9 , 9", "9 // 1", "9\x00", "9e0", "9 9", "", "9 / 0",
    "1" * 5000, "9 - 0", "9 == 9", "True", "9 # 1", "=> 9",
)  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_countdown_refuses_what_is_no_expression(text):
    assert score(Countdown(), "9 9 = 9 :", text, "9") == [0, 1]
    assert score(Countdown(search=True), "9 9 = 9 :", f"=> {text}", "=> 9", "9", "=> 9 => 9", "x => 9") == [
        0,
        1,
        0,
        0,
        1,
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (
            ChainOfParities(8),
            ChainOfParities(8, (2, 8), problem_seed=5, train_problems=60, copies_input=True, fork=True),
        ),
        (
            Countdown(2, train_problems=300, test_problems=60),
            Countdown(3, 2, problem_seed=5, train_problems=300, test_problems=60, search=True),
        ),
        (
            StarGraph(2, 2, nodes=6, train_problems=200),
            StarGraph((2, 3), 2, problem_seed=5, nodes=7, train_problems=200),
        ),
    ],
)
def test_a_problem_belongs_to_one_split(first, second):
    """Whatever seed, size and mix; and spaces so small that a split cannot be filled with distinct problems."""
    found = {split: {row["prompt"] for made in (first, second) for row in made.rows(split).rows} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not found[one] & found[other]
    assert first.rows("train").fingerprint == first.rows("train").fingerprint != second.rows("train").fingerprint


def test_a_mix_has_equal_shares_of_distinct_problems():
    puzzle = ChainOfParities(12, [2, 10, 11], train_problems=300, test_problems=5)
    rows = puzzle.rows("train").rows
    assert np.bincount([row["length"] for row in rows])[[2, 10, 11]].tolist() == [100] * 3
    assert len({row["prompt"] for row in rows if row["length"] > 2}) == 200
    assert {row["length"] for row in puzzle.rows("test").rows} == {12}
    assert (puzzle.max_prompt_tokens, puzzle.max_new_tokens) == (13, 25)
    assert len({row["prompt"] for row in puzzle.rows("test").rows}) == 5
    assert puzzle.words == ChainOfParities(2).words
    assert Countdown(4, (2, 3)).words == Countdown(2, search=True).words
    assert StarGraph(2, 3).words == StarGraph(5, 8).words
    with pytest.raises(ValueError, match=r"split '\w+' of parities has no problem with {'length': 1}"):
        [ChainOfParities(1).rows(split) for split in SPLITS]


@pytest.mark.parametrize("id", IDS)
def test_environments(id):
    arguments = IDS[id] | {"guidance": {"restart_prob": 0.5}, "guide_accuracy": 0.7}
    env = make_env(id, num_envs=3, **arguments)
    observation, infos = env.reset(seed=4)
    assert observation["input_ids"].shape == (3, env.puzzle.max_prompt_tokens + env.puzzle.max_new_tokens)
    for row in range(3):
        single = gym.make(id, **arguments)
        alone, info = single.reset(seed=4 + row)
        assert data_equivalence({key: value[row] for key, value in observation.items()}, alone, exact=True)
        assert info["prompt"] == infos["prompt"][row]
    sibling = sibling_env(env, num_envs=2, split="test")
    assert sibling.puzzle == env.puzzle
    assert sibling.guide is None
    pickle.loads(pickle.dumps(env))
    # JSON has no tuples.
    spec = gym.make(id, **arguments).spec
    assert gym.make(gym.envs.registration.EnvSpec.from_json(spec.to_json())).unwrapped.puzzle == env.puzzle
    # A long solution's room for a policy that is trained on short ones.
    assert gym.make(id, max_new_tokens=50).unwrapped.engine.max_new_tokens == 50
    with pytest.raises(
        ValueError, match=r"max_new_tokens must be None or an int >= \d+, room for every solution, got 2"
    ):
        gym.make(id, max_new_tokens=2)
    with pytest.raises(ValueError, match="max_prompt_tokens=3 is too small"):
        gym.make(id, max_prompt_tokens=3).reset(seed=0)
    page = single.unwrapped.__doc__
    sections = ("Description", "Rewards", "Arguments", "Action Space", "Observation Space", "Starting State", "Info")
    assert [page.count(f"\n{section}\n") for section in sections] == [1] * len(sections)
    for field in fields(env.puzzle):
        assert f"``{field.name}``" in page


@pytest.mark.parametrize("id", IDS)
def test_a_string_ends_the_texts_of_a_vocabulary_without_letters(id):
    whole, ended, never = (make_env(id, num_envs=32, parking=True, stop=stop) for stop in ([], ["1"], ["\n"]))
    words = sorted({*whole.tokenizer.get_vocab().values()} - {*whole.tokenizer.all_special_ids})
    actions = np.random.default_rng(0).choice(words, (whole.max_new_tokens, 32))
    texts = []
    for env in (whole, ended, never):
        env.reset(seed=0)
        found = np.full(32, None)
        for tokens in actions:
            *_, infos = env.step(tokens)  # rows that are parked ignore theirs
            found = np.where(infos.get("_text", False), infos.get("text"), found)
            if all(text is not None for text in found):
                break
        texts.append(found.tolist())
    assert texts[2] == texts[0]
    assert texts[1] == [text.split("1")[0] for text in texts[0]]
    assert any("1" in text for text in texts[0])


@pytest.mark.parametrize("make", [gym.make, gym.make_vec])
@pytest.mark.parametrize(
    ("id", "name", "meant"),
    [
        ("ChainOfParities", "train_lenght", "train_length"),
        ("Countdown", "serch", "search"),
        ("StarGraph", "degrees", "degree"),
        ("StarGraph", "horizon", "max_new_tokens"),
    ],
)
def test_a_wrong_argument_is_refused_with_the_one_that_was_meant(make, id, name, meant):
    with pytest.raises(TypeError, match=rf"\w+Env has no argument '{name}'; did you mean {meant}\?"):
        make(f"textgym/{id}-v0", **{name: 3})


@pytest.mark.parametrize(
    ("id", "arguments", "message"),
    [
        ("ChainOfParities", {"length": 0}, r"length must be an int >= 1 or a sequence of them, got 0"),
        ("ChainOfParities", {"train_length": ()}, r"train_length must be an int >= 1 or a sequence of them, got \(\)"),
        ("ChainOfParities", {"length": None}, "length must be an int >= 1"),
        ("ChainOfParities", {"fork": 1}, "fork must be one of"),
        ("ChainOfParities", {"guide_links": -1}, r"guide_links must be None or an int >= 0, got -1"),
        ("ChainOfParities", {"guide_accuracy": 1.5}, r"guide_accuracy must be a number in \[0, 1\], got 1.5"),
        ("ChainOfParities", {"train_problems": 0}, "train_problems must be an int >= 1, got 0"),
        ("Countdown", {"train_numbers": (2, 5)}, r"train_numbers must be at most 4, got \(2, 5\)"),
        ("Countdown", {"max_value": 10}, "max_value must be an int >= 20, got 10"),
        ("StarGraph", {"degree": 10, "path_length": 10}, "nodes must be >= 91, the nodes of the largest graph, got 50"),
    ],
)
def test_wrong_values_are_refused(id, arguments, message):
    with pytest.raises(ValueError, match=message):
        gym.make(f"textgym/{id}-v0", **arguments)
