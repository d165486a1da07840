"""Generators of reasoning-gym as tasks: sound splits, strict scores, and answers that no verifier may evaluate."""

from __future__ import annotations

import functools
import json
import os
import pickle
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest

import textgym
from agents.environments import make_env
from textgym.engine import TextVectorEnv
from textgym.reasoning_gym import _FORMULAS, _UNREADABLE, REFUSED, task

pytest.importorskip("reasoning_gym")

# Every category of reasoning-gym; those of NO_ANSWER have a verifier only.
ANSWERED = {
    **dict.fromkeys(
        ("complex_arithmetic", "polynomial_equations", "simple_equations", "simple_integration"), "algebra"
    ),
    **dict.fromkeys(("ab", "binary_matrix", "caesar_cipher", "number_sorting", "spell_backward"), "algorithmic"),
    **dict.fromkeys(("spiral_matrix", "string_insertion", "word_sorting"), "algorithmic"),
    **dict.fromkeys(("arc_1d", "rearc"), "arc"),
    **dict.fromkeys(("basic_arithmetic", "chain_sum", "fraction_simplification", "prime_factorization"), "arithmetic"),
    "bf": "code",
    **dict.fromkeys(("figlet_font", "needle_haystack"), "cognition"),
    **dict.fromkeys(("countdown", "mini_sudoku", "n_queens", "tower_of_hanoi"), "games"),
    "advanced_geometry": "geometry",
    **dict.fromkeys(("largest_island", "path_star", "shortest_path"), "graphs"),
    "acre": "induction",
    **dict.fromkeys(("knights_knaves", "syllogism"), "logic"),
    "coin_flip": "probability",
}
NO_ANSWER = ("boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour")
GENERATORS = [*ANSWERED, *NO_ANSWER]
SIZES = {"size": 8, "validation_size": 2, "test_size": 2}
SPLITS = ("train", "validation", "test")
# What a policy might write: nonsense, code, and numbers for which a machine works for ever.
HOSTILE = (
    "",
    "zzz ??",
    "__import__('os').system('touch HACKED')",
    "[open('HACKED', 'w')]",
    "(lambda: [open('HACKED', 'w')])()",
    "9**9**9**9",
    "((x+1)**99+C)**99",
    "9" * 4000,
    "1e999999999",
    "1e9,9,9,9,9,9",
    "U999999999",
    "A+999999999",
    "nan",
    "[NaN, NaN, NaN]",
    "nan+1j",
    "[" * 3000,
    "(" * 3000,
    "∧".join(["P"] * 1500),
    "\x00",
    "²",
)


def make(generator: str, **arguments) -> textgym.Task:
    if generator in NO_ANSWER:
        arguments["max_new_tokens"] = 8
    return task(generator, **SIZES, **arguments)


made_once = functools.cache(make)


def rows_of(made: textgym.Task) -> list[dict]:
    return [row for name in SPLITS for row in made.split(name, "mini").rows]


def score(made: textgym.Task, row: dict, text: str) -> float:
    return made.reward(prompts=[row["question"]], completions=[text], references=[()])[0]


@pytest.mark.parametrize("generator", GENERATORS)
def test_splits_are_disjoint_and_a_reference_is_right_and_hostile_answers_are_wrong_at_once(
    generator, tmp_path, monkeypatch
):
    made = made_once(generator)
    rows = rows_of(made)
    assert [len(made.split(name, "mini")) for name in SPLITS] == [8, 2, 2]
    assert len({row["question"] for row in rows}) == 12
    assert json.loads(json.dumps(rows)) == rows
    monkeypatch.chdir(tmp_path)
    for row in rows[:3]:
        if generator in ANSWERED:
            assert made.references_of(row) == (row["answer"],)
            assert score(made, row, f" {row['answer']}\n") == 1
        else:
            assert made.references_of(row) == ()
        for text in HOSTILE:
            start = time.perf_counter()
            # Without a number in it, a text is the right answer to an equation without a solution.
            assert score(made, row, text) == 0 or row["answer"] == "", text
            assert time.perf_counter() - start < 1, text
    assert not (tmp_path / "HACKED").exists()


@pytest.mark.parametrize("generator", ANSWERED)
def test_an_episode_with_the_reference_earns_one(generator):
    env = TextVectorEnv(task=made_once(generator), num_envs=2, split="test")
    _, infos = env.reset(seed=0, options={"index": [0, 1], "prefix": [row["answer"] for row in env.data.rows]})
    assert infos["prompt"].tolist() == [row["question"] for row in env.data.rows]
    _, rewards, ended, _, _ = env.step(np.full(2, env.tokenizer.eos_token_id))
    assert ended.all()
    assert rewards.tolist() == [1, 1]


