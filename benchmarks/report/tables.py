"""The tables of a report: results, costs, scores across tasks, comparisons and metrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.comparison.results import Record
from benchmarks.report.analysis import BASELINES, ONE, START, ZERO, Analysis, mean
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
    solved = {(task, algo): analysis.newly_solved(task, algo) for task, algo, _ in runs.groups()}
    newly = any(map(np.isfinite, solved.values()))
    rows: list[dict[str, Cell]] = []
    for task, algo, group in runs.groups():
        score = analysis.reward(task, algo)
        row: dict[str, Cell] = {"task": task, "algorithm": algo, "test reward": score}
        if normalised:
            zero, one = analysis.scales.get(task, (np.nan, np.nan))
            row["normalised"] = number((score.value - zero) / (one - zero), ".2f")
        row["best checkpoint"] = f"{mean(record['best_reward'] for record in group):.3f}"
        row |= _pass_at(group, ks)
        if newly:
            row["newly solved"] = number(solved[task, algo], ".3f")
        row |= {label: number(mean(run["metrics"].get(name) for run in group)) for name, label in FLUENCY.items()}
        row["KL"] = number(mean(run["history"][-1].get("kl") if run["history"] else None for run in group))
        if handed_off:
            row |= _handoffs(group)
        rows.append(row | {"seeds": str(len(group)) if runs.several_seeds else "-"})
    note = f"Test reward of the last checkpoint{_worth(analysis)}"
    if normalised:
        note += f" Normalised, 0 is the mean of {ZERO} and 1 that of {ONE}."
    note += " Best checkpoint: mean test reward of the one with the best validation reward."
    if any("perplexity" in record["metrics"] for record in runs.records):
        note += " Perplexity is under the start model."
    note += (
        " KL is to the policy that a row's reinforcement learning started from, in nats a text at the last iteration."
    )
    if any(record["hyperparameters"]["best_of"] > 1 for record in runs.records):
        note += (
            " A best-of row writes several texts for a prompt and keeps the one with the highest reward, by the very "
            "reward it is judged by."
        )
    if ks:
        note += " pass@k: the probability that one of k texts for a test prompt has a reward of 1."
    if newly:
        note += (
            f" Newly solved: of the test prompts that no text of {START} solved, the share that one of a row's solves."
        )
    if handed_off:
        note += (
            " Rows that were handed off learned when to let the guide finish a text; they are tested with the guide, "
            "and what its tokens cost is taken from their test reward."
        )
    return Table.of("Results", note, rows, bars={"test reward": None})


def costs(analysis: Analysis) -> Table:
    """The cost of the runs of every row, means over seeds."""
    rows = []
    for task, algo, group in analysis.runs.groups():
        counts = {
            key: mean(record[key.replace(" ", "_")] for record in group)
            for key in ("episodes", "policy tokens", "guide tokens")
        }
        counts["all tokens"] = counts["policy tokens"] + counts["guide tokens"]
        counts["seconds"] = mean(record["seconds"] for record in group)
        tests = [record["evaluation"] for record in group]
        written = mean((test["policy_tokens"] + test["guide_tokens"]) / len(test["rewards"]) for test in tests)
        cells = {column: f"{count:,.0f}" for column, count in counts.items()}
        rows.append({"task": task, "algorithm": algo, **cells, "tokens at test": f"{written:.1f}"})
    return Table.of(
        "Costs",
        "Of one training run: episodes, tokens that the policy and the guide wrote, and seconds without evaluations "
        f"({ZERO}: those of its warm start, which all others share); then tokens written for one test prompt by the "
        "policy, or by the guide where it takes part in the test, texts that were not kept counted.",
        rows,
    )


def aggregate(analysis: Analysis) -> Table:
    """Normalised scores over all tasks, and the probability of improvement over the baselines."""
    several = any(np.isfinite(score.low) for score in analysis.aggregate.values())
    baselines = [algo for algo in BASELINES if several and algo in analysis.aggregate]
    better = {f"P(better than {baseline})": baseline for baseline in baselines}
    rows = [
        {
            "algorithm": algo,
            "normalised score": score,
            **{column: analysis.improvement.get((algo, baseline), "-") for column, baseline in better.items()},
            "runs": str(sum(len(analysis.runs.of(task, algo)) for task in analysis.scales)),
        }
        for algo, score in analysis.aggregate.items()
    ]
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
    return Table.of(
        "Across tasks",
        note,
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
    rows: list[dict[str, Cell]] = []
    runs = analysis.runs
    ratios = {metric: f"{label} ratio" for metric, label in FLUENCY.items()}
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
                {
                    "task": task,
                    "algorithm": first,
                    "baseline": second,
                    "difference": found.reward,
                    "verdict": found.reward.against(0),
                    "seeds above / below": (
                        f"{verdicts.count('above')} / {verdicts.count('below')} of {len(verdicts)}"
                        if runs.several_seeds
                        else "-"
                    ),
                    **{ratios[metric]: analysis.ratio(task, first, second, metric) or "-" for metric in FLUENCY},
                }
            )
    note = (
        "Difference in test reward on the same prompts with the same seeds, with a 95% paired bootstrap interval over "
        "prompts: it speaks of these very policies on other prompts, not of other training seeds. "
    )
    if runs.several_seeds:
        note += (
            "Seeds above and below: in how many of them the same interval, of that seed alone, lies above and below "
            "zero. "
        )
        if any(row[column] != "-" for row in rows for column in ratios.values()):
            note += "Perplexity and distinct-2: ratios of geometric means over seeds, with intervals over seeds. "
    note += "Each interval is for itself: of many rows that are alike, one in twenty would be told apart."
    return Table.of(
        "Paired comparisons",
        note,
        rows,
        names=3,
        formats={"difference": "+.3f"} | dict.fromkeys(ratios.values(), ".2f"),
        bars={"difference": 0.0},
    )


def metrics(analysis: Analysis) -> Table:
    """Every part of the reward and every metric of the test texts, means over seeds."""
    names = dict.fromkeys(name for record in analysis.runs.records for name in _measured(record))
    rows = [
        [task, algo, *(number(mean(_measured(record).get(name) for record in group)) for name in names)]
        for task, algo, group in analysis.runs.groups()
    ]
    note = (
        f"Parts of the reward and metrics of the same test texts{', means over seeds' * analysis.runs.several_seeds}."
    )
    # The records say what to do about it.
    left_out = dict.fromkeys(
        f"{name.replace('_', ' ')} on {record['task']} ({reason.split(':')[0]})"
        for record in analysis.runs.records
        for name, reason in record["metrics_left_out"].items()
    )
    if left_out:
        note += f" Left out: {listed(left_out)}."
    return Table("Metrics", note, ["task", "algorithm", *(name.replace("_", " ") for name in names)], rows)


#: All tables by name, in the order of a report.
TABLES: dict[str, Callable[[Analysis], Table]] = {
    table.__name__: table for table in (results, aggregate, improvement, comparisons, metrics, costs)
}


def _worth(analysis: Analysis) -> str:
    """How a sentence on test rewards ends: of how many seeds they are, and how far intervals can be trusted."""
    counts = sorted({len(group) for _, _, group in analysis.runs.groups()} - {1})
    if not counts:
        return ". There is one seed, and one seed says nothing about others."
    known = {count: coverage(count) for count in sorted({3, 5, *counts})}
    shares = listed([f"{share:.0%} of cases with {count}" for count, share in known.items()])
    return (
        f": interquartile mean over seeds, with {OVER_SEEDS}. With few seeds these are too narrow: where scores are "
        f"normal, they hold the true value in {shares} seeds, not in 95%. All seeds share one warm start, and rows "
        "that train nothing (sl, best-of) are one policy with other random numbers at the test."
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


def _handoffs(group: Sequence[Record]) -> dict[str, str]:
    """Guide tokens a test prompt, and the share of test texts handed off."""
    if not _hands_off(group[0]):
        return {"guide tokens at test": "-", "handed off": "-"}
    tests = [record["evaluation"] for record in group]
    tokens = mean(test["guide_tokens"] / len(test["rewards"]) for test in tests)
    return {
        "guide tokens at test": f"{tokens:.1f}",
        "handed off": f"{mean(test['handoff_fraction'] for test in tests):.0%}",
    }


def _measured(record: Record) -> dict[str, float]:
    """Parts of the reward and metrics, by name."""
    return record["reward_parts"] | record["metrics"]
