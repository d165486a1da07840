"""Learning curves, as CSV and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.comparison.results import Record, Runs
from benchmarks.report.analysis import START, ZERO, mean
from benchmarks.report.intervals import Interval, learning_curve
from benchmarks.report.plots import figure, save

# The horizontal and vertical axes of curves: keys of a run's history, except "tokens", the sum of the policy's and the
# guide's, and "seconds", which are counted from the start.
AXES = {
    "num_episodes": "episodes",
    "num_timesteps": "policy tokens",
    "num_guide_tokens": "guide tokens",
    "tokens": "all tokens",
    "seconds": "seconds of training",
}
CURVES = {
    "eval/reward": "validation reward",
    "reward": "training reward",
    "kl": "KL to the start, nats a text",
    "entropy": "entropy, nats a token",
}
POINTS = 64  # of a drawn curve; of more iterations, the means of so many groups of consecutive ones are drawn
# Colours that can be told apart, for light and dark backgrounds; rows beyond these are dashed.
COLOURS = (
    ("#6b7280", "#a3abb8"),
    ("#1f6fd1", "#6db1ff"),
    ("#c2560a", "#ffa45c"),
    ("#0f8a5f", "#4fd1a1"),
    ("#a3308f", "#f08ede"),
    ("#b08900", "#e3c24a"),
)
DASHES = ("solid", "dash", "dot")


class Line(NamedTuple):
    """The learning curves of a row on a task: `x` by `AXES`, and `y` by `CURVES`, NaN where a run has no value.

    Each is float (seeds, points).
    """

    task: str
    algo: str
    seeds: list[int]
    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]

    def over_seeds(self, curve: str) -> list[Interval | None]:
        """Interquartile mean over seeds at every point, None where a seed has no value."""
        values = self.y[curve].T
        there = np.isfinite(values).all(1)
        intervals = iter(learning_curve(values[there]) if there.any() else [])
        return [next(intervals) if point else None for point in there]


class Level(NamedTuple):
    """The reward of the policy that a task's other rows start from, a horizontal line among their curves.

    Attributes:
        algo: The row that is this policy.
        reward: Its mean over seeds.
        validated: Whether it is of the validation prompts, as the curves are; else it is of the test prompts.
    """

    algo: str
    reward: float
    validated: bool


def level(runs: Runs, task: str) -> Level | None:
    """The level of the row `START`, else `ZERO`, if it trained nothing."""
    for algo in (START, ZERO):
        group = runs.of(task, algo)
        if group and not {"policy", "start"} & group[0]["hyperparameters"].keys():
            validated = all("validation_reward" in record for record in group)
            return Level(
                algo, mean(run["validation_reward" if validated else "final_reward"] for run in group), validated
            )
    return None


def lines(runs: Runs) -> list[Line]:
    """The curves of every row that has any; seeds of different length are cut to the shortest.

    Where the reward of the start policy is known, the curves of rows that start from it begin there, at zero episodes.
    """
    found = []
    levels = {task: level(runs, task) for task in runs.tasks}
    for task, algo, group in runs.groups():
        length = min(len(record["history"]) for record in group)
        seeds = [record["seed"] for record in group]
        at_start = levels[task] if _evaluated_from_the_start(group) else None
        start = at_start.reward if at_start and at_start.validated else None
        parts = [_points(record, length, start) for record in group] if length else []
        y = {curve: np.array([part[curve] for part in parts]) for curve in CURVES}
        if any(np.isfinite(values).any() for values in y.values()):
            found.append(Line(task, algo, seeds, {axis: np.array([part[axis] for part in parts]) for axis in AXES}, y))
    return found


def as_csv(runs: Runs) -> str:
    """CSV with one row per iteration of every run: task, algo, seed and the scalars of its history."""
    rows = [
        {key: record[key] for key in ("task", "algo", "seed")}
        | {key: value for key, value in entry.items() if isinstance(value, int | float)}
        for record in runs.records
        for entry in record["history"]
    ]
    columns = dict.fromkeys(["task", "algo", "seed", *(key for row in rows for key in row)])
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def draw(lines: Sequence[Line], algos: Sequence[str], path: Path) -> None:
    """Draw rewards against all tokens, guide tokens and seconds: interquartile means over seeds, intervals as bands.

    Validation rewards if a task has them, else training rewards. The picture is a PNG; `algos` are all rows in the
    profile's order, which gives each its colour.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.ticker import EngFormatter, MaxNLocator

    tasks = list(dict.fromkeys(line.task for line in lines))
    axes_shown = ("tokens", "num_guide_tokens", "seconds")
    picture = figure(2.5 + 4 * len(tasks), 3.1 * len(axes_shown))
    grid = picture.subplots(len(axes_shown), len(tasks), squeeze=False, sharey="col")
    legend = {}
    for column, task in enumerate(tasks):
        of_task = [line for line in lines if line.task == task]
        validated = any(np.isfinite(line.y["eval/reward"]).any() for line in of_task)
        curve = "eval/reward" if validated else "reward"
        for line in of_task:
            place = algos.index(line.algo)
            colour = COLOURS[place % len(COLOURS)][0]
            dash = ("-", "--", ":")[place // len(COLOURS) % len(DASHES)]
            points = line.over_seeds(curve)
            there = np.array([point is not None for point in points])
            values, low, high = np.array([point for point in points if point is not None]).reshape(-1, 3).T
            for row, axis in enumerate(axes_shown):
                x = line.x[axis].mean(0)
                if not x[-1]:  # no guide
                    continue
                panel = grid[row, column]
                (legend[line.algo],) = panel.plot(x[there], values, dash, color=colour, linewidth=1.5)
                panel.fill_between(x[there], low, high, color=colour, alpha=0.12, linewidth=0)
                panel.set_xlim(left=0)
        for row, axis in enumerate(axes_shown):
            panel = grid[row, column]
            panel.set(xlabel=AXES[axis])
            panel.xaxis.set_major_locator(MaxNLocator(6))
            panel.xaxis.set_major_formatter(EngFormatter(sep=""))
            panel.grid(alpha=0.3)
            panel.spines[["top", "right"]].set_visible(False)
        grid[0, column].set_title(_literal(f"{task}: {CURVES[curve]}"), fontsize=11)
    names = [algo for algo in algos if algo in legend]
    labels = [_literal(name) for name in names]
    picture.legend([legend[name] for name in names], labels, loc="outside right upper", frameon=False)
    save(picture, path)


def _literal(text: str) -> str:
    """Escape what matplotlib would read as a formula."""
    return text.replace("$", r"\$")


def _evaluated_from_the_start(group: Sequence[Record]) -> bool:
    """Whether runs were evaluated while they learned, and started from the policy of `level`."""
    return "start" not in group[0]["hyperparameters"] and all(
        any("eval/reward" in entry for entry in record["history"]) for record in group
    )


def _points(record: Record, length: int, start: float | None) -> dict[str, np.ndarray]:
    """A run's history in at most `POINTS` groups of iterations: the last axis values and the means of each.

    Before them the validation reward `start` at zero, if it is known.
    """
    history = record["history"][:length]
    columns = {
        key: np.array([entry.get(key, np.nan) for entry in history], dtype=np.float64) for key in (*AXES, *CURVES)
    }
    columns["seconds"] = np.cumsum(columns["seconds"])
    columns["tokens"] = columns["num_timesteps"] + columns["num_guide_tokens"]
    stretches = np.array_split(np.arange(length), min(length, POINTS))
    ends = [stretch[-1] for stretch in stretches]
    points = {key: columns[key][ends] for key in AXES} | {
        key: np.array([_mean(columns[key][stretch]) for stretch in stretches]) for key in CURVES
    }
    if start is None:
        return points
    zero = dict.fromkeys(AXES, 0.0) | dict.fromkeys(CURVES, np.nan) | {"eval/reward": start}
    return {key: np.concatenate([[zero[key]], values]) for key, values in points.items()}


def _mean(values: np.ndarray) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if there.size else float("nan")
