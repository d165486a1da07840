"""Statistics of finished runs: scores, normalised scores, and comparisons of every two rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from benchmarks.comparison.results import Record, Runs
from benchmarks.report.intervals import (
    Interval,
    PromptBootstrap,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    ratio,
)

# Normalised scores: 0 is the supervised policy that all others start from, 1 the best of four of its completions,
# chosen by the same reward that judges them.
ZERO, ONE = "sl", "best-of-4"
# The policy that all rows start from, in profiles of hard problems.
START = "start"
# Rows that every other is compared with in the Markdown tables.
BASELINES = ("sl", "ppo")


class Difference(NamedTuple):
    """Two rows on one task: the difference of their rewards on the same prompts with the same seeds."""

    reward: Interval  # mean over prompts and seeds
    by_seed: list[Interval]  # for each seed that both rows have


class Analysis:
    """Statistics of finished runs, computed once, on first use."""

    def __init__(self, runs: Runs) -> None:
        self.runs = runs

    def reward(self, task: str, algo: str) -> Interval:
        """Interquartile mean over seeds of a row's test reward."""
        return interquartile_mean([self._rewards(task, algo)])

    @cached_property
    def scales(self) -> dict[str, tuple[float, float]]:
        """The mean test rewards of the rows `ZERO` and `ONE`, for each task that has both."""
        means = {
            task: tuple(float(self._rewards(task, algo).mean()) for algo in (ZERO, ONE))
            for task in self.runs.tasks
            if self.runs.of(task, ZERO) and self.runs.of(task, ONE)
        }
        return {task: (zero, one) for task, (zero, one) in means.items() if one > zero}

    def normalised(self, task: str, algo: str) -> np.ndarray:
        """Normalised test rewards of a row's runs, float (seeds,), on a task that has a scale."""
        zero, one = self.scales[task]
        return (self._rewards(task, algo) - zero) / (one - zero)

    @cached_property
    def aggregate(self) -> dict[str, Interval]:
        """Interquartile mean of normalised scores over seeds and tasks with a scale, for rows that ran on all."""
        return {algo: interquartile_mean(self._scores(algo)) for algo in self._everywhere}

    def profiles(self, thresholds: Sequence[float]) -> dict[str, list[Interval]]:
        """Performance profiles of the same rows as in `aggregate`."""
        return {algo: performance_profile(self._scores(algo), thresholds) for algo in self._everywhere}

    @cached_property
    def improvement(self) -> dict[tuple[str, str], Interval]:
        """Probability that a run of the first row of a pair has a higher test reward than one of the second."""
        found = {}
        for first, second in itertools.combinations(self.runs.algos, 2):
            tasks = [task for task in self.runs.tasks if self.runs.of(task, first) and self.runs.of(task, second)]
            if tasks:
                scores = ([self._rewards(task, algo) for task in tasks] for algo in (first, second))
                value, low, high = probability_of_improvement(*scores)
                found[first, second] = Interval(value, low, high)
                found[second, first] = Interval(1 - value, 1 - high, 1 - low)
        return found

    @cached_property
    def differences(self) -> dict[tuple[str, str, str], Difference]:
        """Rewards compared prompt by prompt, by (task, first row, second row), for rows that had the same test."""
        found = {}
        for task in self.runs.tasks:
            tests: dict[str, list[Record]] = {}
            for record in (record for record in self.runs.records if record["task"] == task):
                tests.setdefault(_test(record), []).append(record)
            for records in tests.values():
                bootstrap = PromptBootstrap([record["evaluation"]["rewards"] for record in records])
                rows: dict[str, dict[int, int]] = {}
                for index, record in enumerate(records):
                    rows.setdefault(record["algo"], {})[record["seed"]] = index
                for first, second in itertools.combinations(rows, 2):
                    if seeds := sorted(rows[first].keys() & rows[second].keys()):
                        pair = [rows[first][seed] for seed in seeds], [rows[second][seed] for seed in seeds]
                        reward, by_seed = bootstrap.difference(*pair), bootstrap.differences(*pair)
                        found[task, first, second] = Difference(reward, by_seed)
                        found[task, second, first] = Difference(-reward, [-difference for difference in by_seed])
        return found

    def ratio(self, task: str, first: str, second: str, metric: str) -> Interval | None:
        """Ratio of two rows' metric over seeds; None if a run lacks it or its value is not above 0."""
        values = [
            [record["metrics"].get(metric) or 0.0 for record in self.runs.of(task, algo)] for algo in (first, second)
        ]
        return ratio(*values) if all(values) and min(map(min, values)) > 0 else None

    def newly_solved(self, task: str, algo: str) -> float:
        """Of the test prompts that no text of the row `START` solved, the share that a row's texts solve.

        Returns:
            The mean over the seeds of both rows; NaN if there are none with several texts per prompt, or no such
            prompts.
        """
        counts = [
            {record["seed"]: np.array(record["evaluation"].get("successes", ())) for record in self.runs.of(task, name)}
            for name in (START, algo)
        ]
        start, own = counts
        shares = [
            float((own[seed][start[seed] == 0] > 0).mean())
            for seed in start.keys() & own.keys()
            if start[seed].shape == own[seed].shape and (start[seed] == 0).any()
        ]
        return mean(shares)

    def summary(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Per task and row: `iqm`, `ci_low` and `ci_high` (None from one seed) of the test reward, `seeds`, `metrics`.

        `seeds` is their number, `metrics` holds means over seeds.
        """
        tasks: dict[str, dict[str, dict[str, Any]]] = {}
        for task, algo, group in self.runs.groups():
            iqm, low, high = self.reward(task, algo)
            names = dict.fromkeys(name for record in group for name in record["metrics"])
            tasks.setdefault(task, {})[algo] = {
                "iqm": iqm,
                "ci_low": low if np.isfinite(low) else None,
                "ci_high": high if np.isfinite(high) else None,
                "seeds": len(group),
                "metrics": {name: mean(record["metrics"].get(name) for record in group) for name in names},
            }
        return tasks

    @cached_property
    def _everywhere(self) -> list[str]:
        """Rows with runs on every task that has a scale; empty if no task has one."""
        tasks = self.scales
        return [algo for algo in self.runs.algos if tasks and all(self.runs.of(task, algo) for task in tasks)]

    def _scores(self, algo: str) -> list[np.ndarray]:
        return [self.normalised(task, algo) for task in self.scales]

    def _rewards(self, task: str, algo: str) -> np.ndarray:
        return np.array([record["final_reward"] for record in self.runs.of(task, algo)])


def mean(values: Iterable[float | None]) -> float:
    """Mean of the values that are not None, NaN if there are none."""
    present = [value for value in values if value is not None]
    return float(np.mean(present)) if present else float("nan")


def _test(record: Record) -> str:
    """A key of the test prompts and the reward; equal for runs that can be compared prompt by prompt."""
    prints = record["fingerprints"]
    return repr((record["evaluation"]["sample_ids"], prints.get("test"), prints.get("reward")))
