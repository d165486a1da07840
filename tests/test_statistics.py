"""Statistics against scipy, closed forms and simulations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from benchmarks.report.intervals import (
    Interval,
    PromptBootstrap,
    coverage,
    interquartile_mean,
    learning_curve,
    performance_profile,
    probability_of_improvement,
    ratio,
)

SCORE = st.integers(-3, 3).map(float)  # ties are common
TASKS = st.lists(st.lists(SCORE, min_size=2, max_size=6), min_size=1, max_size=4)


def paired(first, second, seed: int = 0) -> Interval:
    return PromptBootstrap([first, second], seed=seed).difference([0], [1])


@given(TASKS)
@settings(max_examples=30, deadline=None)
def test_the_interquartile_mean_is_the_trimmed_mean_of_all_runs(tasks):
    interval = interquartile_mean(tasks)
    runs = np.sort(np.concatenate([np.array(task) for task in tasks]))
    assert interval.value == pytest.approx(stats.trim_mean(runs, 0.25))
    cut = len(runs) // 4
    assert interval.value == pytest.approx(runs[cut : len(runs) - cut].mean())
    assert min(runs) <= interval.low <= interval.high <= max(runs)


@given(TASKS, st.randoms(use_true_random=False))
@settings(max_examples=30, deadline=None)
def test_the_probability_of_improvement_is_the_mean_mann_whitney_statistic(tasks, random):
    others = [[random.choice([-2.0, 0.0, 0.5, 2.0]) for _ in range(random.randint(2, 6))] for _ in tasks]
    interval = probability_of_improvement(tasks, others)
    expected = [stats.mannwhitneyu(x, y).statistic / (len(x) * len(y)) for x, y in zip(tasks, others, strict=True)]
    assert interval.value == pytest.approx(np.mean(expected))
    assert 0 <= interval.low <= interval.high <= 1
    assert probability_of_improvement(others, tasks).value == pytest.approx(1 - interval.value)
    # Only the order of scores counts
    assert probability_of_improvement([np.exp(x) for x in tasks], [np.exp(y) for y in others]) == interval


@given(TASKS)
@settings(max_examples=30, deadline=None)
def test_a_performance_profile_falls_from_one_to_none_and_its_area_is_the_mean(tasks):
    thresholds = np.arange(-4, 4.25, 0.25)  # exact, as scores are
    profile = performance_profile(tasks, thresholds)
    shares = np.array([level.value for level in profile])
    assert (shares[0], shares[-1]) == (1, 0)
    assert (np.diff(shares) <= 1e-12).all()
    assert -4 + shares[:-1].sum() * 0.25 == pytest.approx(np.mean([np.mean(task) for task in tasks]))
    assert all(-1e-12 <= level.low <= level.high <= 1 + 1e-12 for level in profile)


def test_seeds_are_resampled_within_their_task():
    tasks = [[0.1, 0.1, 0.1], [0.9, 0.9, 0.9]]  # tasks differ, seeds do not
    assert tuple(interquartile_mean(tasks)) == pytest.approx((0.5, 0.5, 0.5))
    assert performance_profile(tasks, [0.5]) == [Interval(0.5, 0.5, 0.5)]
    assert tuple(probability_of_improvement(tasks, tasks)) == (0.5, 0.5, 0.5)


def test_intervals_are_those_of_every_possible_resample():
    scores = np.array([0.1, 0.2, 0.7])
    means = np.array([scores[[i, j, k]].mean() for i in range(3) for j in range(3) for k in range(3)])
    interval = interquartile_mean([scores])
    assert (interval.low, interval.high) == pytest.approx(
        np.quantile(means, [0.025, 0.975], method="inverted_cdf"), abs=0.02
    )


def test_intervals_of_few_seeds_are_too_narrow_and_we_know_how_much():
    # Two seeds: the interval reaches from one to the other. Three: the resample of one seed thrice has probability
    # 1/27, above 2.5%, so that it still reaches from the lowest to the highest. Both are then a matter of signs.
    assert coverage(2) == pytest.approx(1 / 2, abs=0.03)
    assert coverage(3) == pytest.approx(1 - 2 / 2**3, abs=0.03)
    assert coverage(5) == pytest.approx(0.91, abs=0.03)
    assert coverage(12) == pytest.approx(0.93, abs=0.02)


def test_more_tasks_make_the_intervals_of_few_seeds_better():
    rng = np.random.default_rng(0)
    intervals = [interquartile_mean(rng.normal(size=(3, 3))) for _ in range(300)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.82 <= covered <= 0.95


def test_one_seed_has_no_interval_and_is_never_told_apart():
    for interval in (
        interquartile_mean([[0.3]]),
        ratio([2.0], [1.0, 1.0]),
        probability_of_improvement([[1.0]], [[0.0]]),
    ):
        assert np.isfinite(interval.value)
        assert np.isnan([interval.low, interval.high]).all()
        assert interval.against(-5) == interval.against(Interval(0, 0, 0)) == "not told apart"
    assert f"{interquartile_mean([[0.3]]):.2f}" == "0.30"


def test_a_learning_curve_is_the_interquartile_mean_of_each_point():
    scores = np.random.default_rng(0).normal(size=(7, 5))
    for point, seeds in zip(learning_curve(scores), scores, strict=True):
        alone = interquartile_mean([seeds])
        assert point.value == pytest.approx(alone.value)
        assert (point.low, point.high) == pytest.approx((alone.low, alone.high), abs=0.3)


def test_a_ratio_is_that_of_geometric_means():
    first, second = np.array([2.0, 8.0, 4.0]), np.array([1.0, 4.0])
    interval, inverse = ratio(first, second), ratio(second, first)
    assert interval.value == pytest.approx(stats.gmean(first) / stats.gmean(second))
    assert interval.value * inverse.value == pytest.approx(1)
    assert tuple(ratio(3 * first, second)) == pytest.approx([3 * end for end in interval])
    assert tuple(ratio([2.0, 2.0], [4.0, 4.0])) == pytest.approx((0.5, 0.5, 0.5))


def test_intervals_over_prompts_cover_the_true_difference_as_often_as_they_say():
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(200):
        common = rng.normal(0, 3, 60)
        interval = paired(common + rng.normal(0.2, 1, 60), common + rng.normal(0, 1, 60), seed=trial)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.89 <= covered / 200 <= 0.99


def test_a_prompt_is_resampled_for_all_seeds_together():
    """What a prompt does to a difference is common to the seeds; drawn for each anew, intervals would be too narrow."""
    rng = np.random.default_rng(2)
    seeds, prompts, together, anew = 5, 60, [], []
    for trial in range(150):
        difference = rng.normal(0, 1, prompts) + rng.normal(0, 0.5, (seeds, prompts))
        runs = np.concatenate([difference, np.zeros((seeds, prompts))])
        interval = PromptBootstrap(runs, seed=trial).difference(range(seeds), range(seeds, 2 * seeds))
        assert interval.value == pytest.approx(difference.mean())
        together.append(interval.low <= 0 <= interval.high)
        low, high = stats.bootstrap(
            tuple(difference),
            lambda *samples, axis: np.mean([sample.mean(axis) for sample in samples], axis=0),
            vectorized=True,
            n_resamples=500,
            method="percentile",
            rng=rng,
        ).confidence_interval
        anew.append(low <= 0 <= high)
    assert np.mean(together) >= 0.88
    assert np.mean(anew) <= 0.75


def test_pairing_takes_out_what_the_prompts_have_in_common():
    rng = np.random.default_rng(3)
    common = rng.normal(0, 10, 500)
    first, second = common + 0.5 + rng.normal(0, 0.1, 500), common + rng.normal(0, 0.1, 500)
    together = paired(first, second)
    assert together.against(0) == "above"
    assert paired(second, first).against(0) == "below"
    assert together.high - together.low < 0.05
    apart = paired(first, rng.permutation(second))
    assert apart.high - apart.low > 10 * (together.high - together.low)


def test_a_constant_difference_has_an_interval_of_no_width():
    rewards = np.arange(10.0)
    bootstrap = PromptBootstrap([rewards - 1, rewards + 3, rewards, rewards])
    assert tuple(bootstrap.difference([0, 1], [2, 3])) == pytest.approx((1, 1, 1))


def test_the_same_seed_gives_the_same_interval():
    rewards = np.random.default_rng(4).uniform(size=(2, 50))
    assert paired(*rewards, seed=4) == paired(*rewards, seed=4)
    assert paired(*rewards, seed=4) != paired(*rewards, seed=5)
    assert interquartile_mean(rewards) == interquartile_mean(rewards)


def test_intervals_are_told_apart_where_they_do_not_meet():
    low, high = Interval(1, 0.5, 1.5), Interval(2, 1.6, 2.5)
    assert (low.against(high), high.against(low), low.against(low)) == ("below", "above", "not told apart")
    assert (low.against(1.5), low.against(1.6), low.against(0.4)) == ("not told apart", "below", "above")
    assert f"{high:+.1f}" == "+2.0 [+1.6, +2.5]"
    assert f"{Interval(-0.001, -0.2, 0.1):.2f}" == "0.00 [-0.20, 0.10]"


@pytest.mark.parametrize("scores", [[], [[]], [[1.0, float("nan")]], [[[1.0, 2.0]]], [3.0]])
def test_scores_that_say_nothing_are_refused(scores):
    for statistic in (interquartile_mean, lambda tasks: performance_profile(tasks, [0.5])):
        with pytest.raises(ValueError, match="tasks must be one or more arrays of finite scores"):
            statistic(scores)
    with pytest.raises(ValueError, match="must be"):
        probability_of_improvement(scores, [[1.0]])


@pytest.mark.parametrize("rewards", [[1.0], [[1.0], [2.0]], 3.0, [[[1.0, 2.0]]], [[1.0, float("nan")]]])
def test_rewards_that_say_nothing_are_refused(rewards):
    with pytest.raises(ValueError, match="rewards must"):
        PromptBootstrap(rewards)


def test_what_does_not_belong_together_is_refused():
    with pytest.raises(ValueError, match="same tasks, got 1 and 2"):
        probability_of_improvement([[1.0, 2.0]], [[1.0, 2.0], [1.0, 2.0]])
    with pytest.raises(ValueError, match="must be above 0"):
        ratio([1.0, 0.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="scores must be finite"):
        learning_curve([1.0, 2.0])
