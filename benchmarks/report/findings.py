"""Fill a page of Markdown from results: ``python -m benchmarks.report.findings runs/NAME --page docs/evidence.md``.

People write the page, except for the passages between ``<!-- PASSAGE -->`` and ``<!-- / -->``, which this command
replaces. A passage is one of

- ``made``: what was run, and how this page was made; ``curves``: the picture of the learning curves;
- ``claims``: whether guided algorithms beat PPO, and PPO supervised learning; ``claims ROW BASELINE``: whether a row
  beats another without a higher perplexity;
- ``table T``: a table, T being ``results``, ``aggregate``, ``improvement``, ``comparisons``, ``metrics`` or ``costs``;
- ``reward TASK ROW``, ``normalised ROW``, ``difference TASK ROW BASELINE``, ``improvement ROW BASELINE``,
  ``ratio METRIC TASK ROW BASELINE``: one number with its interval, for the middle of a sentence;
- ``history METRIC TASK ROW ITERATION``: what a row's runs recorded in an iteration, mean and extremes over seeds.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import tyro

from benchmarks.comparison.results import Runs, write_text
from benchmarks.report import tables
from benchmarks.report.analysis import Analysis
from benchmarks.report.write import PICTURE

# (row, baseline, whether the row's perplexity must not be higher): the row's interval of test reward lies above the
# baseline's on at least `TASKS_NEEDED` tasks, or on all where there are fewer.
CLAIMS: tuple[tuple[str, str, bool], ...] = (("d2lols", "ppo", True), ("ppo++", "ppo", True), ("ppo", "sl", False))
TASKS_NEEDED = 2


class Findings:
    """The passages of a page about a benchmark folder with its report; paths in the page are relative to it."""

    def __init__(self, folder: Path, page: Path) -> None:
        self.folder, self.page = folder, page
        self.analysis = Analysis(Runs.read(folder))
        self.passages: dict[str, Callable[..., str]] = {
            "made": self.made,
            "curves": self.curves,
            "claims": self.claims,
            "table": lambda name: tables.TABLES[name](self.analysis).markdown(),
            "reward": lambda task, row: f"{self.analysis.reward(task, row):.3f}",
            "normalised": lambda row: f"{self.analysis.aggregate[row]:.2f}",
            "difference": lambda *key: f"{self.analysis.differences[key].reward:+.3f}",
            "improvement": lambda *key: f"{self.analysis.improvement[key]:.2f}",
            "ratio": self.ratio,
            "history": self.history,
        }

    def fill(self, text: str) -> str:
        """Return a page with its passages replaced.

        Raises:
            ValueError: A passage is unknown, has no end, or asks for something that the results do not have.
        """
        filled, count = re.subn(r"<!-- ([^>/][^>]*?) -->((?!<!--).)*<!-- / -->", self._passage, text, flags=re.DOTALL)
        ends = text.count("<!-- / -->")
        if count != ends:
            raise ValueError(f"each <!-- / --> must end a passage, got {ends} of them for {count} passages")
        return filled

    def _passage(self, match: re.Match[str]) -> str:
        name, *arguments = match[1].split()
        if name not in self.passages:
            raise ValueError(f"a passage must be one of {[*self.passages]}, got {name!r}")
        try:
            written = self.passages[name](*arguments)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"passage {match[1]!r} asks for what {self.folder} does not have: {error!r}") from error
        # Markdown needs an empty line before a block.
        space = "\n\n" if "\n" in written or name in ("made", "curves") else ""
        return f"<!-- {match[1]} -->{space}{written}{space}<!-- / -->"

    def made(self) -> str:
        """What was run, and the command."""
        runs = self.analysis.runs
        seeds = sorted({len(group) for _, _, group in runs.groups()})
        prompts = {record["task"]: len(record["evaluation"]["rewards"]) for record in runs.records}
        tested = tables.listed([f"{count} prompts of {task}" for task, count in prompts.items()])
        return (
            f"{len(runs.records)} runs of profile `{runs.records[0]['profile']}`: {len(runs.algos)} rows with "
            f"{''.join(f'{number} or ' for number in seeds[:-1])}{_count(seeds[-1], 'seed')}, "
            f"{runs.training_hours:.1f} hours of training "
            f"after the warm starts, tested on {tested}. Numbers here were written by `python -m "
            f"benchmarks.report.findings {os.path.relpath(self.folder)} --page {os.path.relpath(self.page)}`."
        )

    def curves(self) -> str:
        """The picture that the report drew."""
        path = self.folder / PICTURE
        if not path.exists():
            raise ValueError(f'{path} is missing: pip install "textgym[plots]" and write the report')
        return f"![Learning curves]({Path(os.path.relpath(path, self.page.parent)).as_posix()})"

    def ratio(self, metric: str, task: str, row: str, baseline: str) -> str:
        """A ratio of two rows' metric."""
        found = self.analysis.ratio(task, row, baseline, metric)
        if found is None:
            raise ValueError(f"no {metric} above 0 in every run")
        return f"{found:.2f}"

    def history(self, metric: str, task: str, row: str, iteration: str) -> str:
        """A training metric in an iteration."""
        values = [
            entry[metric]
            for record in self.analysis.runs.of(task, row)
            for entry in record["history"]
            if entry["iteration"] == int(iteration)
        ]
        return f"{fmean(values):.3g} ({min(values):.3g} to {max(values):.3g})"

    def claims(self, *key: str) -> str:
        """For each claim, or the one about a row and a baseline, the tasks on which it holds, and the evidence."""
        asked = CLAIMS
        if key:
            row, baseline = key
            asked = ((row, baseline, True),)
        parts = [
            "A row is above another where its whole interval of test reward, over seeds, is above the other's. Its "
            "perplexity is higher where the whole interval of their ratio is above 1."
        ]
        tasks = self.analysis.runs.tasks
        for row, baseline, fluent in asked:
            judged = {task: self.claim(task, row, baseline, fluent) for task in tasks}
            where = [task for task, (holds, _) in judged.items() if holds]
            claim = f"`{row}` above `{baseline}`{', its perplexity no higher' if fluent else ''}"
            needed = min(TASKS_NEEDED, len(tasks))
            outcome = "holds" if len(where) >= needed else "does not hold"
            found = tables.listed(where) if where else "none"
            lines = [f"- {task}: {sentence}" for task, (_, sentence) in judged.items()]
            counted = f"on {found} of {_count(len(tasks), 'task')}; needed on {needed}"
            parts.append("\n".join([f"**{claim}: {outcome}** ({counted}).", "", *lines]))
        return "\n\n".join(parts)

    def claim(self, task: str, row: str, baseline: str, fluent: bool) -> tuple[bool, str]:
        """Whether a claim holds on a task, and the evidence."""
        analysis = self.analysis
        if missing := [algo for algo in (row, baseline) if not analysis.runs.of(task, algo)]:
            return False, f"no run of {tables.listed(missing)}."
        first, second = analysis.reward(task, row), analysis.reward(task, baseline)
        verdict, seeds = first.against(second), [len(analysis.runs.of(task, algo)) for algo in (row, baseline)]
        sentences = [
            f"{verdict}: test reward {first:.3f} over {_count(seeds[0], 'seed')} against {second:.3f} over {seeds[1]}"
            + ("" if min(seeds) > 1 else ", and one seed has no interval")
        ]
        if difference := analysis.differences.get((task, row, baseline)):
            sentences.append(f"on the same prompts {difference.reward:+.3f}")
        higher = {"above": "higher", "below": "lower", "not told apart": "not told apart"}
        ratio = analysis.ratio(task, row, baseline, "perplexity")
        told = ratio and higher[ratio.against(1)]
        sentences.append(f"perplexity {ratio:.3f} times that of {baseline}, {told}" if ratio else "perplexity unknown")
        holds = verdict == "above" and (not fluent or told in ("lower", "not told apart"))
        return holds, "; ".join(sentences) + "."


def _count(number: int, thing: str) -> str:
    """A number of things, in the singular or the plural."""
    return f"{number} {thing}{'s' * (number != 1)}"


def fill_page(folder: tyro.conf.Positional[Path], page: Path) -> None:
    """Fill a page of Markdown from the results in a benchmark folder; start a page if there is none.

    Args:
        folder: The benchmark folder, with its report.
        page: The page.

    Raises:
        ValueError: The folder holds no finished run, or the page asks for something that the results do not have.
    """
    source = page if page.exists() else Path(__file__).with_name("templates") / "findings.md"
    filled = Findings(folder, page).fill(source.read_text(encoding="utf-8"))
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, filled)


if __name__ == "__main__":
    tyro.cli(fill_page)
