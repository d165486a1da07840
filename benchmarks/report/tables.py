"""The tables of a report: results, costs, scores across tasks, comparisons and metrics."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from benchmarks.comparison.results import Record
from benchmarks.report.analysis import BASELINES, ONE, ZERO, Analysis, mean
from benchmarks.report.intervals import coverage
from benchmarks.report.table import Cell, Table

# Metrics that a higher reward often costs, by their keys among a run's metrics.
FLUENCY = {"perplexity": "perplexity", "distinct_2": "distinct-2"}
OVER_SEEDS = "95% percentile bootstrap intervals over seeds"


def results(analysis: Analysis) -> Table:
    """Test reward, fluency and diversity of every row; the guide's part of the completions, if there is any."""
    runs = analysis.runs
    handed_off = any(_hands_off(record) for record in runs.records)
    normalised = bool(analysis.scales)
    ks = _least_and_most(runs.records)
    rows: list[list[Cell]] = []
    for task, algo, group in runs.groups():
        score = analysis.reward(task, algo)
        zero, one = analysis.scales.get(task, (np.nan, np.nan))
        rows.append(
            [
                task,
                algo,
                score,
                *([number((score.value - zero) / (one - zero), ".2f")] if normalised else []),
                f"{mean(record['best_reward'] for record in group):.3f}",
                *_pass_at(group, ks).values(),
                *(number(mean(record["metrics"].get(name) for record in group)) for name in FLUENCY),
                number(mean(record["history"][-1].get("kl") if record["history"] else None for record in group)),
                *(_handoffs(group) if handed_off else []),
                str(len(group)),
            ]
        )
    note = f"Test reward of the last checkpoint: interquartile mean over seeds, with {_worth(analysis)}"
    if normalised:
        note += f" Normalised, 0 is the mean of {ZERO} and 1 that of {ONE}."
    note += (
        " Best checkpoint: mean test reward of the one with the best validation reward. Perplexity is under the start "
        "model; KL is to the supervised policy, in nats a text at the last iteration."
    )
    if any(record["hyperparameters"]["best_of"] > 1 for record in runs.records):
        note += (
            " A best-of row writes several texts for a prompt and keeps the one with the highest reward, by the very "
            "reward it is judged by."
        )
    if ks:
        note += " pass@k: the probability that one of k texts for a test prompt has a reward of 1."
    if handed_off:
        note += (
            " Rows that were handed off learned when to let the guide finish a text; they are tested with the guide, "
            "and what its tokens cost is taken from their test reward."
        )
    columns = [
        "task",
        "algorithm",
        "test reward",
        *(["normalised"] if normalised else []),
        "best checkpoint",
        *(f"pass@{k}" for k in ks),
        *FLUENCY.values(),
        "KL",
        *(["guide tokens at test", "handed off"] if handed_off else []),
        "seeds",
    ]
    return Table("Results", note, columns, rows, bars={"test reward": None})


def costs(analysis: Analysis) -> Table:
    """The cost of the runs of every row, means over seeds."""
    rows = []
    for task, algo, group in analysis.runs.groups():
        policy, guide = (mean(record[key] for record in group) for key in ("policy_tokens", "guide_tokens"))
        written = mean(record["evaluation"]["policy_tokens"] / len(record["evaluation"]["rewards"]) for record in group)
        episodes, seconds = (mean(record[key] for record in group) for key in ("episodes", "seconds"))
        rows.append(
            [
                task,
                algo,
                *(f"{count:,.0f}" for count in (episodes, policy, guide, policy + guide, seconds)),
                f"{written:.1f}",
            ]
        )
    return Table(
        "Costs",
        "Of one training run: episodes, tokens that the policy and the guide wrote, and seconds without evaluations "
        f"({ZERO}: those of its warm start, which all others share); then policy tokens written for one test prompt, "
        "texts that were not kept counted.",
        ["task", "algorithm", "episodes", "policy tokens", "guide tokens", "all tokens", "seconds", "tokens at test"],
        rows,
    )