def test_the_same_seed_gives_the_same_rows_in_another_process():
    program = (
        "import json, sys; from textgym.reasoning_gym import task; generators, sizes = json.loads(sys.argv[1]); "
        "made = {name: task(name, **sizes, max_prompt_tokens=1, max_new_tokens=1) for name in generators}; "
        "print(json.dumps({name: [made[name].split(split, 'mini').fingerprint for split in "
        "('train', 'validation', 'test')] for name in generators}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps([GENERATORS, SIZES])],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = {name: [made_once(name).split(split, "mini").fingerprint for split in SPLITS] for name in GENERATORS}
    assert json.loads(done.stdout) == expected


def test_other_seeds_and_sizes_never_move_a_question_to_another_split():
    tasks = [task("aiw", size=size, validation_size=3, test_size=3, seed=size) for size in (8, 16, 32)]
    found = {name: {row["question"] for made in tasks for row in made.split(name, "mini").rows} for name in SPLITS}
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]
    other, same = (make("chain_sum", seed=seed).split("train", "mini").rows for seed in (1, 0))
    assert not {row["question"] for row in other} & {row["question"] for row in same}
    assert same == made_once("chain_sum").split("train", "mini").rows


def test_partial_credit_is_the_verifiers_where_asked_for():
    strict, partial = made_once("chain_sum"), make("chain_sum", partial_credit=True)
    row = rows_of(strict)[0]
    text = f"I say {row['answer']}."
    assert score(strict, row, text) == 0
    assert score(partial, row, text) == pytest.approx(len(row["answer"]) / len(text))
    assert strict.reward.fingerprint != partial.reward.fingerprint


def test_answers_that_are_no_formula_or_no_arithmetic_never_reach_sympy(monkeypatch):
    read = []
    for generator in ("countdown", *_FORMULAS):
        made = make(generator, max_prompt_tokens=1, max_new_tokens=1)
        row = rows_of(made)[0]
        monkeypatch.setattr(made.reward._dataset, "score_answer", lambda answer, entry: read.append(answer) or 1.0)
        for text in (
            "x.__class__",
            "f(x)",
            "Integral(x, x)",
            "9**9**9",
            "(x**99)**99",
            "x if x else x",
            "y",
            "1" * 201,
        ):
            assert score(made, row, text) == 0
        variable = made.reward._drawn[1][row["question"]]["metadata"].get("variable", "1")
        for text in ("(1 + 2)*3 - 4/5", f"-{variable} + 2/3"):
            assert score(made, row, text) == 1
        if generator in _FORMULAS:
            assert score(made, row, f"sin(3*{variable})*(2*{variable} + 1)**(-3/2)/7 + 0.5 + C") == 1
    assert len(read) == 8


def test_a_generator_with_too_few_questions_is_an_error_and_not_a_wait():
    with pytest.raises(ValueError, match=r"size.* must be at most what generator 'coin_flip' has.*distinct questions"):
        task("coin_flip", **SIZES, min_trials=3, max_trials=3)


def test_wrong_arguments_are_named():
    for name, reason in REFUSED.items():
        with pytest.raises(ValueError, match=f"generator must be one whose task is sound, got '{name}'") as error:
            task(name)
        assert reason in str(error.value)
    with pytest.raises(ValueError, match="generator must be one of"):
        task("tic_tac_toe")
    with pytest.raises(TypeError, match="has no argument 'numbers'"):
        task("countdown", numbers=3)
    with pytest.raises(ValueError, match="config must be valid for generator 'countdown'"):
        task("countdown", min_numbers=0)
    with pytest.raises(ValueError, match="size must be an int >= 1, got 0"):
        task("countdown", size=0)
    with pytest.raises(ValueError, match="max_new_tokens must be given"):
        task("rush_hour", **SIZES)
    with pytest.raises(ValueError, match="prompts must be questions of the task"):
        made_once("ab").reward(prompts=["What?"], completions=["No"], references=[()])
    assert {*_UNREADABLE} <= {*GENERATORS, "intermediate_integration"}


def test_without_the_package_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("textgym.packages.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "textgym\[reasoning\]"'):
        task("countdown")


def test_a_task_is_registered_and_travels_to_other_processes():
    made = made_once("countdown")
    copied = pickle.loads(pickle.dumps(made))
    row = rows_of(made)[0]
    assert score(copied, row, row["answer"]) == 1
    textgym.register("test/ReasoningCountdown-v0", made)
    try:
        env = make_env("test/ReasoningCountdown-v0", num_envs=2)
        env.reset(seed=0)
        env = gym.make("test/ReasoningCountdown-v0")
        env.reset(seed=0)
        *_, info = env.step(env.unwrapped.tokenizer.eos_token_id)
        assert info["finish_reason"] == "stop"
    finally:
        del gym.registry["test/ReasoningCountdown-v0"]
