"""Draw which way to use a guide wins where: ``python -m benchmarks.report.map runs/NAME --out map.png``.

For a profile whose tasks differ in the start policy and whose rows are named ``METHOD@GUIDE``, as `MAP` in
`benchmarks.profiles.frontier`. A method without a guide takes part beside every guide.
"""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import tyro

from benchmarks.comparison.results import Runs
from benchmarks.report.analysis import START, Analysis
from benchmarks.report.curves import COLOURS
from benchmarks.report.plots import figure, save
from benchmarks.report.tables import listed


class Cell(NamedTuple):
    """The best methods for one start policy and one guide.

    Attributes:
        reward: The highest mean test reward.
        methods: The method that has it, then those that are not told apart from it, best first; none if it is not above
            the start policy.
    """

    reward: float
    methods: list[str]


def cells(analysis: Analysis) -> dict[tuple[str, str], Cell]:
    """The best methods, by task and guide; rows are told apart on the test prompts (`Analysis.differences`).

    Raises:
        ValueError: A task has no run of the row "start", or no row has a guide in its name.
    """
    found, runs = {}, analysis.runs
    guides = list(dict.fromkeys(guide for algo in runs.algos if (guide := algo.partition("@")[2])))
    if not guides:
        raise ValueError(f"rows must be named METHOD@GUIDE, got {runs.algos}")
    for task in runs.tasks:
        if not runs.of(task, START):
            raise ValueError(f"task {task} must have a run of the row {START!r}")

        def above(row: str, other: str, task: str = task) -> bool:
            if (task, row, other) not in analysis.differences:
                raise ValueError(f"task {task} must have a run of {row} and of {other} with one seed and the same test")
            return analysis.differences[task, row, other].reward.low > 0

        rewards = {
            algo: fmean(record["final_reward"] for record in runs.of(task, algo))
            for algo in runs.algos
            if algo != START and runs.of(task, algo)
        }
        for guide in guides:
            beside = [algo for algo in rewards if algo.partition("@")[2] in ("", guide)]
            if not beside:
                continue  # no run yet
            best, *others = sorted(beside, key=lambda algo: -rewards[algo])
            equal = [best, *(algo for algo in others if not above(best, algo))] if above(best, START) else []
            found[task, guide] = Cell(rewards[best], [algo.partition("@")[0] for algo in equal])
    return found


def draw(analysis: Analysis, path: Path) -> None:
    """Draw the cells as a PNG: a column per task, labelled with the start policy's reward, and a row per guide.

    Raises:
        ImportError: Matplotlib is not installed.
        ValueError: As for `cells`.
    """
    found = cells(analysis)
    tasks, guides = list(dict.fromkeys(task for task, _ in found)), list(dict.fromkeys(guide for _, guide in found))
    methods = list(dict.fromkeys(algo.partition("@")[0] for algo in analysis.runs.algos if algo != START))
    picture = figure(1.6 + 1.9 * len(tasks), 1.4 + 0.8 * len(guides))
    from matplotlib.patches import Rectangle

    panel = picture.subplots()
    for (task, guide), cell in found.items():
        x, y = tasks.index(task), guides.index(guide)
        colour = COLOURS[1:][methods.index(cell.methods[0]) % len(COLOURS[1:])][1] if cell.methods else "#eeeeee"
        panel.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white"))
        name = " or\n".join(cell.methods) if cell.methods else "none above the start"
        panel.text(x, y, f"{name}\n{cell.reward:.2f}", ha="center", va="center", fontsize=8)
    panel.set(xlim=(-0.5, len(tasks) - 0.5), ylim=(-0.5, len(guides) - 0.5))
    panel.set_xticks(range(len(tasks)), [f"{task}: {analysis.reward(task, START).value:.3f}" for task in tasks])
    panel.set_yticks(range(len(guides)), guides)
    panel.set(xlabel="task, and the test reward of its start policy", ylabel="guide")
    panel.set_title(f"Highest test reward within one budget of tokens, of {listed(methods)}", fontsize=9)
    save(picture, path)


def main(folder: tyro.conf.Positional[Path], out: Path) -> None:
    """Draw the map of a benchmark folder.

    Args:
        folder: A folder with results.
        out: The picture.
    """
    draw(Analysis(Runs.read(folder)), out)


if __name__ == "__main__":
    tyro.cli(main)