def aggregate(analysis: Analysis) -> Table:
    """Normalised scores over all tasks, and the probability of improvement over the baselines."""
    several = any(np.isfinite(score.low) for score in analysis.aggregate.values())
    baselines = [algo for algo in BASELINES if several and algo in analysis.aggregate]
    rows = [
        [
            algo,
            score,
            *(analysis.improvement.get((algo, baseline), "-") for baseline in baselines),
            str(sum(len(analysis.runs.of(task, algo)) for task in analysis.scales)),
        ]
        for algo, score in analysis.aggregate.items()
    ]
    better = [f"P(better than {baseline})" for baseline in baselines]
    note = (
        f"No task has runs of both {ZERO} and {ONE}, which are 0 and 1 of normalised scores, so that there is no "
        "statistic across tasks."
    )
    if analysis.scales:
        note = (
            f"Interquartile mean of the normalised test rewards of all runs on {listed(analysis.scales)}: on each "
            f"task 0 is the mean of {ZERO} and 1 that of {ONE}, both taken as known."
        )
        if several:
            note += (
                f" Intervals are {OVER_SEEDS}, which are resampled within each task, as are those of the probability "
                "that a run scores above one of a baseline."
            )
        if left_out := [task for task in analysis.runs.tasks if task not in analysis.scales]:
            note += f" Without {listed(left_out)}, which lacks a run of {ZERO} or {ONE}, or a distance between them."
        if missing := [algo for algo in analysis.runs.algos if algo not in analysis.aggregate]:
            note += f" Rows that did not run on all of these tasks are left out: {listed(missing)}."
    return Table(
        "Across tasks",
        note,
        ["algorithm", "normalised score", *better, "runs"],
        rows,
        names=1,
        formats={"normalised score": ".2f"} | dict.fromkeys(better, ".2f"),
        bars={"normalised score": 0.0} | dict.fromkeys(better, 0.5),
    )


def improvement(analysis: Analysis) -> Table:
    """Probability of improvement between every two rows that have several seeds."""
    known = [pair for pair, found in analysis.improvement.items() if np.isfinite(found.low)]
    algos = [algo for algo in analysis.runs.algos if any(algo in pair for pair in known)]

    def cell(first: str, second: str) -> str:
        found = analysis.improvement.get((first, second))
        if found is None:
            return "-"
        return f"{found.value:.2f}{'*' if found.against(0.5) != 'not told apart' else ''}"

    return Table(
        "Probability of improvement",
        "Probability that a run of the row scores above a run of the column on the same task, ties half, averaged over "
        f"the tasks that both ran on. * marks where the interval (these are {OVER_SEEDS}) leaves out one half.",
        ["algorithm", *algos],
        [[first, *(cell(first, second) for second in algos)] for first in algos],
        names=1,
    )


def comparisons(analysis: Analysis, baselines: Sequence[str] | None = None) -> Table:
    """Rows against baselines: paired difference in reward, and the ratio of fluency and diversity.

    Args:
        analysis: The runs.
        baselines: Rows to compare all others with; by default `BASELINES`, or the first row where neither ran.
    """
    rows: list[list[Cell]] = []
    runs = analysis.runs
    for task in runs.tasks:
        present = [algo for algo in runs.algos if runs.of(task, algo)]
        chosen = [algo for algo in baselines or BASELINES if algo in present] or present[:1]
        for second, first in itertools.product(chosen, present):
            # Two baselines are compared once; a reader who chooses one baseline wants all differences from it.
            twice = baselines is None and first in chosen and chosen.index(first) <= chosen.index(second)
            found = analysis.differences.get((task, first, second))
            if found is None or twice:
                continue
            verdicts = [difference.against(0) for difference in found.by_seed]
            rows.append(
                [
                    task,
                    first,
                    second,
                    found.reward,
                    found.reward.against(0),
                    f"{verdicts.count('above')} / {verdicts.count('below')} of {len(verdicts)}",
                    *(analysis.ratio(task, first, second, metric) or "-" for metric in FLUENCY),
                ]
            )
    ratios = [f"{label} ratio" for label in FLUENCY.values()]
    return Table(
        "Paired comparisons",
        "Difference in test reward on the same prompts with the same seeds, with a 95% paired bootstrap interval over "
        "prompts: it speaks of these very policies on other prompts, not of other training seeds. Seeds above and "
        "below: in how many of them the same interval, of that seed alone, lies above and below zero. Perplexity and "
        "distinct-2: ratios of geometric means over seeds, with intervals over seeds. Each interval is for itself: of "
        "many rows that are alike, one in twenty would be told apart.",
        ["task", "algorithm", "baseline", "difference", "verdict", "seeds above / below", *ratios],
        rows,
        names=3,
        formats={"difference": "+.3f"} | dict.fromkeys(ratios, ".2f"),
        bars={"difference": 0.0},
    )


