"""Runs that finish, resume and fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plugins import MICRO
from test_algorithms import guide_of

from agents import ALGORITHMS, CausalLMPolicy
from agents.evaluation import make_env
from benchmarks import run_all
from benchmarks.comparison import schedule, warm_start
from benchmarks.comparison.about import about
from benchmarks.comparison.jobs import Run
from benchmarks.comparison.results import read_results
from benchmarks.comparison.runner import Benchmark, spread
from benchmarks.comparison.warm_start import load_policy
from benchmarks.profiles import Row, load_profile
from textgym import Task, register


@pytest.fixture
def micro(monkeypatch, tmp_path):
    monkeypatch.setenv("TEXTGYM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("benchmarks.profiles.load_profile", lambda name: MICRO)
    return tmp_path / "runs"


def test_runs_finish_are_reported_and_are_not_run_again(micro, monkeypatch, capsys):
    assert run_all.run_all(seeds=2, out=micro) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(micro / "report.html")
    records = read_results(micro)
    assert {(record["algo"], record["seed"]) for record in records} == {
        (algo, seed) for algo in ("sl", "ppo", "ppo++") for seed in (0, 1)
    }
    for record in records:
        same = [other for other in records if other["seed"] == record["seed"]]
        assert all(record["evaluation"]["sample_ids"] == other["evaluation"]["sample_ids"] for other in same)
        assert all(record["evaluation"]["seed"] == other["evaluation"]["seed"] for other in same)
        assert record["final_reward"] == pytest.approx(np.mean(record["evaluation"]["rewards"]))
        assert record["fingerprints"] == records[0]["fingerprints"]
        assert len(record["evaluation"]["rewards"]) == 12
        assert record["metrics"]["perplexity"] > 1
        assert (record["guide_tokens"] > 0) == (record["algo"] == "ppo++")
        assert record["guide_usage"] is None
        if record["algo"] != "sl":
            assert record["episodes"] == 16
            assert len(record["history"]) == 2
    assert any(author == "guide" for run in records for text in run["rollouts"] for author, _ in text["segments"])

    results = (micro / "results.jsonl").read_bytes()
    monkeypatch.setattr(schedule, "_start", lambda *_: pytest.fail("a finished run was run again"))
    assert run_all.run_all(seeds=2, out=micro) == 0
    assert (micro / "results.jsonl").read_bytes() == results


def test_the_start_policy_is_evaluated_as_those_that_learn_from_it(micro):
    benchmark = Benchmark(MICRO, None, None, micro)
    records = {algo: benchmark.run(Run("words", algo, 0), lambda *_: None) for algo in ("sl", "best-of-2", "guide")}
    assert ["validation_reward" in record for record in records.values()] == [True, False, False]
    run = Run("words", "ppo", 0)
    job, start = benchmark.job(run), benchmark.warm_start("words", lambda *_: None)
    env = make_env(job.task.env_id, num_envs=8, source="mini", tokenizer=start.supervised)
    untrained = benchmark.begin(job, benchmark.folder(run), start, env, 0)
    assert untrained.evaluate().reward == records["sl"]["validation_reward"]


def test_what_a_task_asks_for_and_pays_is_in_its_environments_page():
    said = about("textgym/StarGraph-v0")
    assert said.startswith(
        "Find the path from the centre of a star to a leaf. Reward: zero until the episode ends; then 1"
    )
    assert "handoff_cost" not in said

    def reward(*, prompts, completions, references):
        """The share of words that are *good*, from 0 to 1.

        More is not said.
        """
        return [0.0] * len(completions)

    for name, function, expected in (
        ("Own", reward, "Reward: the share of words that are *good*, from 0 to 1."),
        ("Silent", lambda *, prompts, completions, references: [0.0] * len(completions), ""),
    ):
        register(f"test/{name}-v0", Task("own", [{"a": "b"}], "{a}", "a", 4, 4, function))
        assert about(f"test_benchmarks:test/{name}-v0") == expected


def test_every_row_runs_and_says_what_it_is(micro, capsys):
    assert run_all.run_all(algos="all", out=micro) == 0
    printed = capsys.readouterr().out.splitlines()
    records = {record["algo"]: record for record in read_results(micro)}
    assert list(records) == MICRO.rows
    for name, record in records.items():
        row = MICRO.tasks["words"].rows[name]
        chosen = record["hyperparameters"]
        assert record["place"] == MICRO.rows.index(name)
        assert (chosen["algorithm"], chosen["best_of"], chosen["env"]) == (row.algorithm, row.best_of, dict(row.env))
        assert {key: chosen[key] for key in row.arguments} == dict(row.arguments)
        assert record["evaluation"]["sample_ids"] == records["sl"]["evaluation"]["sample_ids"]
        if row.algorithm != "sl":
            # The guide's text in the place of a failed group's first is an episode, too; only HPT has such.
            groups = MICRO.tasks["words"].rl["episodes_per_iteration"] / chosen.get("group_size", 1)
            imitated = sum(round(groups * step.get("imitated_groups", 0)) for step in record["history"])
            assert (imitated > 0) == (row.algorithm == "hpt")
            assert record["episodes"] == 16 + imitated
            assert (chosen["policy"], chosen["episodes"]) == (dict(row.policy), 16)
            assert chosen.get("start", "supervised") == row.start
        # What a log shows
        assert printed.index(f"words {name} seed 0: started") < printed.index(
            f"words {name} seed 0: test reward {record['final_reward']:.3f}"
        )
        hands_off = name.startswith("handoff")
        assert (record["evaluation"]["guide_tokens"] > 0) == hands_off
        assert (record["evaluation"]["handoff_fraction"] > 0) == hands_off
        assert any(author == "guide" for text in record["samples"] for author, _ in text["segments"]) <= hands_off
    for cost in (0.002, 0.01):
        record = records[f"handoff-{cost}"]
        tokens = record["evaluation"]["guide_tokens"] / 12
        assert record["reward_parts"]["handoff_cost"] == pytest.approx(-cost * tokens)
        assert record["final_reward"] == pytest.approx(sum(record["reward_parts"].values()), abs=1e-6)
        assert np.isfinite(record["best_reward"])
    # More texts of one policy on paired random numbers
    rewards = [np.array(records[name]["evaluation"]["rewards"]) for name in ("sl", "best-of-2", "best-of-4")]
    assert (np.diff(rewards, axis=0) >= 0).all()
    assert rewards[2].mean() > rewards[0].mean()
    assert {text[0][0] for run in records["dr-po"]["rollouts"] for text in [run["segments"]]} <= {"reference", "policy"}

    table = (micro / "table.md").read_text()
    assert [line.split("|")[2].strip() for line in table.splitlines() if line.startswith("| words")][
        : len(MICRO.rows)
    ] == MICRO.rows


@pytest.mark.parametrize("name", ["quick", "small", "paper"])
def test_a_profile_has_a_row_for_every_algorithm_and_each_takes_its_arguments(name, make_env, make_policy):
    model, tokenizer = make_policy().model, make_policy().tokenizer
    for task in load_profile(name).tasks.values():
        assert {row.algorithm for row in task.rows.values()} == set(ALGORITHMS)
        iterations, rest = divmod(task.episodes, task.rl["episodes_per_iteration"])
        assert rest == 0
        assert 0.2 <= task.rows["d2lols"].arguments["tau"] / iterations <= 0.42
        for row in task.rows.values():
            if row.algorithm != "sl":
                guide = guide_of(row.algorithm, make_policy)
                env = make_env(task.rl["episodes_per_iteration"], **{"guide": guide, **row.env})
                policy = CausalLMPolicy(model, tokenizer, **row.policy)
                ALGORITHMS[row.algorithm](policy, env, **{**task.rl, **row.arguments})


def test_a_learner_can_start_below_its_guide(micro):
    benchmark = Benchmark(MICRO, None, None, micro)
    start = benchmark.warm_start("words", lambda *_: None)
    models = {name: load_policy(getattr(start, name), "float32") for name in ("supervised", "start_model")}
    for algo, begins_as in (("ppo++", "supervised"), ("ppo++-from-base", "start_model")):
        run = Run("words", algo, 0)
        env = make_env(
            MICRO.tasks["words"].env_id,
            num_envs=8,
            tokenizer=start.supervised,
            **benchmark.guided_env(benchmark.job(run), start),
        )
        algorithm = benchmark.begin(benchmark.job(run), benchmark.folder(run), start, env, 0)
        own, supervised, base = (
            policy.model.state_dict() for policy in (algorithm.policy, models["supervised"], models["start_model"])
        )
        assert all(torch.equal(own[name], weight) for name, weight in models[begins_as].model.state_dict().items())
        assert any(not torch.equal(supervised[name], base[name]) for name in base)
        assert env.guide.fingerprint == benchmark.guided_env(benchmark.jobs["words", "ppo"], start)["guide"].fingerprint


def test_rows_that_make_no_sense_are_refused(micro):
    with pytest.raises(ValueError, match="start must be 'supervised' or 'start_model', got 'base'"):
        Row("ppo", start="base")
    words = MICRO.tasks["words"]
    with pytest.raises(ValueError, match="best_of must be at least 1, got 0"):
        Row("sl", best_of=0)
    with pytest.raises(ValueError, match="env, policy and after must be left out for 'sl' without arguments"):
        Row("sl", env={"length": 2})
    with pytest.raises(ValueError, match="after must be a row 'sl' with nothing but arguments, env and policy"):
        Row("grpo", after=Row("sl", {"n_epochs": 2}, start="start_model"))
    with pytest.raises(ValueError, match="after must be a row with arguments"):
        Row("grpo", after=Row("sl"))
    with pytest.raises(ValueError, match="exactly one of episodes and tokens must be given, got episodes=16, tokens=9"):
        replace(words, tokens=9)
    with pytest.raises(ValueError, match="test_samples must be 1 where the test does not sample, got 4"):
        replace(words, test_samples=4, test_decoding={"greedy": True})
    with pytest.raises(ValueError, match="family must be 'gpt2' or 'llama', got 'bert'"):
        replace(words.language_model, family="bert")
    with pytest.raises(ValueError, match="default must be some of"):
        replace(MICRO, default=("sl", "unknown"))
    with pytest.raises(ValueError, match="rows of other must be those of the first task"):
        replace(MICRO, tasks={"words": words, "other": replace(words, rows={"sl": Row("sl")})})
    unknown = replace(words, rows={"new": Row("new")})
    with pytest.raises(ValueError, match="algorithm must be one of"):
        Benchmark(replace(MICRO, tasks={"words": unknown}, default=("new",)), None, None, micro)


def test_a_failed_run_is_told_and_the_others_go_on(micro, monkeypatch, capsys):
    broken = replace(MICRO.tasks["words"], rl={**MICRO.tasks["words"].rl, "learning_rate": -1.0})
    profile = replace(MICRO, tasks={"words": broken})
    monkeypatch.setattr("benchmarks.profiles.load_profile", lambda name: profile)
    assert run_all.run_all(algos="ppo,sl", out=micro) == 1
    assert "learning_rate must be finite and above 0" in capsys.readouterr().out
    assert "learning_rate" in (micro / "words-ppo-0" / "traceback.txt").read_text()
    assert [record["algo"] for record in read_results(micro)] == ["sl"]


def test_half_precision_is_recorded_and_near(micro):
    for dtype in ("float32", "auto"):
        assert run_all.run_all(algos="ppo++", dtype=dtype, out=micro / dtype) == 0
    full, half = (read_results(micro / dtype)[0] for dtype in ("float32", "auto"))
    assert (full["dtype"], half["dtype"]) == ("float32", "auto")
    assert full["fingerprints"].keys() == half["fingerprints"].keys()
    assert half["guide_tokens"] > 0
    assert half["final_reward"] == pytest.approx(full["final_reward"], abs=0.1)
    with pytest.raises(ValueError, match="has dtype 'auto', now it is 'float32'"):
        Benchmark(MICRO, None, None, micro / "auto")


def test_a_folder_with_other_settings_is_refused(micro):
    run_all.run_all(algos="sl", out=micro)
    with pytest.raises(ValueError, match="out must be"):
        Benchmark(MICRO, None, "another/base", micro)


def test_a_row_with_other_arguments_is_refused_and_new_rows_are_welcome(micro, monkeypatch):
    run_all.run_all(algos="ppo", out=micro)
    words = MICRO.tasks["words"]

    def with_rows(**rows):
        return replace(MICRO, tasks={"words": replace(words, rows=rows | dict(words.rows) | rows)})

    assert Benchmark(with_rows(new=Row("rloo")), None, None, micro).finished
    with pytest.raises(ValueError, match=r"words ppo seed 0 has hyperparameters .*now it is"):
        Benchmark(with_rows(ppo=Row("ppo", {"vf_coef": 0.3})), None, None, micro)


def test_unknown_names_are_refused_with_what_is_allowed(micro):
    with pytest.raises(ValueError, match="tasks must be some of words, or all, got 'imdb'"):
        run_all.run_all(tasks="imdb", out=micro)
    with pytest.raises(ValueError, match="algos must be some of sl,best-of-4,ppo,"):
        run_all.run_all(algos="sl,ppo+++", out=micro)
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        run_all.run_all(seeds=0, out=micro)


def test_the_file_runs_from_the_root_and_names_what_is_wrong():
    command = [sys.executable, "benchmarks/run_all.py", "--profile", "large"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode != 0
    assert (
        "profile must be one of ['frontier', 'options', 'paper', 'quick', 'small'], or package.module:NAME, got 'large'"
        in done.stderr
    )
    assert "Traceback" not in done.stderr


def test_seeds_of_runs_are_far_apart():
    seeds = [seed for number in range(100) for seed in spread(number)]
    assert np.diff(np.sort(seeds)).min() > 512  # more than a vector environment has rows
    assert spread(3) == spread(3)


def test_warm_starts_depend_on_code_and_not_on_what_it_says_about_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start.textgym, "__path__", [str(tmp_path)])
    seen = []
    for source in (
        'def rate():\n    """Return the rate."""\n    return 0.1\n',
        '"""Rates."""\n\n\ndef rate():\n    return 0.1  # a tenth\n',
        "def rate():\n    return 0.2\n",
    ):
        (tmp_path / "rates.py").write_text(source)
        seen.append(warm_start.code_fingerprint.__wrapped__())
    assert seen[0] == seen[1] != seen[2]
