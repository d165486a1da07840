"""Statistics against closed forms; runs that finish, resume and fail."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks import run_all
from benchmarks.profiles import LanguageModel, Profile, TaskProfile
from benchmarks.results import read_results
from benchmarks.runner import Benchmark, spread
from benchmarks.statistics import mean_interval, paired_difference


def test_the_interval_of_a_mean_agrees_with_its_normal_theory():
    sample = np.random.default_rng(0).normal(0.3, 2.0, 2_000)
    interval = mean_interval(sample)
    half = 1.96 * stats.sem(sample)
    assert interval.mean == pytest.approx(sample.mean())
    assert interval.low == pytest.approx(sample.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(sample.mean() + half, abs=0.1 * half)


def test_intervals_cover_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        common = rng.normal(0, 3, 60)
        first, second = common + rng.normal(0.2, 1, 60), common + rng.normal(0, 1, 60)
        interval = paired_difference(first, second, resamples=400, seed=trial)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_pairing_takes_out_what_the_prompts_have_in_common():
    rng = np.random.default_rng(2)
    common = rng.normal(0, 10, 500)
    first, second = common + 0.5 + rng.normal(0, 0.1, 500), common + rng.normal(0, 0.1, 500)
    paired = paired_difference(first, second)
    assert paired.excludes_zero
    assert paired.high - paired.low < 0.05
    assert paired_difference(second, first).mean == pytest.approx(-paired.mean)
    shuffled = paired_difference(first, rng.permutation(second))
    assert shuffled.high - shuffled.low > 10 * (paired.high - paired.low)


def test_a_constant_difference_has_an_interval_of_no_width_and_seeds_are_averaged():
    rewards = np.arange(10.0)
    assert tuple(paired_difference(rewards + 1, rewards)) == pytest.approx((1, 1, 1))
    seeds = np.stack([rewards - 1, rewards + 3])
    assert tuple(paired_difference(seeds, rewards)) == pytest.approx((1, 1, 1))


def test_the_same_seed_gives_the_same_interval():
    sample = np.random.default_rng(3).uniform(size=50)
    assert mean_interval(sample, seed=4) == mean_interval(sample, seed=4)
    assert mean_interval(sample, seed=4) != mean_interval(sample, seed=5)


@pytest.mark.parametrize("rewards", [[1.0], [[1.0], [2.0]], 3.0, [[[1.0, 2.0]]], [1.0, float("nan")]])
def test_rewards_that_say_nothing_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards must"):
        mean_interval(rewards)


def test_different_prompts_are_refused():
    with pytest.raises(ValueError, match="same prompts"):
        paired_difference(np.zeros(5), np.zeros(6))


MICRO = Profile(
    name="micro",
    source="mini",
    tasks={
        "words": TaskProfile(
            env_id="test/Words-v0",  # see conftest.py
            language_model=LanguageModel(16, 1, 2, {"n_epochs": 2}),
            supervised={"n_epochs": 2},
            episodes=16,
            rl={"episodes_per_iteration": 8, "n_epochs": 1, "eval_every": 1, "eval_prompts": 8},
            algorithms={"ppo++": {"beta": 1.0}},
            test_prompts=12,
        )
    },
)


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
        if record["algo"] != "sl":
            assert record["episodes"] == 16
            assert len(record["history"]) == 2
    assert any(author == "guide" for run in records for text in run["rollouts"] for author, _ in text["segments"])

    results = (micro / "results.jsonl").read_bytes()
    monkeypatch.setattr(Benchmark, "run", lambda *_: pytest.fail("a finished run was run again"))
    assert run_all.run_all(seeds=2, out=micro) == 0
    assert (micro / "results.jsonl").read_bytes() == results


def test_a_failed_run_is_told_and_the_others_go_on(micro, monkeypatch, capsys):
    broken = replace(MICRO.tasks["words"], rl={**MICRO.tasks["words"].rl, "learning_rate": -1.0})
    profile = replace(MICRO, tasks={"words": broken})
    monkeypatch.setattr("benchmarks.profiles.load_profile", lambda name: profile)
    assert run_all.run_all(algos="ppo,sl", out=micro) == 1
    assert "learning_rate must be above 0" in capsys.readouterr().out
    assert "learning_rate" in (micro / "words-ppo-0" / "traceback.txt").read_text()
    assert [record["algo"] for record in read_results(micro)] == ["sl"]


def test_a_folder_with_other_settings_is_refused(micro):
    run_all.run_all(algos="sl", out=micro)
    with pytest.raises(ValueError, match="out must be"):
        Benchmark(MICRO, None, "another/base", micro)


def test_unknown_names_are_refused_with_what_is_allowed(micro):
    with pytest.raises(ValueError, match="tasks must be some of words, got 'imdb'"):
        run_all.run_all(tasks="imdb", out=micro)
    with pytest.raises(ValueError, match="algos must be some of sl,ppo,"):
        run_all.run_all(algos="sl,reinforce", out=micro)
    with pytest.raises(ValueError, match="seeds must be at least 1"):
        run_all.run_all(seeds=0, out=micro)


def test_the_file_runs_from_the_root_and_names_what_is_wrong():
    command = [sys.executable, "benchmarks/run_all.py", "--profile", "large"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode != 0
    assert "profile must be one of ['quick', 'small'], got 'large'" in done.stderr
    assert "Traceback" not in done.stderr


def test_seeds_of_runs_are_far_apart():
    seeds = [seed for number in range(100) for seed in spread(number)]
    assert np.diff(np.sort(seeds)).min() > 512  # more than a vector environment has rows
    assert spread(3) == spread(3)