def metrics(analysis: Analysis) -> Table:
    """Every part of the reward and every metric of the test texts, means over seeds."""
    names = dict.fromkeys(name for record in analysis.runs.records for name in _measured(record))
    rows = [
        [task, algo, *(number(mean(_measured(record).get(name) for record in group)) for name in names)]
        for task, algo, group in analysis.runs.groups()
    ]
    note = "Parts of the reward and metrics of the same test texts, means over seeds."
    # The records say what to do about it.
    left_out = dict.fromkeys(
        f"{name.replace('_', ' ')} on {record['task']} ({reason.split(':')[0]})"
        for record in analysis.runs.records
        for name, reason in record["metrics_left_out"].items()
    )
    if left_out:
        note += f" Left out: {listed(left_out)}."
    return Table(
        "Metrics",
        note,
        ["task", "algorithm", *(name.replace("_", " ") for name in names)],
        rows,
    )


def _worth(analysis: Analysis) -> str:
    """A sentence on how far intervals over seeds can be trusted."""
    counts = sorted({len(group) for _, _, group in analysis.runs.groups()} - {1})
    if not counts:
        return "no interval: one seed says nothing about others."
    known = {count: coverage(count) for count in sorted({3, 5, *counts})}
    shares = listed([f"{share:.0%} of cases with {count}" for count, share in known.items()])
    return (
        f"{OVER_SEEDS}. With few seeds these are too narrow: where scores are normal, they hold the true value in "
        f"{shares} seeds, not in 95%. All seeds share one warm start, and rows that train nothing (sl, best-of) are "
        "one policy with other random numbers at the test."
    )


def number(value: float, spec: str | None = None) -> str:
    """About three digits, or the format `spec`; a dash for a number that is not finite."""
    if not np.isfinite(value):
        return "-"
    return f"{value:z{spec or ('.1f' if abs(value) >= 100 else '.2f' if abs(value) >= 10 else '.3f')}}"


def listed(items: Iterable[str]) -> str:
    """A, b and c."""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last


def _hands_off(record: Record) -> bool:
    """Whether the policy can hand off, also at test."""
    return record["hyperparameters"]["env"].get("handoff", False)


def _least_and_most(records: Iterable[Record]) -> list[str]:
    """1 and the largest k for which a run has pass@k; nothing if none has."""
    known = {int(k) for record in records for k in record.get("pass_at", ())}
    return [str(k) for k in sorted({min(known), max(known)})] if known else []


def _pass_at(group: Sequence[Record], ks: Sequence[str]) -> dict[str, str]:
    """Mean pass@k of a row's runs, by the names of the columns."""
    return {f"pass@{k}": number(mean(record.get("pass_at", {}).get(k) for record in group), ".3f") for k in ks}


def _handoffs(group: Sequence[Record]) -> list[str]:
    """Guide tokens a test prompt, and the share of test texts handed off."""
    if not _hands_off(group[0]):
        return ["-", "-"]
    tokens = mean(record["evaluation"]["guide_tokens"] / len(record["evaluation"]["rewards"]) for record in group)
    return [f"{tokens:.1f}", f"{mean(record['evaluation']['handoff_fraction'] for record in group):.0%}"]


def _measured(record: Record) -> dict[str, float]:
    """Parts of the reward and metrics, by name."""
    return record["reward_parts"] | record["metrics"]
